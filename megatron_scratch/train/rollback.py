"""Back to a checkpoint and past the samples that led to a spike (PaLM, arXiv 2204.02311, 5.1).

PaLM's authors found that a spike did not come back when training went on from a checkpoint before it with other batches: it takes
these data *and* that state. What a rollback does is a function of the checkpoint and of the run's own numbers, so a run that is
killed after one, and starts again from the same checkpoint, comes to the same spike, goes back again, and ends bitwise alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from megatron_scratch.parallel.topology import Topology
from megatron_scratch.train.batches import BatchPlan
from megatron_scratch.train.console import View
from megatron_scratch.train.guard import Guard
from megatron_scratch.train.rates import Rates
from megatron_scratch.train.rundir import RunDir
from megatron_scratch.train.step import StepResult


class Rollback:
    """A step function around another one: where that one's verdict is to roll back, the step it returns is done `k` steps in.

    Args:
        step: the steps themselves; they have dropped the gradients of a spike.
        load: brings engine and guard to the newest committed checkpoint and returns its step; collective. None: there is none.
    """

    def __init__(self, step: Callable[[int], StepResult], load: Callable[[], int | None], guard: Guard, plan: BatchPlan,
                 topo: Topology, run: RunDir, view: View, rates: Rates) -> None:  # fmt: skip
        self.step, self.load, self.guard, self.plan, self.topo = step, load, guard, plan, topo
        self.run_dir, self.view, self.rates = run, view, rates

    def __call__(self, step: int) -> StepResult:
        result = self.step(step)
        if result.verdict.event != "rollback":
            return result
        until, spent = self.plan.consumed(step + 1), self.guard.rollbacks
        back = self.load()
        if back is None:
            self.guard.ends = (
                f"{result.verdict.reason}, and there is no checkpoint yet to go back to; give a smaller checkpoint.every"
            )
            self.guard.refuse_to_go_on(step + 1)
        assert back is not None
        self.guard.rollbacks = spent  # which the checkpoint does not know of
        passed = [self.plan.consumed(back), until]
        self.plan.rebase(back, until)
        self._record(step + 1, back, passed, result.verdict.reason)
        self.rates.restart(back)
        return replace(result, done=back)

    def _record(self, step: int, back: int, passed: list[int], reason: str) -> None:
        if self.topo.is_main:
            self.run_dir.rewind(back)
            self.run_dir.record("rollback", step=step, to=back, passed_over=passed, reason=reason)
        self.view.say(f"step {step}: {reason}; back to step {back}, and past samples {passed[0]} to {passed[1] - 1}")
