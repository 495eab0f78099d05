"""`train.profile`: a few steps of a run, looked at closely."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from megatron_scratch.util.errors import UserError

MOST_STEPS = 100  # a trace holds every operator: 1.7 MB of JSON a step with 4 layers and 2 microbatches, read again to be summed up


@dataclass
class ProfileConfig:
    """Steps are counted as metrics.jsonl counts them: the first one is step 1."""

    steps: Optional[list[int]] = None  # [first, last], both profiled; None: no profile
    ranks: Optional[list[int]] = field(default_factory=lambda: [0])  # who is profiled; None: all
    memory: bool = False  # also what memory is held over these steps


def check_profile(p: ProfileConfig, steps: int, world: int) -> None:
    """Refuse a window that is not inside the run, ranks that are not there, and options without a window."""
    if p.steps is None:
        for key, given in (("ranks", p.ranks), ("memory", p.memory)):
            if given != getattr(ProfileConfig(), key):
                raise UserError(f"train.profile.{key}={given} has no effect without train.profile.steps=[FIRST,LAST]; give them")
        return
    if len(p.steps) != 2 or not 1 <= p.steps[0] <= p.steps[1] <= steps:
        raise UserError(f"train.profile.steps={p.steps} must be [FIRST,LAST] with 1 <= FIRST <= LAST <= train.steps={steps}")
    if (count := p.steps[1] - p.steps[0] + 1) > MOST_STEPS:
        raise UserError(f"train.profile.steps={p.steps} are {count} steps, and a trace holds every operator of them; "
                        f"allowed: up to {MOST_STEPS}, of which 3 usually say it all")  # fmt: skip
    if p.ranks is not None and (not p.ranks or len(set(p.ranks)) < len(p.ranks) or not all(0 <= r < world for r in p.ranks)):
        raise UserError(f"train.profile.ranks={p.ranks} must be different ranks from 0 to {world - 1}, or null for all of them")
