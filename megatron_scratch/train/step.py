"""One optimizer step: microbatches in, gradients accumulated, one update. The numbers do not depend on how it is cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_scratch.data.loader import Loader
from megatron_scratch.parallel.collectives import all_reduce_world
from megatron_scratch.parallel.topology import Topology
from megatron_scratch.train.batches import BatchPlan
from megatron_scratch.train.passes import Passes
from megatron_scratch.train.scaler import LossScaler
from megatron_scratch.util.seeds import seed_from


@dataclass
class StepResult:
    """Tensors stay on the device until someone logs them; `loss` is this rank's part, its sum over ranks is the mean."""

    loss: torch.Tensor
    grad_norm: torch.Tensor
    lr: float
    samples: int
    stop: bool
    skipped: str = ""  # why nothing was updated


class TrainStep:
    """Callable: step number -> StepResult. Loss = sum over predicted tokens / their number in the whole global batch."""

    def __init__(
        self, passes: Passes, loader: Loader, plan: BatchPlan, topo: Topology, lr_at: Callable[[int], float],
        dropout_base: int | None, stop: Callable[[], bool], scaler: LossScaler | None = None,
    ) -> None:  # fmt: skip
        self.passes, self.loader, self.plan, self.topo = passes, loader, plan, topo
        self.lr_at, self.dropout_base, self.stop, self.scaler = lr_at, dropout_base, stop, scaler

    def __call__(self, step: int) -> StepResult:
        loss, samples, stop = self.gradients(step)
        lr = self.lr_at(step)
        if self.scaler is None:
            return StepResult(loss, self.passes.engine.step(lr), lr, samples, stop)
        norm = self.passes.engine.step(lr, self.scaler.scale)
        skipped = self.scaler.update(bool(norm.isfinite()))
        return StepResult(loss, norm.to(loss.device, non_blocking=True), lr, samples, stop, skipped)

    def gradients(self, step: int) -> tuple[torch.Tensor, int, bool]:
        """The first half of a step: forward and backward of all its microbatches. (loss, samples, whether to stop).

        Gradients are those of the loss times the scaler's scale, where there is one.
        """
        first, samples = self.plan.at(step)
        batches = list(self.loader.microbatches(first, samples))
        valid = sum(int((b.labels_BS >= 0).sum()) for b in batches) if self.topo.counts_tokens else 0
        # One small host-side message a step: the global count of predicted tokens, and whether any rank was told to stop.
        shared = all_reduce_world(torch.tensor([valid, int(self.stop())], dtype=torch.int64), self.topo)
        total = max(1, int(shared[0]))
        # A seed is a function of the samples in the microbatch: there is no generator state to save or to lose.
        base = self.dropout_base
        seeds = [None if base is None else seed_from("dropout", base, batch.first_sample) for batch in batches]
        scale = 1.0 if self.scaler is None else self.scaler.scale
        return self.passes.gradients(batches, seeds, total / scale) / scale, samples, bool(shared[1])
