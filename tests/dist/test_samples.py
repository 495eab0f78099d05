"""What a model writes while it is trained: the same text under every layout, and a training that knows nothing of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_scratch.config import Config, check, compose
from megatron_scratch.config.samples import SamplesConfig, check_samples
from megatron_scratch.config.shrink import shrink, small_world, vet
from megatron_scratch.data.made_up import MadeUpSamples
from megatron_scratch.data.tokenizer import ByteTokenizer
from megatron_scratch.engine.zero import import_deepspeed
from megatron_scratch.parallel import SINGLE, Topology
from megatron_scratch.parallel.layout import full
from megatron_scratch.train import build, forked, parity
from megatron_scratch.train.batches import BatchPlan
from megatron_scratch.train.console import Silent
from megatron_scratch.train.generate import pick
from megatron_scratch.train.rundir import RunDir
from megatron_scratch.train.samples import Writer, WriteSamples
from megatron_scratch.train.step import TrainStep
from megatron_scratch.util.env import Rank
from megatron_scratch.util.errors import UserError

GPT2 = ["model=gpt2_tiny", "model.tie_embeddings=true"]
LLAMA = ["model=llama_tiny", "model.tie_embeddings=false", "model.dropout=0.1"]
PROMPTS = [[7], [1, 2, 3, 4, 5, 6], [9, 8, 7]]  # more than a microbatch of two rows of 16 tokens has room for
TOKENS, EOD = 6, 0
DRAWS = {"greedy": (0.0, None), "sampled": (1.0, None), "top": (0.7, 5)}  # temperature, top_k

PIPES = {name: ["parallel.pp=2", f"parallel.schedule={name}"]
         for name in ("gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv_zero_bubble", "dualpipev")}  # fmt: skip
SUBSET = [
    (GPT2, ["engine=ddp", "parallel.tp=2"]),
    (LLAMA, ["engine=fsdp", "parallel.tp=2"]),
    (GPT2, ["engine=zero3", "parallel.tp=2", "engine.persist=0", "precision=fp32"]),
    (GPT2, PIPES["1f1b"]),
    (LLAMA, [*PIPES["zbv_zero_bubble"], "engine=fsdp"]),
]
REST = [
    (LLAMA, ["engine=hsdp", "engine.replicas=2", "launcher.processes=4"]),
    (LLAMA, ["engine=zero1", "precision=fp32"]),
    (GPT2, ["engine=zero2", "parallel.tp=2", "parallel.sequence_parallel=false", "precision=fp32"]),
    (GPT2, ["engine=fsdp", "parallel.tp=2", "parallel.sequence_parallel=false"]),
    (LLAMA, ["engine=ddp", "parallel.tp=4", "model.num_kv_heads=2", "model.fused_qkv=false"]),
    (GPT2, ["engine=ddp", "parallel.tp=2", "train.canonical_reduction=true"]),
    (GPT2, ["engine=ddp", "parallel.tp=2", "parallel.recompute=full"]),
    *((GPT2, words) for name, words in PIPES.items() if name != "1f1b"),
    *((LLAMA, [*words, "parallel.tp=2"]) for words in PIPES.values()),
    *((GPT2, [*words, "engine=fsdp"]) for words in PIPES.values()),
]
CASES = [*SUBSET, *(pytest.param(*case, marks=pytest.mark.full) for case in REST)]


@pytest.fixture(scope="module", autouse=True)
def deepspeed() -> None:
    """Imported once: the forked ranks inherit it."""
    import_deepspeed("zero1", torch.device("cpu"))


def config(*words: str) -> tuple[Config, int]:
    precision = [] if any(w.startswith("precision") for w in words) else ["precision=fp64"]
    cfg = compose.load(["train.micro_batch_size=2", "train.global_batch_size=8", *precision, *words])
    world = small_world(cfg)
    vet(cfg, world)
    small, _ = parity.comparable(shrink(cfg, world))
    small.model.init_std *= 4  # logits that tell ids apart by more than rounding does
    return small, world


class Training:
    def __init__(self, cfg: Config, topo: Topology) -> None:
        self.models, self.engine = build.build_engine(cfg, topo)
        self.passes, self.train = build.build_passes(cfg, self.engine, topo), cfg.train
        loader = build.loader(cfg, MadeUpSamples(cfg.model.vocab_size or 0, cfg.train.seq_len, cfg.seed), topo)
        dropout = cfg.seed if cfg.model.dropout > 0 else None
        self.step = TrainStep(self.passes, loader, BatchPlan(cfg.train), topo, lambda step: cfg.optim.lr, dropout, lambda: 0)
        self.topo = topo

    def write(self, draw: str) -> list[list[int]]:
        temperature, top_k = DRAWS[draw]
        generators = [torch.Generator().manual_seed(number) for number in range(len(PROMPTS))]
        vocab = self.models[0].decoder.cfg.vocab_size

        def choose(number: int, logits_V: torch.Tensor) -> int:
            return pick(logits_V[:vocab], temperature, top_k, None, generators[number])

        return Writer(self.models, self.passes, self.topo, self.train).write(PROMPTS, TOKENS, choose, EOD)


def _written(rank: Rank, cfg: Config) -> list[list[list[int]]]:
    """What each draw writes after a step: weights have changed, and been gathered and let go of."""
    training = Training(cfg, build.topology(cfg, rank, torch.device("cpu")))
    training.step(0)
    found = [training.write(draw) for draw in DRAWS]
    assert all(model.training for model in training.models)
    training.step(1)
    return found


def truth(cfg: Config, draw: str) -> list[list[int]]:
    """One process, each prompt by itself, its text and nothing else in the batch."""
    one = parity.single(cfg)
    training = Training(one, SINGLE)
    training.step(0)
    decoder, (temperature, top_k) = training.models[0].decoder.eval(), DRAWS[draw]
    out = []
    for number, prompt in enumerate(PROMPTS):
        generator, text = torch.Generator().manual_seed(number), list(prompt)
        for _ in range(TOKENS):
            with torch.no_grad():
                logits_V = decoder.logits(decoder(torch.tensor([text])))[0, -1, : cfg.model.vocab_size].float()
            new = pick(logits_V, temperature, top_k, None, generator)
            if new == EOD:
                break
            text.append(new)
        out.append(text[len(prompt) :])
    return out


def _id(words: list[str]) -> str:
    return "-".join(word.split(".")[-1] for word in words)


@pytest.mark.parametrize(("model", "words"), CASES, ids=lambda value: _id(value))
def test_every_layout_writes_the_text_of_one_process(model: list[str], words: list[str]) -> None:
    cfg, world = config(*model, *words)
    ranks = forked.run_ranks(world, _written, cfg)
    want = [truth(cfg, draw) for draw in DRAWS]
    assert all(found == want for found in ranks), "on every rank"
    assert all(len(set(text)) > 1 for text in want[1]), "more than one id over and over"


def test_training_is_the_same_to_the_last_bit() -> None:
    """With dropout; and torch's own generator, which others may use, stands where it stood."""
    found = []
    for writes in (False, True):
        cfg, _ = config(*LLAMA, "precision=fp32", "launcher.processes=2")
        training, losses = Training(parity.single(cfg), SINGLE), []
        for number in range(3):
            losses.append(training.step(number).loss)
            before = torch.get_rng_state()
            if writes:
                training.write("sampled")
            assert torch.equal(before, torch.get_rng_state())
        found.append((losses, {k: full(v).tolist() for k, v in training.engine.state().items()}))
    assert found[0] == found[1]


