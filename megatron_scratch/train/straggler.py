"""Ranks that compute more slowly than others that do the same work: each makes all of them wait in every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median_low

import torch

from megatron_scratch.parallel.collectives import all_reduce_world
from megatron_scratch.parallel.topology import Topology
from megatron_scratch.train import heartbeat
from megatron_scratch.train.console import View
from megatron_scratch.train.loop import Every
from megatron_scratch.train.rundir import RunDir
from megatron_scratch.train.step import StepResult

IN_A_ROW = 3  # intervals, before anybody is named: one may be a page cache that is emptied, or a neighbour's job


@dataclass(frozen=True)
class Change:
    """A rank that has become slow, or is so no more. `ratio`: of its time and the median."""

    rank: int
    ratio: float
    slow: bool


class Straggler:
    """Who is slow: more than `ratio` x the median in `IN_A_ROW` intervals. Plain arithmetic on the times of all ranks.

    Of ranks that do the same work the median is the lower one of two, so that one of two can be named.
    """

    def __init__(self, ratio: float) -> None:
        self.ratio = ratio
        self.row: dict[int, int] = {}
        self.slow: set[int] = set()

    def judge(self, times: Sequence[float], work: Sequence[int]) -> list[Change]:
        """After an interval. `times`: seconds of each rank's pass; `work`: ranks with the same number do the same."""
        middle = {kind: median_low([t for t, k in zip(times, work, strict=True) if k == kind]) for kind in set(work)}
        changes = []
        for rank, (seconds, kind) in enumerate(zip(times, work, strict=True)):
            ratio = seconds / middle[kind] if middle[kind] > 0 else 1.0
            late = ratio > self.ratio
            self.row[rank] = self.row.get(rank, 0) + 1 if late else 0
            if rank in self.slow and not late:
                self.slow.remove(rank)
                changes.append(Change(rank, ratio, False))
            elif rank not in self.slow and self.row[rank] == IN_A_ROW:
                self.slow.add(rank)
                changes.append(Change(rank, ratio, True))
        return changes


class NameStragglers:
    """At logged steps: one message of a number a rank; the main rank names those that are slow, once."""

    def __init__(self, every: int, ratio: float, topo: Topology, run: RunDir, view: View, mean: Callable[[], float],
                 attempt: int) -> None:  # fmt: skip
        """`mean`: seconds of this rank's own work (`own_time.OwnTime.mean`)."""
        self.due = Every(every, at_stop=False)
        self.straggler, self.topo, self.run_dir, self.view, self.mean = Straggler(ratio), topo, run, view, mean
        self.records = run.heartbeats / str(attempt)

    def run(self, step: int, result: StepResult) -> None:
        rows = torch.zeros(2, self.topo.world, dtype=torch.float64)
        rows[:, self.topo.rank] = torch.tensor([self.mean(), self.topo.index("pp")])
        times, stages = all_reduce_world(rows, self.topo).tolist()  # a stage of a pipeline is compared with its like
        if self.topo.is_main and all(times):
            for change in self.straggler.judge(times, stages):
                self._name(step, change)

    def _name(self, step: int, change: Change) -> None:
        beat = heartbeat.read(self.records, change.rank)
        host = beat.host if beat else "an unknown host"
        what = "is slow: its forward pass takes" if change.slow else "is slow no more: its forward pass takes"
        self.view.say(f"step {step}: rank {change.rank} on {host} {what} {change.ratio:.2f} x the median's time")
        self.run_dir.record("straggler", step=step, rank=change.rank, host=host, ratio=round(change.ratio, 3), slow=change.slow)
