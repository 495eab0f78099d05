"""The training loop. It holds no feature: what happens every n steps is a hook, everything else was built before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from megatron_scratch.train.step import StepResult


class Hook(Protocol):
    """Something that happens after a step. It runs on every rank, in the same order."""

    def due(self, step: int, finished: bool, stopped: bool) -> bool:
        """Whether to run after `step` steps are done; no step follows when `finished`, or when `stopped` on request."""

    def run(self, step: int, result: StepResult) -> None: ...


@dataclass(frozen=True)
class Every:
    """The usual `due`: every n steps (0: never), after the last one, and, if `at_stop`, when asked to stop in a hurry."""

    n: int
    at_stop: bool = True

    def __call__(self, step: int, finished: bool, stopped: bool) -> bool:
        if stopped and not self.at_stop:
            return False
        return finished or stopped or (self.n > 0 and step % self.n == 0)


def train(first: int, steps: int, step_fn: Callable[[int], StepResult], hooks: list[Hook]) -> tuple[int, bool]:
    """Run steps `first` .. `steps`-1. Returns (steps done, whether a stop was asked for)."""
    done, stopped = first, False
    while done < steps and not stopped:
        before, result = done, step_fn(done)
        done, stopped = result.done, result.stop
        for hook in hooks if done > before else ():  # a step may have gone back to where all of them have been before
            if hook.due(done, done == steps, stopped):
                hook.run(done, result)
    return done, stopped