# 20 s. torch.compile (2.13) looks whether what comes out of a message has a gradient, instantiates autograd Functions, and warns.
@pytest.mark.full
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf", "ignore:.*should not be instantiated")
def test_a_compiled_training_is_the_same_too() -> None:
    """Text of other lengths than training's could have layers compiled anew, for any length, and these taken from there on."""
    found = []
    for writes in (False, True):
        cfg, _ = config(*LLAMA, "precision=fp32", "launcher.processes=2")
        cfg.train.compile = True
        training = Training(parity.single(cfg), SINGLE)
        losses = []
        for number in range(3):
            if writes:
                training.write("sampled")
            losses.append(training.step(number).loss)
        found.append((losses, {k: full(v).tolist() for k, v in training.engine.state().items()}))
    assert found[0] == found[1]


@pytest.mark.parametrize(("tp", "seq_len", "exact"), [(1, 16, False), (2, 15, False), (4, 100, False), (1, 15, True)])
def test_shapes(tp: int, seq_len: int, exact: bool) -> None:
    """A batch holds the texts, can be dealt out to tp ranks, and has training's shape where something is compiled for it."""
    model = SimpleNamespace(decoder=SimpleNamespace(cfg=SimpleNamespace(attention="flex" if exact else "auto")))
    train = SimpleNamespace(compile=False, micro_batch_size=4, seq_len=seq_len)
    writer = Writer([model], None, Topology(degrees={"tp": tp}), train)  # type: ignore[list-item, arg-type]
    at_once, length = writer._shape(PROMPTS, 6)
    rows = writer._rows(min(at_once, len(PROMPTS)), length)
    assert 12 <= length <= seq_len and rows >= min(at_once, len(PROMPTS))
    assert (rows, length) == (4, 15) if exact else rows * length % tp == 0


def hook(tmp_path: Path, cfg: SamplesConfig, tokenizer: Any, logits: Any) -> tuple[WriteSamples, list[str]]:
    """The hook over a model that says `logits(text)`, and what is shown."""
    said: list[str] = []
    decoder = SimpleNamespace(cfg=SimpleNamespace(attention="auto", vocab_size=300))
    model = SimpleNamespace(decoder=decoder, eval=lambda: None, train=lambda: None)

    def forward(tokens_BS: torch.Tensor, last_B: torch.Tensor) -> torch.Tensor:
        return torch.stack([logits(row[: last + 1].tolist()) for row, last in zip(tokens_BS, last_B.tolist(), strict=True)])

    passes = SimpleNamespace(logits=forward, pulse=SimpleNamespace(tick=lambda: None))
    view = Silent()
    view.say = said.append  # type: ignore[method-assign]
    train = SimpleNamespace(compile=False, micro_batch_size=4, seq_len=32)
    rates: Any = SimpleNamespace(pause=lambda: lambda: None, tokens_at=lambda step: 10 * step)
    writer = Writer([model], passes, SINGLE, train)  # type: ignore[list-item, arg-type]
    return WriteSamples(cfg, 3, tokenizer, writer, RunDir(tmp_path), view, rates), said


