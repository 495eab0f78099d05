"""Dynamic loss scaling (Micikevicius et al., arXiv 1710.03740): what keeps the small gradients of fp16 from becoming 0.

fp16 has no number between 0 and 6e-8, and none above 65504. The loss is multiplied by a scale before backward, so every gradient
is; the engine divides them by it, in fp32. Where one of them has overflowed their norm is not finite: nothing is updated, on any
rank, and the scale backs off. After a row of good steps it grows. The norm is one number over all axes, so all ranks come to the
same scale without a message of their own.
"""

from __future__ import annotations

from typing import Any

from megatron_scratch.config.precision import PrecisionConfig, takes
from megatron_scratch.util.errors import RunFailed


class LossScaler:
    """The scale, and the number of good steps under it: the whole state."""

    def __init__(self, cfg: PrecisionConfig) -> None:
        self.cfg, self.scale, self.good = cfg, cfg.scale, 0
        self.stuck = False  # a step overflowed under the smallest scale: so would all that follow

    def update(self, finite: bool) -> str:
        """After a step whose gradient norm was `finite`, or not. Returns why it was skipped, or an empty string."""
        if finite:
            self.good += 1
            if self.good >= self.cfg.growth_interval:
                self.scale, self.good = self.scale * self.cfg.growth, 0
            return ""
        was = self.scale
        self.scale, self.good, self.stuck = max(was * self.cfg.backoff, self.cfg.min_scale), 0, was <= self.cfg.min_scale
        return f"gradients overflowed under the loss scale {was:g}, " + (
            "the smallest one" if self.stuck else f"it is {self.scale:g} now"
        )

    def refuse_to_go_on(self, step: int) -> None:
        """
        Raises:
            RunFailed: the step overflowed under the smallest scale.
        """
        if self.stuck:
            raise RunFailed(f"step {step}: gradients overflow under precision.min_scale={self.cfg.min_scale:g} too: the run has "
                            "diverged, or the model does not fit into fp16; lower optim.lr, or use precision=bf16")  # fmt: skip

    def state(self) -> dict[str, Any]:
        """JSON for a checkpoint."""
        return {"scale": self.scale, "good": self.good}

    def load(self, state: dict[str, Any]) -> None:
        self.scale, self.good = float(state["scale"]), int(state["good"])


def loss_scaler(cfg: PrecisionConfig) -> LossScaler | None:
    """The scaler of a precision that needs one."""
    return LossScaler(cfg) if takes(cfg, "scale") else None
