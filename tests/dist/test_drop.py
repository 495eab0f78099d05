"""A step that is dropped, and a state that is gone back to, leave no trace in any engine: bitwise."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_scratch.config import Config, check, compose
from megatron_scratch.data.made_up import MadeUpSamples
from megatron_scratch.engine import Engine
from megatron_scratch.engine.zero import import_deepspeed
from megatron_scratch.parallel.layout import full, local
from megatron_scratch.parallel.pieces import Pieces
from megatron_scratch.train import build, forked
from megatron_scratch.train.batches import BatchPlan
from megatron_scratch.train.guard import Verdict
from megatron_scratch.train.step import TrainStep
from megatron_scratch.util.env import Rank

SMALL = ["model=llama_tiny", "model.num_layers=2", "model.hidden_size=32", "model.num_kv_heads=2", "model.ffn_size=64",
         "model.vocab_size=60", "model.max_seq_len=16", "model.dropout=0.1", "train.seq_len=16", "train.global_batch_size=8",
         "train.micro_batch_size=1", "optim.clip_grad_norm=0.5"]  # fmt: skip
BF16, OFFLOAD = "precision=bf16", "engine.offload_optimizer=true"
LAYOUTS = {
    "one": (1, []), "ddp": (2, []), "muon": (1, ["optim=muon"]), "fsdp": (2, ["engine=fsdp"]), "tp": (2, ["parallel.tp=2"]),
    "hsdp": (4, ["engine=hsdp", "engine.replicas=2"]), "fsdp x tp, bf16": (4, ["engine=fsdp", "parallel.tp=2", BF16]),
    "pp, bf16": (2, ["parallel.pp=2", BF16]), "zbv": (2, ["parallel.pp=2", "parallel.schedule=zbv_zero_bubble", "engine=fsdp",
                                                         "model.num_layers=4", "model.tie_embeddings=true"]),
    "zero1": (2, ["engine=zero1"]), "zero1, bf16": (2, ["engine=zero1", BF16]), "zero1, offload": (2, ["engine=zero1", OFFLOAD]),
    "zero2": (2, ["engine=zero2"]), "zero2 x tp, bf16": (4, ["engine=zero2", BF16, "parallel.tp=2"]),
    "zero2, bf16, offload": (2, ["engine=zero2", BF16, OFFLOAD]), "zero3": (2, ["engine=zero3"]),
    "zero3, bf16, nothing whole": (2, ["engine=zero3", BF16, "engine.persist=0"]),
    "zero3, offload": (2, ["engine=zero3", OFFLOAD, "engine.offload_param=true"]),
}  # fmt: skip
State = dict[str, Any]


def parts(state: State) -> dict[str, torch.Tensor]:
    """This rank's memory behind a state, by name and place."""
    views = {name: t.views if isinstance(t, Pieces) else {"": local(t)} for name, t in state.items()}
    return {f"{name} {place}": view for name, places in views.items() for place, view in places.items()}


def digests(engine: Engine) -> dict[str, str]:
    return {name: hashlib.sha256(full(t).numpy().tobytes()).hexdigest() for name, t in engine.state().items()}


def restore(engine: Engine, shapes: Any, saved: dict[str, torch.Tensor]) -> None:
    def fill(state: State) -> None:
        live = parts(state)
        assert set(live) == set(saved)
        for name, tensor in live.items():
            tensor.copy_(saved[name])

    engine.load(shapes, fill)


def runner(rank: Rank, cfg: Config) -> tuple[Engine, Callable[[int, bool], None]]:
    """An engine, and what takes a step: its number (of data and dropout), and whether it is applied."""
    topo = build.topology(cfg, rank, torch.device("cpu"))
    _, engine = build.build_engine(cfg, topo)
    loader = build.loader(cfg, MadeUpSamples(60, 16, 0), topo)
    step = TrainStep(build.build_passes(cfg, engine, topo), loader, BatchPlan(cfg.train), topo, lambda _: 1e-2, 5, lambda: False)

    def take(number: int, applied: bool = True) -> None:
        step.guard.judge = lambda loss, norm: Verdict() if applied else Verdict("skip", "told to")  # type: ignore[method-assign]
        result = step(number)
        assert bool(result.skipped) != applied
        assert not [name for name in engine.state() if name.startswith("grad.")]

    return engine, take


def _plain(rank: Rank, cfg: Config) -> list[dict[str, str]]:
    engine, take = runner(rank, cfg)
    found = []
    for number in (0, 2):
        take(number)
        found.append(digests(engine))
    return found


def _eventful(rank: Rank, cfg: Config) -> list[dict[str, str]]:
    """The same two steps among others that are dropped, or gone back from."""
    engine, take = runner(rank, cfg)
    fresh = {name: (tuple(t.shape), t.dtype) for name, t in engine.state().items()}
    born = {name: t.clone() for name, t in parts(engine.state()).items()}
    take(1, False)
    take(3)
    restore(engine, fresh, born)  # to where there was no optimizer state
    take(0)
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in engine.state().items()}
    kept = {name: t.clone() for name, t in parts(engine.state()).items()}
    found = [digests(engine)]
    take(1, False)
    take(2)
    found.append(digests(engine))
    take(4)
    take(5, False)
    restore(engine, shapes, kept)
    take(2)
    return [*found, digests(engine)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_trace(layout: str) -> None:
    world, words = LAYOUTS[layout]
    if any("zero" in word for word in words):
        pytest.importorskip("deepspeed")
        import_deepspeed("zero1", torch.device("cpu"))
    cfg = compose.load([*SMALL, *words])
    check(cfg, world)
    for (first, second), eventful in zip(
        forked.run_ranks(world, _plain, cfg, detail=False), forked.run_ranks(world, _eventful, cfg, detail=False), strict=True
    ):
        assert first != second
        for want, got in zip((first, second, second), eventful, strict=True):
            assert want == got, {name for name in want if want[name] != got.get(name)}
