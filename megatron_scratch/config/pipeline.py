"""The pipeline's part of the `parallel` section: schedules, how stages lie on ranks, and what fits together.

A model of L layers is cut into S stages; p pipeline ranks hold v = S / p stages each. In a loop, rank r holds stages r, r + p,
r + 2p, ...; in a V, two of them, r and 2p - 1 - r, so that rank 0 has the first and the last. m microbatches pass in a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_scratch import registry
from megatron_scratch.util.errors import UserError, choice

if TYPE_CHECKING:
    from megatron_scratch.config.train import ParallelConfig


@dataclass(frozen=True)
class PipelineSchedule:
    """One order of the forward and backward passes of a step's microbatches."""

    torch_name: str  # the class of torch.distributed.pipelining.schedules that computes and runs it
    virtual: tuple[int, int | None]  # fewest and most stages of a rank; None: any number
    default: int  # of them
    v_shaped: bool = False
    splits: bool = False  # backward in two parts: input gradients at once, weight gradients where the rank would be idle
    fill: int = 0  # at least fill x p microbatches
    rounds: bool = False  # microbatches go in m // p equal rounds


GPIPE = PipelineSchedule("ScheduleGPipe", (1, 1), 1)
ONE_F_ONE_B = PipelineSchedule("Schedule1F1B", (1, 1), 1, fill=1)
INTERLEAVED = PipelineSchedule("ScheduleInterleaved1F1B", (2, None), 2, fill=1, rounds=True)
INTERLEAVED_ZERO_BUBBLE = PipelineSchedule(
    "ScheduleInterleavedZeroBubble", (1, None), 2, splits=True, fill=1, rounds=True
)  # fmt: skip
ZBV = PipelineSchedule("ScheduleZBVZeroBubble", (2, 2), 2, v_shaped=True, splits=True)
DUALPIPEV = PipelineSchedule("ScheduleDualPipeV", (2, 2), 2, v_shaped=True, splits=True, fill=2)


def schedule_of(p: ParallelConfig) -> PipelineSchedule:
    return registry.get("pipeline", p.schedule)  # type: ignore[return-value]


def virtual_stages(p: ParallelConfig) -> int:
    """Stages on each pipeline rank."""
    return p.virtual_stages or (schedule_of(p).default if p.pp > 1 else 1)


def owned_stages(schedule: PipelineSchedule, pp: int, virtual: int, rank: int) -> list[int]:
    """The stages of a pipeline rank, in order."""
    return [rank, 2 * pp - 1 - rank] if schedule.v_shaped else [rank + i * pp for i in range(virtual)]


def owner(schedule: PipelineSchedule, pp: int, virtual: int, stage: int) -> int:
    """The pipeline rank that has a stage."""
    return next(rank for rank in range(pp) if stage in owned_stages(schedule, pp, virtual, rank))


def balance(layers: int, stages: int, layer: float, before: float, after: float) -> tuple[int, ...]:
    """Layers of each stage, at least one, so that the most expensive stage costs least, and the others then differ least.

    Args:
        layer: cost of one layer; `before`: of what the first stage does besides (embedding); `after`: the last (head, loss).
    """
    extra = [before] + [0.0] * (stages - 1)
    extra[-1] += after
    costs = [[n * layer + e for n in range(layers + 1)] for e in extra]

    def least(limit: float) -> list[dict[int, tuple[float, float, int]]]:
        """table[s][n]: (largest, sum of squares, layers of stage s) where stages 0 to s have n layers, none above the limit."""
        table: list[dict[int, tuple[float, float, int]]] = []
        for s in range(stages):
            row: dict[int, tuple[float, float, int]] = {}
            for n in range(s + 1, layers - (stages - 1 - s) + 1):
                for mine in range(1, n - s + 1) if s else (n,):
                    peak, squares = (0.0, 0.0) if s == 0 else table[-1].get(n - mine, (float("inf"), 0.0, 0))[:2]
                    cost = costs[s][mine]
                    if peak == float("inf") or cost > limit:
                        continue
                    found = (max(peak, cost), squares + cost * cost, mine)
                    key = slice(0, 2) if limit == float("inf") else slice(1, 2)
                    if n not in row or found[key] < row[n][key]:
                        row[n] = found
            table.append(row)
        return table

    peak = least(float("inf"))[-1][layers][0]
    table, left, out = least(peak * (1 + 1e-12)), layers, []
    for row in reversed(table):
        out.append(row[left][2])
        left -= out[-1]
    return tuple(reversed(out))


def check_pipeline(p: ParallelConfig, num_layers: int, microbatches: dict[str, int], compiled: bool) -> None:
    """Refuse a pipeline that cannot run. `microbatches` of a step on a data-parallel rank, by the key that they come from."""
    choice("parallel.schedule", p.schedule, registry.names("pipeline"))
    if p.pp == 1:
        for key, default in (("schedule", "1f1b"), ("virtual_stages", None), ("stages", None)):
            if getattr(p, key) != default:
                raise UserError(f"parallel.{key}={getattr(p, key)} has no effect with parallel.pp=1; leave it out, or give "
                                "parallel.pp=N")  # fmt: skip
        return
    schedule, virtual = schedule_of(p), virtual_stages(p)
    fewest, most = schedule.virtual
    if virtual < fewest or (most is not None and virtual > most):
        allowed = f"{fewest}" if fewest == most else f"{fewest} or more"
        raise UserError(f"parallel.virtual_stages={virtual} with parallel.schedule={p.schedule}: allowed: {allowed}")
    _check_stages(p, num_layers, p.pp * virtual)
    for key, m in microbatches.items():
        _check_microbatches(p, schedule, key, m)
    if schedule.splits and compiled:
        raise UserError(f"train.compile=true with parallel.schedule={p.schedule}: compiled code computes weight gradients with the "
                        "others, leaving none for later; use parallel.schedule=interleaved_1f1b")  # fmt: skip
    if schedule.splits and p.overlap:
        raise UserError(f"parallel.overlap=true with parallel.schedule={p.schedule}: the weight gradients, behind which messages "
                        "would travel, are computed later; leave one of them out")  # fmt: skip


def _check_stages(p: ParallelConfig, num_layers: int, count: int) -> None:
    if p.stages is None:
        if num_layers < count:
            raise UserError(f"model.num_layers={num_layers} is less than parallel.pp={p.pp} x virtual stages {count // p.pp} = "
                            f"{count} stages; each needs a layer")  # fmt: skip
        return
    if len(p.stages) != count or sum(p.stages) != num_layers or min(p.stages) < 1:
        raise UserError(f"parallel.stages={p.stages} must be {count} numbers of at least 1 (parallel.pp={p.pp} x virtual stages "
                        f"{count // p.pp}) that add up to model.num_layers={num_layers}")  # fmt: skip


def _check_microbatches(p: ParallelConfig, schedule: PipelineSchedule, key: str, m: int) -> None:
    least = schedule.fill * p.pp
    if m < least:
        raise UserError(f"{key} makes {m} microbatches on a data-parallel rank, and parallel.schedule={p.schedule} with "
                        f"parallel.pp={p.pp} needs {least} at least; enlarge the batch, or cut it smaller")  # fmt: skip
    rounds = max(1, m // p.pp)
    if schedule.rounds and m % rounds:
        near = [n for n in range(max(least, m - p.pp), m + p.pp + 1) if n % max(1, n // p.pp) == 0]
        raise UserError(f"{key} makes {m} microbatches on a data-parallel rank, which parallel.schedule={p.schedule} cannot cut "
                        f"into {rounds} equal rounds; nearest that fit: {near}")  # fmt: skip
