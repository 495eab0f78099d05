"""lm-evaluation-harness on our checkpoints: against logits taken by hand, and against its own HFLM on the same model, exported."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hf_models import LLAMA, do_export, make_run

from megatron_scratch.cli import main
from megatron_scratch.config.verbs import EvalArgs
from megatron_scratch.data.tokenizer import ByteTokenizer
from megatron_scratch.models import Decoder
from megatron_scratch.train import harness
from megatron_scratch.train.inference import load_run
from megatron_scratch.train.scorer import Scorer, sampling
from megatron_scratch.util.errors import UserError

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="no lm-eval"),
]

MODEL = replace(LLAMA, vocab_size=257, max_seq_len=64)
QUESTIONS = [{"gold": i % 4, "q": f"Question {i}: {'what is ' * (i % 4)}{i} + {i}?\nAnswer:",
              "choices": [f" {i + k}" * (1 + k % 2) for k in range(4)],
              "text": f"{'The quick brown fox. ' * (i % 5)}Number {i}.\nÜber {i}."} for i in range(12)]  # fmt: skip
ASKED = {"output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{choices}}", "doc_to_target": "gold"}
TASKS = {
    "our_choice": {**ASKED, "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]},
    "our_text": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
                 "metric_list": [{"metric": m} for m in ("word_perplexity", "byte_perplexity", "bits_per_byte")]},
    "our_writing": {"output_type": "generate_until", "doc_to_text": "{{q}}", "doc_to_target": "{{text}}",
                    "generation_kwargs": {"until": ["e"], "max_gen_toks": 9},
                    "metric_list": [{"metric": "exact_match"}]},
    "our_zero": {**ASKED, "num_fewshot": 0, "metric_list": [{"metric": "acc"}]},
    "our_code": {**ASKED, "unsafe_code": True, "metric_list": [{"metric": "acc"}]},
    "our_remote": {**ASKED, "dataset_path": "nobody/has-this", "dataset_kwargs": {}, "metric_list": [{"metric": "acc"}]},
}  # fmt: skip
OURS = ["our_choice", "our_text", "our_writing"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    make_run(path, MODEL)
    return path


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tasks of our own, their data beside them."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    for name, task in TASKS.items():
        common = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(json.dumps({**common, "fewshot_split": "test", **task}))  # JSON is YAML
    return folder


@pytest.fixture(autouse=True)
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    yield


@pytest.fixture(scope="module")
def scorer(run: Path) -> Scorer:
    return Scorer(load_run(str(run)).model.decoder, ByteTokenizer(), batch=5)


@torch.no_grad()
def by_hand(decoder: Decoder, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """All logits of one sequence, nothing padded, nothing shared."""
    whole = (context + continuation)[-MODEL.max_seq_len - 1 :]
    logp = decoder.logits(decoder(torch.tensor([whole[:-1]])))[0, -len(continuation) :, :257].double().log_softmax(-1)
    return float(logp[range(len(continuation)), continuation].sum()), logp.argmax(-1).tolist() == continuation


def ids(text: str) -> list[int]:
    return list(text.encode())


def test_loglikelihoods_are_those_by_hand(scorer: Scorer) -> None:
    """Of all lengths at once, beyond the context too, some of them greedy, some with the same beginning, one empty."""
    decoder = scorer.decoder
    pairs = [(ids("a" * n), ids("bc" * (1 + n % 9))) for n in (1, 2, 7, 30, 40, 63, 64, 65, 200)]
    pairs += [(ids("the same"), [letter]) for letter in ids("ABCD")]
    with torch.no_grad():
        best = int(decoder.logits(decoder(torch.tensor([ids("the same")])))[0, -1].argmax())
    pairs += [(ids("the same"), [best])]
    want = [by_hand(decoder, *pair) for pair in pairs]
    scorer.cut = 0
    found = scorer.loglikelihoods([*pairs, (ids("x"), [])])
    assert found[-1] == (0.0, True) and want[-1][1] and scorer.cut == sum(len(a) + len(b) > 65 for a, b in pairs) == 3
    assert [greedy for _, greedy in found[:-1]] == [greedy for _, greedy in want]
    assert [logp for logp, _ in found[:-1]] == pytest.approx([logp for logp, _ in want], rel=1e-5)


def test_what_goes_in_twice_is_computed_once(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    whole = Scorer._hidden
    monkeypatch.setattr(Scorer, "_hidden", lambda self, batch: rows.append(len(batch)) or whole(self, batch))
    scorer.loglikelihoods([(ids("which one? "), [letter]) for letter in ids("ABCD")] * 3)
    assert rows == [1]


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_the_batch_changes_nothing(batch: int, scorer: Scorer) -> None:
    pairs = [(ids(f"{'x' * (i * 7 % 50)}?"), ids(f"{i} yes"[: 1 + i % 5])) for i in range(40)]
    other = Scorer(scorer.decoder, ByteTokenizer(), batch)
    found, want = other.loglikelihoods(pairs), scorer.loglikelihoods(pairs)
    assert [g for _, g in found] == [g for _, g in want]
    assert [logp for logp, _ in found] == pytest.approx([logp for logp, _ in want], rel=1e-5)


def greedy_text(decoder: Decoder, prompt: list[int], new: int) -> str:
    """Without a cache."""
    written: list[int] = []
    with torch.no_grad():
        for _ in range(new):
            written.append(int(decoder.logits(decoder(torch.tensor([prompt + written])))[0, -1].argmax()))
    return bytes(written).decode("utf-8", "replace")


def test_text_is_the_greedy_one_and_ends_before_a_stop(scorer: Scorer) -> None:
    prompt, options = ids("Once upon"), sampling({"until": [], "max_gen_toks": 12}, 5)
    want = greedy_text(scorer.decoder, prompt, 12)
    assert scorer.text(prompt, options, 0) == want
    end = next(i for i, letter in enumerate(want) if letter != want[0])
    assert scorer.text(prompt, {**options, "until": ["not in it", want[end:], want[end], ""]}, 0) == want[:end]
    long = ids("y" * 100) + prompt
    assert scorer.text(long, options, 0) == greedy_text(scorer.decoder, long[-(64 - 12) :], 12), "the beginning is cut"
    assert scorer.text([], options, 0) == greedy_text(scorer.decoder, [256], 12)
    drawn = sampling({"do_sample": True, "temperature": 1.0, "max_gen_toks": 12}, 5)
    assert scorer.text(prompt, drawn, 1) == scorer.text(prompt, drawn, 1) != scorer.text(prompt, drawn, 2)


def test_what_a_task_may_ask_of_generation() -> None:
    greedy = {"until": ["x"], "max_gen_toks": 5, "temperature": 0.0, "top_k": None, "top_p": None}
    assert sampling({"until": ["x"], "do_sample": False, "temperature": 0.7, "top_p": 0.9, "num_beams": 1}, 5) == greedy
    assert sampling({"do_sample": True, "top_k": 0, "top_p": 0.9}, 7) == {
        "until": [], "max_gen_toks": 7, "temperature": 1.0, "top_k": None, "top_p": 0.9}  # fmt: skip
    with pytest.raises(UserError, match="num_beams=4.*not known"):
        sampling({"num_beams": 4}, 5)


@pytest.mark.parametrize(("pairs", "options", "message"), [
    ([([1], [2] * 65)], None, "continuation of 65 tokens is beyond the model's context of 64"),
    (None, {"until": [], "max_gen_toks": 64, "temperature": 0.0, "top_k": None, "top_p": None}, "max_gen_toks=64.*context is 64"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(pairs: Any, options: Any, message: str, scorer: Scorer) -> None:
    with pytest.raises(UserError, match=message):
        scorer.loglikelihoods(pairs) if pairs else scorer.text([1], options, 0)


@pytest.fixture(scope="module")
def theirs(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """lm-eval's own model class on the same weights, exported."""
    from lm_eval.models.huggingface import HFLM

    out = tmp_path_factory.mktemp("hf") / "model"
    do_export(run, out)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LOCAL_RANK", raising=False)  # which DeepSpeed has left in this process; accelerate would wait for other ranks
        return HFLM(pretrained=str(out), device="cpu", dtype="float32", batch_size=4, max_length=64)


