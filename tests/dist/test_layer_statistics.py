"""Statistics by layer are the same numbers under every layout, and change nothing.

A run of one process without the object is the truth: norms are taken from its full gradients and weights, the stream from what its
layers return.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_scratch.config import Config, compose
from megatron_scratch.config.layers import check_layers
from megatron_scratch.config.shrink import shrink, small_world, vet
from megatron_scratch.data.made_up import MadeUpSamples
from megatron_scratch.engine.zero import import_deepspeed
from megatron_scratch.parallel import SINGLE, Topology
from megatron_scratch.parallel.layout import full
from megatron_scratch.train import build, forked, parity
from megatron_scratch.train import layers as module
from megatron_scratch.train.batches import BatchPlan
from megatron_scratch.train.guard import Guard
from megatron_scratch.train.layers import LayerStatistics
from megatron_scratch.train.scaler import loss_scaler
from megatron_scratch.train.step import StepResult, TrainStep
from megatron_scratch.util.env import Rank
from megatron_scratch.util.errors import UserError

STEPS, EVERY = 4, 2
GPT2 = ["model=gpt2_tiny", "model.tie_embeddings=true"]  # learned positions, biases, a tied embedding
LLAMA = ["model=llama_tiny", "model.tie_embeddings=false", "model.dropout=0.1"]
SCRATCH = ["model=scratch_tiny", "model.tie_embeddings=false"]  # norms after the sum: no norm before the head
TOLERANCE = {"fp64": 1e-10, "fp32": 1e-5}  # as the parity matrix has them, and for the same reasons: `parity.TOLERANCES`
SMALL = 1e-2  # of a norm of all, as there: a module's gradient may be a sum that all but cancels

Row = dict[str, dict[str, float]]

PIPES = {name: ["parallel.pp=2", f"parallel.schedule={name}"]
         for name in ("gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv_zero_bubble", "dualpipev")}  # fmt: skip
SUBSET = [
    (GPT2, ["engine=ddp", "parallel.tp=2"]),
    (LLAMA, ["engine=fsdp", "parallel.tp=2", "parallel.recompute=full"]),
    (GPT2, ["engine=zero3", "parallel.tp=2", "precision=fp32"]),
    (SCRATCH, ["engine=ddp", "train.canonical_reduction=true", "train.global_batch_size=8"]),
    (GPT2, PIPES["1f1b"]),  # both ends hold the embedding
    (LLAMA, [*PIPES["zbv_zero_bubble"], "engine=fsdp"]),
]
REST = [
    (SCRATCH, ["engine=hsdp", "engine.replicas=2", "launcher.processes=4"]),
    (LLAMA, ["engine=zero1", "precision=fp32"]),
    (GPT2, ["engine=zero2", "parallel.tp=2", "parallel.sequence_parallel=false", "precision=fp32"]),
    (LLAMA, ["engine=zero3", "engine.persist=0", "precision=fp32"]),
    (GPT2, ["engine=fsdp", "parallel.tp=2", "parallel.sequence_parallel=false"]),
    (LLAMA, ["engine=ddp", "parallel.tp=4", "model.num_kv_heads=2", "model.fused_qkv=false"]),  # key/value heads on two ranks each
    (GPT2, ["engine=ddp", "parallel.tp=2", "train.canonical_reduction=true"]),
    (LLAMA, ["engine=ddp", "parallel.tp=2", "parallel.overlap=true", "parallel.recompute=selective"]),
    *((GPT2, words) for name, words in PIPES.items() if name != "1f1b"),
    *((LLAMA, [*words, "parallel.tp=2"]) for name, words in PIPES.items()),
    *((GPT2, [*words, "engine=fsdp"]) for name, words in PIPES.items()),
]


@pytest.fixture(scope="module", autouse=True)
def deepspeed() -> None:
    """Imported once: the forked ranks inherit it."""
    import_deepspeed("zero1", torch.device("cpu"))


def config(*words: str) -> tuple[Config, int]:
    batch = [] if any(w.startswith("train.global_batch_size") for w in words) else ["train.global_batch_size=16"]
    precision = [] if any(w.startswith("precision") for w in words) else ["precision=fp64"]
    cfg = compose.load(["train.micro_batch_size=2", *batch, *precision, *words])
    world = small_world(cfg)
    vet(cfg, world)
    small, _ = parity.comparable(shrink(cfg, world))
    return small, world


class Training:
    """Four steps of a config, and what is made of them."""

    def __init__(self, cfg: Config, topo: Topology) -> None:
        self.cfg, self.topo, self.rows = cfg, topo, list[dict[str, Any]]()
        self.models, self.engine = build.build_engine(cfg, topo)
        self.guard, self.plan = Guard(cfg.fault, loss_scaler(cfg.precision)), BatchPlan(cfg.train)
        self.passes = build.build_passes(cfg, self.engine, topo)

    def steps(self, before_update: Any) -> TrainStep:
        cfg = self.cfg
        loader = build.loader(cfg, MadeUpSamples(cfg.model.vocab_size or 0, cfg.train.seq_len, cfg.seed), self.topo)
        dropout = cfg.seed if cfg.model.dropout > 0 else None
        return TrainStep(self.passes, loader, self.plan, self.topo, lambda step: cfg.optim.lr, dropout, lambda: 0, self.guard,
                         before_update)  # fmt: skip

    def statistics(self, every: int) -> LayerStatistics:
        cores = [model.decoder for model in self.models]
        return LayerStatistics(every, self.engine, cores, self.topo, lambda step: 100 * step, self.rows.append)

    def watched(self, every: int = EVERY) -> list[StepResult]:
        stats = self.statistics(every)
        step = stats.listening(self.steps(stats.take_gradients))
        return [step(number) for number in range(STEPS)]

    def weights(self) -> dict[str, Any]:
        return {k: full(v).tolist() for k, v in self.engine.state().items() if k.startswith("model.")}


def truth(cfg: Config) -> Iterator[Row]:
    """The rows of the steps that are due, from one process, by plain means."""
    one = Training(parity.single(cfg), SINGLE)
    (core,) = [model.decoder for model in one.models]
    seen: dict[str, list[torch.Tensor]] = defaultdict(list)
    norms: dict[str, dict[str, float]] = defaultdict(lambda: {"grad_norm": 0.0, "weight_norm": 0.0})
    hooked = {"norm": core.norm, **{f"layers.{i}": layer for i, layer in core.layers.items()}}
    for name, part in hooked.items():
        part.register_forward_hook(lambda m, args, out, name=name: seen[name].append(out.detach()))
    core.layers["0"].register_forward_pre_hook(lambda m, args: seen["embed"].append(args[0].detach()))

    def take() -> None:
        norms.clear()
        for name, parameter in core.named_parameters():
            top = name.split(".")[0].replace("position", "embed")
            key = ".".join(name.split(".")[:2]) if top == "layers" else top
            norms[key]["grad_norm"] = math.hypot(norms[key]["grad_norm"], float(parameter.grad.double().norm()))
            norms[key]["weight_norm"] = math.hypot(norms[key]["weight_norm"], float(parameter.detach().double().norm()))

    step = one.steps(take)
    for number in range(STEPS):
        seen.clear()
        result = step(number)
        assert math.hypot(*(row["grad_norm"] for row in norms.values())) == pytest.approx(result.grad_norm, rel=1e-6)
        row: Row = {name: dict(values) for name, values in norms.items()}
        for name, parts in seen.items():
            if name in row:  # a norm that is none
                x = torch.stack(parts).double()
                row[name] |= {"activation_rms": float(x.square().mean().sqrt()), "activation_max": float(x.abs().max())}
        if (number + 1) % EVERY == 0:
            yield row


def assert_equal(got: Row, want: Row, limit: float) -> None:
    assert {name: set(row) for name, row in got.items()} == {name: set(row) for name, row in want.items()}
    for key in ("grad_norm", "weight_norm", "activation_rms", "activation_max"):
        least = SMALL * math.hypot(*(row.get(key, 0.0) for row in want.values()))
        for name, row in want.items():
            if key in row:
                assert abs(got[name][key] - row[key]) <= limit * max(row[key], least), (name, key, got[name][key], row[key])


def _rows(rank: Rank, cfg: Config) -> list[dict[str, Any]]:
    training = Training(cfg, build.topology(cfg, rank, torch.device("cpu")))
    training.watched()
    return training.rows


def _id(words: list[str]) -> str:
    return "-".join(word.split(".")[-1] for word in words)


CASES = [*SUBSET, *(pytest.param(*case, marks=pytest.mark.full) for case in REST)]


@pytest.mark.parametrize(("model", "words"), CASES, ids=lambda value: _id(value))
def test_every_layout_has_the_numbers_of_one_process(model: list[str], words: list[str]) -> None:
    cfg, world = config(*model, *words)
    found, *others = forked.run_ranks(world, _rows, cfg)
    assert not any(others), "only the main rank writes"
    assert [(row["step"], row["tokens"]) for row in found] == [(2, 200), (4, 400)]
    for row, want in zip(found, truth(cfg), strict=True):
        assert list(row["layers"])[0] == "embed" and "layers.0" in want
        assert_equal(row["layers"], want, TOLERANCE[cfg.precision.name])


@pytest.mark.parametrize("words", [["precision=fp16"], ["precision=bf16"]], ids=_id)
def test_low_precision_has_them_too(words: list[str]) -> None:
    """fp16's gradients carry the loss scaler's factor in backward; the stream rounds at 2^-12 or 2^-9, twice through each layer."""
    cfg, _ = config(*GPT2, *words, "launcher.processes=2")
    one = Training(parity.single(cfg), SINGLE)
    results = one.watched()
    exact = truth(replace(cfg, precision=replace(cfg.precision, name="fp32")))
    for row, want in zip(one.rows, exact, strict=True):
        assert_equal(row["layers"], want, 0.05)
        squares = sum(layer["grad_norm"] ** 2 for layer in row["layers"].values())
        assert math.sqrt(squares) == pytest.approx(results[row["step"] - 1].grad_norm, rel=1e-5)


@pytest.mark.parametrize("words", [[], ["optim.clip_grad_norm=1e-3"]], ids=["", "clipped"])
def test_nothing_changes_to_the_last_bit(words: list[str]) -> None:
    found = []
    for every in (0, 1):
        cfg, _ = config(*LLAMA, *words, "precision=fp32", "launcher.processes=2")
        training = Training(parity.single(cfg), SINGLE)
        results = training.watched(every)
        found.append(([(r.loss, r.grad_norm) for r in results], training.weights()))
        assert len(training.rows) == STEPS * every
    assert found[0] == found[1]


# 35 s. torch.compile (2.13) looks whether what comes out of a message has a gradient, instantiates autograd Functions, and warns.
@pytest.mark.full
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf", "ignore:.*should not be instantiated")
def test_compiled_layers_are_seen_too() -> None:
    cfg, _ = config(*LLAMA, "launcher.processes=2")
    cfg = parity.single(cfg)
    rows = []
    for compiled in (False, True):
        cfg.train.compile = compiled
        training = Training(cfg, SINGLE)
        training.watched()
        rows.append(training.rows)
    for plain, row in zip(*rows, strict=True):
        assert_equal(row["layers"], plain["layers"], TOLERANCE["fp64"])


def test_a_skipped_step_has_no_row() -> None:
    cfg, _ = config(*LLAMA, "launcher.processes=2")
    training = Training(parity.single(cfg), SINGLE)
    stats = training.statistics(1)
    step = stats.listening(training.steps(stats.take_gradients))
    whole = training.passes.gradients
    training.passes.gradients = lambda *args: whole(*args) * torch.nan  # type: ignore[method-assign]
    training.guard.max_skips = 10
    assert step(0).skipped
    training.passes.gradients = whole  # type: ignore[method-assign]
    assert not step(1).skipped
    assert [row["step"] for row in training.rows] == [2]
    assert all(core.tap is None for core in stats.cores)


def _mutated(rank: Rank, cfg: Config, name: str) -> list[dict[str, Any]]:
    topo = build.topology(cfg, rank, torch.device("cpu"))
    training = Training(cfg, topo)
    if name == "each copy is counted":
        module.copies_of = lambda gradient, world: 1
    elif name == "of the tokens only the first tp rank's":
        see = LayerStatistics._see

        def first(self: LayerStatistics, name: str, x_ND: torch.Tensor) -> None:
            self.topo, topo = replace(self.topo, sequence_parallel=False), self.topo
            see(self, name, x_ND)
            self.topo = topo

        LayerStatistics._see = first  # type: ignore[method-assign]
    elif name == "clipped before":
        update = training.engine.norm

        def norm(scale: float | None = None) -> torch.Tensor:
            found = update(scale)
            for parameter in training.engine.named.values():
                parameter.grad.mul_(0.5)
            return found

        training.engine.norm = norm
    elif name == "of the last microbatch only":
        LayerStatistics._see = _forgetful(LayerStatistics._see)  # type: ignore[method-assign]
    training.watched()
    return training.rows


def _forgetful(see: Any) -> Any:
    def last(self: LayerStatistics, name: str, x_ND: torch.Tensor) -> None:
        if name == "embed":
            self.norms[module.STREAM], self.largest, self.numbers = module.Norms(), [], []
        see(self, name, x_ND)

    return last


@pytest.mark.parametrize("name", ["each copy is counted", "of the tokens only the first tp rank's", "clipped before",
                                  "of the last microbatch only"])  # fmt: skip
def test_mistakes_show(name: str) -> None:
    cfg, world = config(*GPT2, "engine=ddp", "parallel.tp=2")
    found = forked.run_ranks(world, _mutated, cfg, name)[0]
    with pytest.raises(AssertionError):
        for row, want in zip(found, truth(cfg), strict=True):
            assert_equal(row["layers"], want, TOLERANCE["fp64"])


def test_a_number_of_steps_that_is_none_is_refused() -> None:
    check_layers(0)
    with pytest.raises(UserError, match=r"train\.layers_every=-1 must be 0 \(never\) or a number of steps"):
        check_layers(-1)
