"""One optimizer step: microbatches in, gradients accumulated, one update. The numbers do not depend on how it is cut."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_scratch.config.fault import FaultConfig
from megatron_scratch.data.loader import Loader
from megatron_scratch.parallel.collectives import all_reduce_world
from megatron_scratch.parallel.topology import Topology
from megatron_scratch.train.batches import BatchPlan
from megatron_scratch.train.fault import SAVE, STOP, told
from megatron_scratch.train.guard import Guard, Verdict
from megatron_scratch.train.passes import Passes
from megatron_scratch.util.seeds import seed_from


@dataclass
class StepResult:
    """What a step came to: the same on every rank, to the last bit."""

    loss: float  # mean over the predicted tokens of the global batch, in nats
    grad_norm: float  # of the whole gradient, before clipping
    lr: float
    samples: int
    stop: bool  # a rank was told to stop
    done: int  # steps done after this one
    verdict: Verdict = Verdict()
    save: bool = False  # a rank was told to save a checkpoint now
    score: float | None = None  # of the loss: standard deviations above the mean of the last accepted ones
    scale: float | None = None  # that the loss was multiplied by before backward, where there is a loss scaler

    @property
    def skipped(self) -> str:
        """Why nothing was updated, or an empty string."""
        return "" if self.verdict.applied else self.verdict.reason


class TrainStep:
    """Callable: step number -> StepResult. Loss = sum over predicted tokens / their number in the whole global batch."""

    def __init__(
        self, passes: Passes, loader: Loader, plan: BatchPlan, topo: Topology, lr_at: Callable[[int], float],
        dropout_base: int | None, asked: Callable[[], int], guard: Guard | None = None,
        before_update: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """
        Args:
            asked: what this rank was asked for: `fault.STOP` + `fault.SAVE`, or 0.
            guard: None: the usual one, of a precision that needs no loss scaler.
            before_update: returns when weights and optimizer state may change, e.g. once a copy of them has been taken.
        """
        self.before_update = before_update
        self.passes, self.loader, self.plan, self.topo = passes, loader, plan, topo
        self.lr_at, self.dropout_base, self.asked, self.guard = lr_at, dropout_base, asked, guard or Guard(FaultConfig())

    def __call__(self, step: int) -> StepResult:
        pulse = self.passes.pulse
        pulse.step = step
        part, samples, asked = self.gradients(step)
        engine, lr = self.passes.engine, self.lr_at(step)
        pulse.enter("reduce")
        scale = self.guard.scale
        device_norm = engine.norm(scale)
        loss, norm = shared_numbers(part, device_norm, self.topo)
        score, verdict = self.guard.score(loss), self.guard.judge(loss, norm)
        pulse.enter("update")
        if verdict.applied:
            self.before_update()
            engine.update(lr, device_norm)
        else:
            engine.drop()
        pulse.enter("hooks")
        pulse.step = step + 1
        return StepResult(loss, norm, lr, samples, told(asked, STOP), step + 1, verdict, told(asked, SAVE), score, scale)

    def gradients(self, step: int) -> tuple[torch.Tensor, int, int]:
        """The first half of a step: forward and backward of all its microbatches. (loss, samples, what the ranks were asked for).

        Gradients are those of the loss times the scaler's scale, where there is one. The loss is this rank's part, on the device.
        """
        self.passes.pulse.enter("data")
        first, samples = self.plan.at(step)
        batches = list(self.loader.microbatches(first, samples))
        valid = sum(int((b.labels_BS >= 0).sum()) for b in batches) if self.topo.counts_tokens else 0
        # One small host-side message a step: the global count of predicted tokens, and what any rank was told: to stop, to save.
        shared = all_reduce_world(torch.tensor([valid, int(self.asked())], dtype=torch.int64), self.topo)
        total = max(1, int(shared[0]))
        # A seed is a function of the samples in the microbatch: there is no generator state to save or to lose.
        base = self.dropout_base
        seeds = [None if base is None else seed_from("dropout", base, batch.first_sample) for batch in batches]
        scale = self.guard.scale or 1.0
        self.passes.pulse.enter("forward/backward")
        return self.passes.gradients(batches, seeds, total / scale) / scale, samples, int(shared[1])


def shared_numbers(part: torch.Tensor, norm: torch.Tensor, topo: Topology) -> tuple[float, float]:
    """(loss, gradient norm) of a step as numbers with the same bits on every rank; collective.

    `part` is this rank's part of the loss. A norm is one number over all axes; should it not be finite on any rank, it is NaN on
    all: one rank that has other numbers than the others must not be the only one that does not update.

    This is the one place where the host waits for the device, once a step and before the update: a number that nobody has looked
    at may already be in the weights of some ranks when it is found. The next step's forward is not in the queue meanwhile. A second
    small message goes over the host; the first one (`gradients`) cannot carry what backward has not computed yet.
    """
    mine, local_norm = torch.stack([part.float(), norm.float().to(part.device)]).tolist()
    main = local_norm if topo.is_main else 0.0
    # Parts have 24 bits: float64 adds them up exactly, in any order, where none but zeros is below 2^-28 of the sum.
    row = torch.tensor([mine, main, float(not math.isfinite(local_norm))], dtype=torch.float64)
    loss, shared, astray = all_reduce_world(row, topo).tolist()
    return loss, math.nan if astray and math.isfinite(shared) else shared
