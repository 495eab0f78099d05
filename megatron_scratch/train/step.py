"""One optimizer step: microbatches in, gradients accumulated, one update. The numbers do not depend on how it is cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_scratch.data.loader import Batch, Loader
from megatron_scratch.engine import Engine
from megatron_scratch.parallel.collectives import all_reduce_world
from megatron_scratch.parallel.topology import Topology
from megatron_scratch.train.batches import BatchPlan
from megatron_scratch.util.seeds import seed_from


@dataclass
class StepResult:
    """Tensors stay on the device until someone logs them; `loss` is this rank's part, its sum over ranks is the mean."""

    loss: torch.Tensor
    grad_norm: torch.Tensor
    lr: float
    samples: int
    stop: bool


def to_device(batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """tokens, labels, positions, documents as tensors of shape (B, S) on `device`."""
    rows = (batch.tokens_BS, batch.labels_BS, batch.positions_BS, batch.documents_BS)
    tokens, labels, positions, documents = (None if r is None else torch.from_numpy(r).to(device, non_blocking=True) for r in rows)
    assert tokens is not None and labels is not None
    return tokens, labels, positions, documents


class TrainStep:
    """Callable: step number -> StepResult. Loss = sum over predicted tokens / their number in the whole global batch."""

    def __init__(
        self, engine: Engine, loader: Loader, plan: BatchPlan, topo: Topology, lr_at: Callable[[int], float],
        dropout_base: int | None, stop: Callable[[], bool],
    ) -> None:  # fmt: skip
        self.engine, self.loader, self.plan, self.topo = engine, loader, plan, topo
        self.lr_at, self.dropout_base, self.stop = lr_at, dropout_base, stop

    def __call__(self, step: int) -> StepResult:
        loss, samples, stop = self.gradients(step)
        lr = self.lr_at(step)
        return StepResult(loss, self.engine.step(lr), lr, samples, stop)

    def gradients(self, step: int) -> tuple[torch.Tensor, int, bool]:
        """The first half of a step: forward and backward of all its microbatches. (loss, samples, whether to stop)."""
        first, samples = self.plan.at(step)
        batches = list(self.loader.microbatches(first, samples))
        valid = sum(int((b.labels_BS >= 0).sum()) for b in batches) if self.topo.counts_tokens else 0
        # One small host-side message a step: the global count of predicted tokens, and whether any rank was told to stop.
        shared = all_reduce_world(torch.tensor([valid, int(self.stop())], dtype=torch.int64), self.topo)
        total = max(1, int(shared[0]))
        loss = torch.zeros((), device=self.topo.device)
        for i, batch in enumerate(batches):
            # A function of the samples in the microbatch: there is no generator state to save or to lose.
            seed = None if self.dropout_base is None else seed_from("dropout", self.dropout_base, batch.first_sample)
            with self.engine.microbatch(last=i == len(batches) - 1):
                part = self.engine.forward(*to_device(batch, self.topo.device), seed) / total
                self.engine.backward(part)
            if self.topo.counts_tokens:  # tp ranks have the same loss
                loss = loss + part.detach()
        return loss, samples, bool(shared[1])
