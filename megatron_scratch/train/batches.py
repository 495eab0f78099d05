"""Which samples a step consumes: a pure function of the step, so that the data position is one integer."""

from __future__ import annotations

import bisect

from megatron_scratch.config.train import TrainConfig


class BatchPlan:
    """Batch size and first sample of each step, with the ramp of `train.ramp`.

    While ramping, the size is `start + increment * floor(consumed / (samples / increments))`, as in Megatron; each change
    happens between steps, so the plan is a short list of (first step, first sample, size) segments.
    """

    def __init__(self, cfg: TrainConfig) -> None:
        self.shift = 0
        self.segments: list[tuple[int, int, int]] = []
        step = consumed = 0
        ramp, final = cfg.ramp, cfg.global_batch_size
        size = final if ramp.start is None else ramp.start
        increments = (final - size) // ramp.increment
        while size < final:
            self.segments.append((step, consumed, size))
            level = (size - (ramp.start or 0)) // ramp.increment
            until = -(-ramp.samples * (level + 1) // increments)  # samples after which the next size begins
            steps = max(0, -(-(until - consumed) // size))
            step, consumed, size = step + steps, consumed + steps * size, size + ramp.increment
        self.segments.append((step, consumed, final))

    def at(self, step: int) -> tuple[int, int]:
        """(first sample, number of samples) of a step counted from 0."""
        first_step, consumed, size = self.segments[bisect.bisect_right(self.segments, (step, float("inf"))) - 1]
        return consumed + (step - first_step) * size + self.shift, size

    def consumed(self, steps: int) -> int:
        """Samples consumed by the first `steps` steps."""
        return self.at(steps)[0]

    def rebase(self, step: int, consumed: int) -> None:
        """Go on after sample `consumed` at `step`: where batch sizes were changed between runs, no sample is lost or seen twice."""
        self.shift += consumed - self.consumed(step)
