"""The learning rate over steps: pure functions (cfg, step, total_steps) -> multiple of `optim.lr`.

`step` counts updates from 0. Warm-up over W steps is linear and follows nanoGPT: (step + 1) / (W + 1), so that the first
update is not lost on a rate of 0 and step W is the first at the full rate. Then each schedule falls from 1 to `min_lr_ratio`;
it would reach the floor at step = total, one after the last update, and stays there for any later step.
"""

from __future__ import annotations

import math

from megatron_scratch import registry
from megatron_scratch.config.optim import DecayConfig, FloorConfig, ScheduleConfig, WSDConfig, schedule_steps


def lr_at(cfg: ScheduleConfig, step: int, total_steps: int) -> float:
    """Multiple of `optim.lr` for update `step` of a run of `total_steps`; `cfg.steps`, where given, stands in for the latter."""
    return float(registry.get("schedule", cfg.name)(cfg, step, schedule_steps(cfg, total_steps)))


def warmup(cfg: ScheduleConfig, step: int) -> float:
    """In (0, 1], 1 from step `warmup_steps` on."""
    return min(1.0, (step + 1) / (cfg.warmup_steps + 1))


def progress(first: float, step: int, last: float) -> float:
    """How far `step` is from `first` to `last`, in [0, 1]; 1 at and after `last`."""
    return min(1.0, max(0.0, (step - first) / (last - first))) if last > first else float(step >= last)


def _fall(cfg: FloorConfig, step: int, shape: float) -> float:
    """Warm-up, then `min_lr_ratio` + (1 - `min_lr_ratio`) x shape."""
    return warmup(cfg, step) if step < cfg.warmup_steps else cfg.min_lr_ratio + (1.0 - cfg.min_lr_ratio) * shape


def constant(cfg: ScheduleConfig, step: int, total_steps: int) -> float:
    """1 after the warm-up."""
    return warmup(cfg, step)


def linear(cfg: DecayConfig, step: int, total_steps: int) -> float:
    """A straight line down to the floor."""
    return _fall(cfg, step, 1.0 - progress(cfg.warmup_steps, step, total_steps))


def cosine(cfg: DecayConfig, step: int, total_steps: int) -> float:
    """Half a cosine down to the floor (Loshchilov & Hutter, arXiv 1608.03983)."""
    return _fall(cfg, step, 0.5 * (1.0 + math.cos(math.pi * progress(cfg.warmup_steps, step, total_steps))))


def inverse_sqrt(cfg: FloorConfig, step: int, total_steps: int) -> float:
    """sqrt((W + 1) / (step + 1)) after the warm-up (arXiv 1706.03762, 5.3), not below the floor. It has no end."""
    return max(cfg.min_lr_ratio, math.sqrt((cfg.warmup_steps + 1) / (step + 1))) if step > cfg.warmup_steps else warmup(cfg, step)


_DECAYS = {
    "linear": lambda x: 1.0 - x,
    "sqrt": lambda x: 1.0 - math.sqrt(x),
    "cosine": lambda x: 0.5 * (1.0 + math.cos(math.pi * x)),
}


def wsd(cfg: WSDConfig, step: int, total_steps: int) -> float:
    """Constant, then down to the floor over the last `decay_ratio` of the steps; a decay may not begin inside the warm-up."""
    begin = max(float(cfg.warmup_steps), total_steps - cfg.decay_ratio * total_steps)
    return _fall(cfg, step, _DECAYS[cfg.decay](progress(begin, step, total_steps)))