def _likes(text: list[int], new: int) -> torch.Tensor:
    logits_V = torch.zeros(384)
    logits_V[new] = 50.0
    logits_V[300:] = -math.inf
    return logits_V


def spells(word: bytes) -> Any:
    return lambda text: _likes(text, (*word, 256)[min(len(text) - 1, len(word))])


def test_the_hook_writes_rows_and_ends_a_text_with_its_document(tmp_path: Path) -> None:
    cfg = SamplesConfig(every=2, prompts=["", "x"], tokens=20)
    samples, said = hook(tmp_path, cfg, ByteTokenizer(), spells("h\u00e9llo \n \U0001f600".encode()))
    assert [samples.due(step, False, False) for step in (1, 2, 3, 4)] == [False, True, False, True]
    assert samples.due(3, True, False) and not samples.due(4, False, True), "at the end, and not where a run stops in a hurry"
    samples.run(2, None)  # type: ignore[arg-type]
    first, second = map(json.loads, (tmp_path / "samples.jsonl").read_text().splitlines())
    assert first.pop("time") > 1e9
    assert first == {"step": 2, "tokens": 20, "prompt": "", "text": "h\u00e9llo \n \U0001f600"}
    assert second["prompt"] == "x" and second["text"] == first["text"]
    assert said == ["step 2: h\u00e9llo \U0001f600", "step 2: xh\u00e9llo \U0001f600"]


def test_a_text_is_a_function_of_seed_step_and_prompt(tmp_path: Path) -> None:
    cfg = SamplesConfig(every=1, prompts=["a", "a"], tokens=8, temperature=1.0)
    flat = torch.zeros(384)
    samples, _ = hook(tmp_path, cfg, ByteTokenizer(), lambda text: flat)
    for step in (1, 2, 1):
        samples.run(step, None)  # type: ignore[arg-type]
    texts = [json.loads(line)["text"] for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert texts[:2] == texts[4:] and len(set(texts)) == 4


def test_numbers_that_are_none_end_a_text_and_not_a_run(tmp_path: Path) -> None:
    samples, _ = hook(tmp_path, SamplesConfig(every=1, tokens=4), ByteTokenizer(), lambda text: torch.full((384,), math.nan))
    samples.run(1, None)  # type: ignore[arg-type]
    assert json.loads((tmp_path / "samples.jsonl").read_text())["text"] == ""


def test_a_run_without_a_tokenizer_or_with_a_long_prompt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.samples\.every=1 needs a tokenizer, .* data\.tokenizer=FILE"):
        hook(tmp_path, SamplesConfig(every=1), None, None)
    with pytest.raises(UserError, match=r"'aaaaa': its 5 tokens and train\.samples\.tokens=28 are beyond train\.seq_len=32"):
        hook(tmp_path, SamplesConfig(every=1, prompts=["aaaa", "aaaaa"], tokens=28), ByteTokenizer(), None)


REFUSED = [
    ({"every": -1}, "train.samples.every=-1 must be 0"),
    ({"tokens": 8}, "train.samples.tokens=8 has no effect with train.samples.every=0"),
    ({"prompts": ["a"]}, "train.samples.prompts=['a'] has no effect"),
    ({"every": 1, "prompts": []}, "leaves nothing to write"),
    ({"every": 1, "tokens": 0}, "allowed: 1 to 31"),
    ({"every": 1, "tokens": 32}, "train.samples.tokens=32: a text has room for train.seq_len=32"),
    ({"every": 1, "tokens": 4, "temperature": -1.0}, "must be 0 (greedy) or more"),
    ({"every": 1, "tokens": 4, "temperature": math.nan}, "must be 0 (greedy) or more"),
    ({"every": 1, "tokens": 4, "top_k": 0}, "train.samples.top_k=0 must be at least 1"),
    ({"every": 1, "tokens": 4, "temperature": 0.0, "top_k": 3}, "has no effect; leave it out"),
]


@pytest.mark.parametrize(("given", "words"), REFUSED, ids=[str(given) for given, _ in REFUSED])
def test_the_config_refuses(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        check_samples(SamplesConfig(**given), 32)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_config_that_can_run_passes() -> None:
    check_samples(SamplesConfig(), 32)
    check_samples(SamplesConfig(every=5, prompts=["", "The"], tokens=31, top_k=5), 32)


def test_a_proof_of_a_layout_writes_nothing() -> None:
    """`parity` shrinks sequences below what is to be written."""
    cfg = compose.load([*GPT2, "train.samples.every=1", "train.samples.tokens=64", "train.layers_every=1", "launcher.processes=2"])
    small = shrink(cfg, 2)
    check(small, 2)
    assert (small.train.samples, small.train.layers_every) == (SamplesConfig(), 0)