def test_the_requests_of_lm_eval_come_out_as_with_its_own_model_class(scorer: Scorer, theirs: Any) -> None:
    ours = harness._adapter(scorer)

    def requests(*args: Any) -> list[Any]:
        return [SimpleNamespace(args=arg) for arg in args]

    pairs = requests(*((row["q"] * (1 + i % 3), choice) for i, row in enumerate(QUESTIONS) for choice in row["choices"]),
                     ("", "nothing before it"), ("a space ", "moves"))  # fmt: skip
    found, want = ours.loglikelihood(pairs), theirs.loglikelihood(pairs, disable_tqdm=True)
    assert [g for _, g in found] == [g for _, g in want]
    assert [logp for logp, _ in found] == pytest.approx([logp for logp, _ in want], abs=1e-4)
    texts = requests(*((row["text"] * 3,) for row in QUESTIONS), ("",))
    assert ours.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts, disable_tqdm=True), abs=1e-3)
    asked = requests(*((row["q"], {"until": ["e", "\n"], "max_gen_toks": 10}) for row in QUESTIONS))
    assert ours.generate_until(asked) == theirs.generate_until(asked, disable_tqdm=True)


def their_results(theirs: Any, tasks: Path, names: list[str], **more: Any) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return simple_evaluate(model=theirs, tasks=names, task_manager=manager, log_samples=False, **more)  # type: ignore[return-value]


