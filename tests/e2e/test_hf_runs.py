"""Runs of several layouts to Hugging Face, and back into runs of other layouts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import TINY, config, ledger, rows, run
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_scratch.checkpoint import manifest as manifests
from megatron_scratch.cli import main
from megatron_scratch.config import CorpusConfig, compose
from megatron_scratch.corpus.pipeline import prepare
from megatron_scratch.engine.zero import import_deepspeed
from megatron_scratch.launch.resolve import resolve

SGD = ["schedule=constant", "optim=sgd", "optim.lr=0.1", "train.micro_batch_size=1"]
LAYOUTS = {"tp2_pp2": (4, ["parallel.tp=2", "parallel.pp=2"]), "zero3": (2, ["engine=zero3"])}


@pytest.fixture(scope="module", autouse=True)
def deepspeed() -> None:
    """Imported here once, instead of 2 s in every forked rank."""
    import_deepspeed("zero1", torch.device("cpu"))


@pytest.fixture(scope="module", params=LAYOUTS)
def folders(request: pytest.FixtureRequest, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(a run of that layout, its export, the import of that)."""
    world, overrides = LAYOUTS[request.param]
    path = tmp_path_factory.mktemp(request.param)
    cfg = config(corpus, path / "run", *overrides, "train.steps=4", "train.micro_batch_size=1", world=world)
    assert run(cfg, world) == [0] * world
    assert main(["ckpt", "export-hf", str(path / "run"), str(path / "out")]) == 0
    assert main(["ckpt", "import-hf", str(path / "out"), str(path / "back")]) == 0
    return path / "run", path / "out", path / "back"


def tensors(folder: Path) -> dict[str, bytes]:
    """The model's true numbers in a checkpoint: without the rows that fill up the vocabulary."""
    saved = manifests.verify(folder).tensors
    return {name: manifests.tensor(folder, s)[: 257 if name in ("model.embed.weight", "model.head.weight") else None].tobytes()
            for name, s in saved.items() if name.startswith("model.")}  # fmt: skip


def test_bitwise_there_and_back(folders: tuple[Path, Path, Path]) -> None:
    ours, _, back = folders
    assert tensors(ours / "checkpoints" / "step_00000004") == tensors(back / "checkpoints" / "step_00000000")
    kept = manifests.read(back / "checkpoints" / "step_00000000")
    assert all(name.startswith("model.") for name in kept.tensors) and kept.extra["imported"]["from"] == "llama"


def test_the_same_text_from_transformers_from_the_run_and_from_the_import(
    folders: tuple[Path, Path, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    ours, out, back = folders
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = tokenizer("import ", return_tensors="pt")
    theirs = model.generate(**ids, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=256)
    want = tokenizer.decode(theirs[0], skip_special_tokens=True)
    for folder in (ours, back):
        capfd.readouterr()
        assert main(["generate", str(folder), "prompt=import ", "max_new_tokens=20", "temperature=0", "stop_at_eod=false"]) == 0
        assert capfd.readouterr().out == want + "\n"


def test_the_same_loss_from_the_run_and_from_the_import(
    folders: tuple[Path, Path, Path], corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ours, _, back = folders
    lines = []
    for folder in (ours, back):
        assert main(["eval", str(folder), f"data={corpus}", "batches=4"]) == 0
        lines.append(capfd.readouterr().out.split(": ", 1)[1].split("  over")[0])
    assert lines[0] == lines[1] and lines[0].startswith("loss")


def go_on(
    back: Path, corpus: Path, path: Path, world: int, *overrides: str, optim: list[str] = SGD
) -> dict[int, tuple[float, float]]:
    """Three steps of training from an import."""
    words = [w for w in TINY if not w.startswith(("model", "optim"))] + optim
    words += ["model=imported", f"checkpoint.resume={back}", f"data.dir={corpus}", f"dir={path}", "train.steps=3", *overrides]
    cfg = resolve(compose.load(words, [str(back / "configs")]), world)
    assert run(cfg, world) == [0] * world
    (event,) = ledger(path, "resume")
    assert (event["step"], event["guarantee"]) == (0, "the weights of an imported model, no optimizer state")
    return rows(path)


# imported from a run of -> processes, overrides, of the run that goes on
GO_ON = {
    "tp2_pp2": {"dp2_tp2": (4, ["parallel.tp=2"]), "zero3": (2, ["engine=zero3"])},
    "zero3": {"fsdp_tp": (4, ["engine=fsdp", "parallel.tp=2"]), "pp": (2, ["parallel.pp=2"])},
}


def test_training_goes_on_from_an_import_under_any_layout(folders: tuple[Path, Path, Path], corpus: Path, tmp_path: Path) -> None:
    _, _, back = folders
    alone = go_on(back, corpus, tmp_path / "one", 1)
    assert list(alone) == [1, 2, 3]
    for name, (world, overrides) in next(v for k, v in GO_ON.items() if k in str(back)).items():
        found = go_on(back, corpus, tmp_path / name, world, *overrides)
        for step, (loss, norm) in alone.items():  # the tolerance of test_train: fp32 sums over 256 tokens, a few steps
            assert found[step] == (pytest.approx(loss, rel=1e-5), pytest.approx(norm, rel=1e-5)), (name, step)


def test_adamw_begins_afresh(folders: tuple[Path, Path, Path], corpus: Path, tmp_path: Path) -> None:
    """Under DeepSpeed too, which makes its state before the first step."""
    adam = ["optim=adamw", "optim.lr=1e-3", "schedule=constant", "train.micro_batch_size=1"]
    one = go_on(folders[2], corpus, tmp_path / "one", 1, optim=adam)
    other = go_on(folders[2], corpus, tmp_path / "zero1", 2, "engine=zero1", optim=adam)
    for step, (loss, _) in one.items():  # where a gradient is nearly 0, an update is +-lr by its last bit
        assert other[step][0] == pytest.approx(loss, rel=1e-4), step


REFUSED = [
    (["model.norm_eps=1e-3"], "model.norm_eps is 0.001 here, but 1e-05"),
    (["model.num_layers=1"], "model.num_layers is 1 here, but 2"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED)
def test_another_model_is_refused(
    words: list[str],
    message: str,
    folders: tuple[Path, Path, Path],
    corpus: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    back = folders[2]
    more = [w for w in TINY if not w.startswith("model")] + [f"checkpoint.resume={back}", f"data.dir={corpus}", f"dir={tmp_path}"]
    cfg = resolve(compose.load([*more, "model=imported", *words], [str(back / "configs")]), 1)
    assert run(cfg) == [2]
    assert message in capfd.readouterr().err


def test_another_tokenizer_is_refused(
    folders: tuple[Path, Path, Path], corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    prepare(CorpusConfig(input="stdlib", output=str(other), tokenizer="sentencepiece_char", vocab_size=257, max_bytes=50_000))
    more = [w for w in TINY if not w.startswith("model")] + [
        f"checkpoint.resume={folders[2]}",
        f"data.dir={other}",
        f"dir={tmp_path / 'new'}",
    ]
    assert run(resolve(compose.load([*more, "model=imported"], [str(folders[2] / "configs")]), 1)) == [2]
    assert "tokenizer is" in capfd.readouterr().err
