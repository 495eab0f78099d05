"""The `fault` section: what a run does about numbers that are not finite, loss spikes, replicas that drift apart, ranks
that hang or are slow. See docs/faults.md."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from megatron_scratch.util.errors import UserError, choice

NONFINITE = ("stop", "skip")
SPIKE = ("log", "skip", "rollback")
LEAST_TIMEOUT, MOST_TIMEOUT = 1.0, 86400.0  # seconds
SHARED_FORWARD = ("fsdp", "zero3")  # engines in whose forward all data-parallel ranks wait for each other


@dataclass
class FaultConfig:
    """A spike is a loss above mean + sigma x standard deviation of the last `window` accepted ones."""

    nonfinite: str = "stop"  # loss or gradient norm: stop: end the run, nothing is applied | skip: go on without the update
    spike: str = "log"  # log: apply the update all the same | skip: do not | rollback: to the newest checkpoint, past these samples
    sigma: float = 6.0
    window: int = 128  # accepted losses
    warmup: int = 32  # accepted losses before the first is judged: those of the first steps fall by themselves
    max_skips: int = 10  # of nonfinite=skip and spike=skip, in a row; one more ends the run
    max_rollbacks: int = 3  # of a run; one more ends it
    replica_check_every: int = 0  # steps after which ranks that hold copies compare them; 0: only before each checkpoint
    hang_timeout: float = 600.0  # seconds without any progress, after which the run ends and says who holds it up; 0: never
    straggler: float = 1.5  # a rank whose forward pass takes so many times the median's is named; 0: none is


def check_fault(f: FaultConfig, steps: int, save_every: int) -> None:
    """Refuse what cannot be, and what cannot take effect. `steps` of the run, `save_every`: checkpoint.every."""
    choice("fault.nonfinite", f.nonfinite, NONFINITE)
    choice("fault.spike", f.spike, SPIKE)
    if not 0 < f.sigma < math.inf:
        raise UserError(f"fault.sigma={f.sigma} must be above 0 and finite; OLMo's is 6")
    if not 2 <= f.warmup <= f.window:
        raise UserError(f"fault.warmup={f.warmup} must be between 2, as one loss has no deviation, and fault.window={f.window}")
    for key, least in (("max_skips", 1), ("max_rollbacks", 1), ("replica_check_every", 0)):
        if getattr(f, key) < least:
            raise UserError(f"fault.{key}={getattr(f, key)} must be at least {least}")
    if f.hang_timeout != 0 and not LEAST_TIMEOUT <= f.hang_timeout <= MOST_TIMEOUT:
        raise UserError(f"fault.hang_timeout={f.hang_timeout:g} must be 0 (no verdict), or seconds between {LEAST_TIMEOUT:g} and "
                        f"{MOST_TIMEOUT:g} (a day)")  # fmt: skip
    if f.straggler != 0 and not 1 < f.straggler < math.inf:
        raise UserError(f"fault.straggler={f.straggler:g} must be 0 (nobody is named), or above 1: a multiple of the median")
    _check_effects(f, steps, save_every)


def _check_effects(f: FaultConfig, steps: int, save_every: int) -> None:
    default = {field.name: field.default for field in fields(f)}
    if f.max_skips != default["max_skips"] and "skip" not in (f.nonfinite, f.spike):
        raise UserError(f"fault.max_skips={f.max_skips} has no effect where nothing is skipped; give fault.nonfinite=skip or "
                        "fault.spike=skip, or leave it out")  # fmt: skip
    if f.max_rollbacks != default["max_rollbacks"] and f.spike != "rollback":
        raise UserError(f"fault.max_rollbacks={f.max_rollbacks} has no effect with fault.spike={f.spike}; give "
                        "fault.spike=rollback, or leave it out")  # fmt: skip
    if f.spike != default["spike"] and f.warmup >= steps:
        raise UserError(f"fault.spike={f.spike} has no effect in train.steps={steps}, as the first fault.warmup={f.warmup} losses "
                        "are not judged; give fewer, or leave it out")  # fmt: skip
    if f.spike == "rollback" and save_every == 0:
        raise UserError("fault.spike=rollback with checkpoint.every=0: there would be no checkpoint to go back to; give "
                        "checkpoint.every=N")  # fmt: skip


def check_replicas(f: FaultConfig, engine: str, dp: int) -> None:
    """Refuse comparisons where there is nothing to compare. `dp`: data-parallel ranks."""
    copies = dp if engine == "ddp" else 2 if engine == "hsdp" else 1  # hsdp has at least two by its own check
    if f.replica_check_every and copies == 1:
        why = f"on {dp} data-parallel rank" if engine == "ddp" else f"with engine={engine}, which cuts all that it keeps"
        raise UserError(f"fault.replica_check_every={f.replica_check_every} has no effect {why}: there are no copies to compare; "
                        "leave it out, or use engine=ddp or hsdp over several ranks")  # fmt: skip
    if f.straggler not in (0, FaultConfig.straggler) and not comparable(f, engine, dp):
        raise UserError(f"fault.straggler={f.straggler:g} has no effect with engine={engine} on {dp} data-parallel rank"
                        f"{'s' * (dp > 1)}: no two do the same forward pass apart from each other; leave it out")  # fmt: skip


def comparable(f: FaultConfig, engine: str, dp: int) -> bool:
    """Whether slow ranks can be told from others: some do the same work in forward, without messages to each other."""
    return f.straggler > 0 and dp > 1 and engine not in SHARED_FORWARD