@pytest.mark.parametrize("words", [[], ["fewshot=1", "limit=6", "micro_batch_size=3"]])
def test_the_verb_gives_what_lm_eval_gives(
    words: list[str], run: Path, tasks: Path, theirs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out" / "results.json"
    assert main(["eval", str(run), f"tasks={','.join(OURS)}", f"include={tasks}", f"out={out}", *words]) == 0
    shown = capsys.readouterr().out
    written = json.loads(out.read_text())
    more = {"num_fewshot": 1, "limit": 6} if words else {}
    want = their_results(theirs, tasks, OURS, **more)
    for name in OURS:
        values = {key: value for key, value in want["results"][name].items() if isinstance(value, float)}
        assert len(values) >= 2
        for key, value in values.items():
            assert written["results"][name][key] == pytest.approx(value, rel=1e-4, abs=1e-6), (name, key)
        assert name in shown
    assert written["step"] == 7 and written["n-samples"]["our_choice"]["effective"] == (6 if words else 12)
    assert written["n-shot"]["our_choice"] == (1 if words else 0) and written["lm_eval"]
    assert f"{written['results']['our_choice']['acc,none']:.4f}" in shown and "stderr" in shown
    assert ("lost their beginning" in shown) == bool(written["cut_requests"])
    assert bool(words) <= bool(written["cut_requests"]), "an example and a question are more than 64 bytes"


def test_where_results_go(run: Path, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run), "tasks=[our_choice]", f"include={tasks}", "limit=2", "precision=bf16"]) == 0
    path = run / "eval" / "step_00000007" / "our_choice.first2.bf16.json"
    assert f"written to {path}" in capsys.readouterr().out
    assert json.loads(path.read_text())["precision"] == "bf16"
    trained: Any = SimpleNamespace(folder=run / "checkpoints" / "step_00000007")
    long = harness._default_out(EvalArgs(tasks=[f"task_{i}" for i in range(50)], fewshot=5), trained)
    assert len(long.name) < 120 and long.parent == path.parent


@pytest.mark.parametrize(("words", "message"), [
    (["fewshot=1"], "fewshot=1 has no effect without tasks"), (["include=x"], "include=x has no effect without"),
    (["tasks=a", "data=x"], "data=x has no effect with tasks"), (["tasks=a", "batches=1"], "batches=1 has no effect with tasks"),
    (["tasks=[]"], "has no names"), (["tasks=a", "limit=0"], "limit=0 must be at least 1"),
    (["tasks=a", "fewshot=-1"], "fewshot=-1 must be"), (["tasks=a", "include=/no/such"], "is no folder"),
    (["micro_batch_size=0"], "must be at least 1"),
])  # fmt: skip
def test_words_without_effect_are_refused(words: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run), *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("words", "message"), [
    (["tasks=our_zero", "fewshot=2"], "fewshot=2 has no effect on task our_zero"),
    (["tasks=our_code"], "our_code runs code that the model writes"),
    (["tasks=our_remote"], "our_remote could not be loaded"),
    (["tasks=our_choice", "precision=fp8"], "precision=fp8 is for training"),
])  # fmt: skip
def test_tasks_that_cannot_be_run(
    words: list[str], message: str, run: Path, tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(run), f"include={tasks}", *words]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1, "one line"


def test_a_task_that_nobody_has(
    run: Path, tasks: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval.tasks

    class Few(lm_eval.tasks.TaskManager):
        """lm-eval's own list takes 12 s to read."""

        def __init__(self, include_path: Any = None, include_defaults: bool = True) -> None:
            super().__init__(include_path=include_path or str(tasks), include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Few)
    for more in ([], [f"include={tasks}"]):
        assert main(["eval", str(run), "tasks=our_chioce", *more]) == 2
        assert "no task 'our_chioce' (did you mean 'our_choice'?)" in capsys.readouterr().err


def test_without_lm_eval(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    monkeypatch.setattr(harness, "load_run", lambda *a: pytest.fail("before the model is loaded"))
    assert main(["eval", str(run), "tasks=hellaswag"]) == 2
    assert 'pip install "megatron-scratch[eval]"' in capsys.readouterr().err


def test_there_is_no_such_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "/no/such/run", "tasks=hellaswag"]) == 2
    assert "does not exist" in capsys.readouterr().err
