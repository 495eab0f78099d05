"""How microbatches pass through the model: one after the other, or through the stages of a pipeline."""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import Protocol

import numpy as np
import torch

from megatron_scratch.data.loader import Batch
from megatron_scratch.engine import Engine, Staged
from megatron_scratch.engine.canonical import CanonicalEngine, sum_over_ranks, tree_sum
from megatron_scratch.models.linear import check_ids
from megatron_scratch.models.objective import IGNORE
from megatron_scratch.parallel.pipeline import Pipeline
from megatron_scratch.parallel.tensor import token_part
from megatron_scratch.parallel.topology import Topology
from megatron_scratch.train.heartbeat import Pulse
from megatron_scratch.train.own_time import OwnTime


class Passes(Protocol):
    """All methods are collective. Two give a scalar on the device: what this rank adds to the sum over the world."""

    engine: Engine
    pulse: Pulse

    def gradients(self, batches: list[Batch], seeds: list[int | None], divisor: float) -> torch.Tensor:
        """Forward and backward of all microbatches of a step: the sum of their losses / divisor. Gradients are whole afterwards.

        `seeds` of each one's dropout; None: no dropout.
        """

    def loss(self, batch: Batch) -> torch.Tensor:
        """Forward only: the sum of one microbatch's losses."""

    def logits(self, tokens_BS: torch.Tensor, last_B: torch.Tensor) -> torch.Tensor | None:
        """Forward only: of the token after the one at `last_B` in each row, (B, V); None on a rank without the last layer."""


def to_device(batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """tokens, labels, positions, documents as tensors of shape (B, S) on `device`."""
    rows = (batch.tokens_BS, batch.labels_BS, batch.positions_BS, batch.documents_BS)
    tokens, labels, positions, documents = (None if r is None else torch.from_numpy(r).to(device, non_blocking=True) for r in rows)
    assert tokens is not None and labels is not None
    return tokens, labels, positions, documents


class WholeModel:
    """Every rank has all layers: forward and backward of one microbatch after the other."""

    def __init__(self, engine: Engine, topo: Topology, pulse: Pulse | None = None, own: OwnTime | None = None) -> None:
        self.engine, self.topo, self.pulse = engine, topo, pulse or Pulse()
        self.forward = (own or OwnTime(topo.device)).around(engine.forward)

    def gradients(self, batches: list[Batch], seeds: list[int | None], divisor: float) -> torch.Tensor:
        parts = []
        for i, (batch, seed) in enumerate(zip(batches, seeds, strict=True)):
            with self.engine.microbatch(last=i == len(batches) - 1):
                part = self.forward(*to_device(batch, self.topo.device), seed) / divisor
                self.engine.backward(part)
            self.pulse.tick()
            parts.append(self._mine(part))
        return self._total(parts)

    def _total(self, parts: list[torch.Tensor]) -> torch.Tensor:
        return reduce(add, parts)

    def loss(self, batch: Batch) -> torch.Tensor:
        return self._mine(self.engine.forward(*to_device(batch, self.topo.device)))

    def logits(self, tokens_BS: torch.Tensor, last_B: torch.Tensor) -> torch.Tensor | None:
        return self.engine.forward(tokens_BS, None, None, None, None, None, last_B)

    def _mine(self, loss: torch.Tensor) -> torch.Tensor:
        return loss.detach() if self.topo.counts_tokens else torch.zeros_like(loss.detach())  # tp ranks have the same one


class Canonical(WholeModel):
    """The same where sums have one order at every dp: of gradients, which is the engine's, and of the loss, which is here."""

    def __init__(self, engine: CanonicalEngine, topo: Topology, pulse: Pulse | None = None, own: OwnTime | None = None) -> None:
        super().__init__(engine, topo, pulse, own)
        self.begin = engine.begin

    def gradients(self, batches: list[Batch], seeds: list[int | None], divisor: float) -> torch.Tensor:
        self.begin(len(batches))
        return super().gradients(batches, seeds, divisor)

    def _total(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """All of it on the first data-parallel rank and nothing on the others: in what order these are added cannot matter."""
        total = sum_over_ranks(tree_sum(parts), self.topo, "dp")
        return total if self.topo.index("dp") == 0 else torch.zeros_like(total)


class Stages:
    """Every rank has some layers of a pipeline."""

    def __init__(self, pipeline: Pipeline, engine: Staged, topo: Topology, vocab_size: int, pulse: Pulse | None = None) -> None:
        self.pipeline, self.engine, self.topo, self.vocab_size, self.pulse = pipeline, engine, topo, vocab_size, pulse or Pulse()

    def gradients(self, batches: list[Batch], seeds: list[int | None], divisor: float) -> torch.Tensor:
        batch = self._tensors(batches)
        if seeds[0] is not None:
            batch["seed"] = torch.tensor(seeds)
        loss = self.pipeline.gradients(batch, batch["labels_BS"], len(batches), divisor)
        self.engine.finish_gradients()
        return loss if self.topo.index("tp") == 0 else torch.zeros_like(loss)

    def loss(self, batch: Batch) -> torch.Tensor:
        loss = self.pipeline.forward(self._tensors([batch]))
        return loss if self.topo.index("tp") == 0 else torch.zeros_like(loss)

    def logits(self, tokens_BS: torch.Tensor, last_B: torch.Tensor) -> torch.Tensor | None:
        part = token_part(tokens_BS.numel(), self.topo)
        shape = (part.stop - part.start, self.pipeline.plan.shape[1])
        out = self.pipeline.forward({"tokens_BS": tokens_BS, "last_B": last_B}, shape)
        return out if self.pipeline.has_loss else None

    def _tensors(self, batches: list[Batch]) -> dict[str, torch.Tensor]:
        """The microbatches one below the other, by the names of the model's arguments."""
        rows = zip(*((b.tokens_BS, b.labels_BS, b.positions_BS, b.documents_BS) for b in batches), strict=True)
        names = ("tokens_BS", "labels_BS", "positions_BS", "documents_BS")
        given = {name: parts for name, parts in zip(names, rows, strict=True) if parts[0] is not None}
        batch = {n: torch.from_numpy(np.concatenate(parts)).to(self.topo.device, non_blocking=True) for n, parts in given.items()}
        # Here, by all ranks at once: the rank of a middle stage would wait for one that has raised an error.
        check_ids(batch["tokens_BS"], self.vocab_size, "token id")
        check_ids(batch["labels_BS"], self.vocab_size, "label", IGNORE)
        return batch
