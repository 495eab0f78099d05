"""What goes wrong inside a run, put into forked ranks: numbers that are not, batches that are garbage, bits that flip.

Each of these is a function of a rank for `runs.run(arm=...)`; steps are counted from 1, in this process.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from megatron_scratch.data.loader import Batch, Loader
from megatron_scratch.engine.torch_engine import TorchEngine
from megatron_scratch.engine.zero import ZeroEngine
from megatron_scratch.parallel.layout import local
from megatron_scratch.parallel.pieces import Pieces
from megatron_scratch.train import passes
from megatron_scratch.train.step import TrainStep
from megatron_scratch.util.env import Rank

Arm = Callable[[Rank], None]
ENGINES = (TorchEngine, ZeroEngine)


def both(*arms: Arm) -> Arm:
    def arm(rank: Rank) -> None:
        for each in arms:
            each(rank)

    return arm


def around(owner: type, name: str, at: dict[int, Callable[[Any, Any], Any]], before: bool = False) -> None:
    """In the n-th call of a method, `at[n](self, result)` gives what it returns; or, `before`, is called first with None."""
    whole, count = getattr(owner, name), [0]

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        change = at.get(count[0])
        if change and before:
            change(self, None)
        result = whole(self, *args, **kwargs)
        return change(self, result) if change and not before else result

    setattr(owner, name, call)


def loss(on: int, *steps: int, value: float = float("nan")) -> Arm:
    """The loss of one rank in these steps; its gradients are in order."""

    def arm(rank: Rank) -> None:
        if rank.rank == on:
            for kind in (passes.WholeModel, passes.Stages):
                around(kind, "gradients", dict.fromkeys(steps, lambda self, part: part + value))

    return arm


def gradient(on: int, *steps: int, value: float = float("nan")) -> Arm:
    """One number of one rank's gradients in these steps, after all sums have been taken."""

    def spoil(engine: Any, _: None) -> None:
        held = engine.owned.gradients() if isinstance(engine, ZeroEngine) else engine._gradients()
        name = next(name for name in held if "mlp" in name and held[name].numel())
        local(held[name]).view(-1)[0] = value

    def arm(rank: Rank) -> None:
        if rank.rank == on:
            for engine in ENGINES:
                around(engine, "norm", dict.fromkeys(steps, spoil), before=True)

    return arm


def garbage(*firsts: int, size: int = 8) -> Arm:
    """Steps whose first sample is one of these train on random tokens: on every rank, and in every start of the run."""

    def spoil(batch: Batch) -> Batch:
        rng = np.random.default_rng(batch.first_sample)
        tokens, labels = (rng.integers(0, 256, batch.tokens_BS.shape) for _ in range(2))
        return replace(batch, tokens_BS=tokens, labels_BS=labels)

    def arm(rank: Rank) -> None:
        whole = Loader.batch

        def batch(self: Loader, first: int) -> Batch:
            found = whole(self, first)
            return spoil(found) if any(f <= first < f + size for f in firsts) else found

        Loader.batch = batch  # type: ignore[method-assign]

    return arm


def flip(on: int, step: int, name: str, byte: int = 3, bit: int = 7) -> Arm:
    """One bit of one rank's tensor, after the update of a step."""

    def spoil(engine: Any, result: Any) -> Any:
        content = local(engine.state()[name]).view(-1).view(torch.uint8)
        content[byte] ^= 1 << bit
        return result

    def arm(rank: Rank) -> None:
        if rank.rank == on:
            around(TorchEngine, "update", {step: spoil})

    return arm


def overflow(on: int, step: int, name: str) -> Arm:
    """An update that comes to infinity in one number, of one rank."""

    def spoil(engine: Any, result: Any) -> Any:
        held = engine.state()[name]
        part = next(iter(held.views.values())) if isinstance(held, Pieces) else local(held)
        part.view(-1)[0] = torch.inf
        return result

    def arm(rank: Rank) -> None:
        if rank.rank == on:
            for engine in ENGINES:
                around(engine, "update", {step: spoil})

    return arm


def kill(on: int, owner: type, name: str, call: int) -> Arm:
    """SIGKILL before the n-th call of a method."""

    def arm(rank: Rank) -> None:
        if rank.rank == on:
            around(owner, name, {call: lambda *_: os.kill(os.getpid(), signal.SIGKILL)}, before=True)

    return arm


def kill_in_step(on: int, call: int) -> Arm:
    """The n-th step of this start: counted with those that are taken again."""
    return kill(on, TrainStep, "gradients", call)
