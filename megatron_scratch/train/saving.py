"""When and how a run saves itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from megatron_scratch.checkpoint.saver import Saved, Saver
from megatron_scratch.engine import Engine
from megatron_scratch.train.console import View
from megatron_scratch.train.loop import Every
from megatron_scratch.train.mirror import Mirror
from megatron_scratch.train.rates import Rates
from megatron_scratch.train.replicas import check_finite, check_replicas
from megatron_scratch.train.rundir import RunDir
from megatron_scratch.train.step import StepResult
from megatron_scratch.util.errors import RunFailed


class SaveCheckpoint:
    """Every n steps, at the end, when stopped, and when asked to; in the steps between it asks what has become of an asynchronous
    one."""

    def __init__(self, every: int, saver: Saver, mirror: Mirror, run: RunDir, view: View, engine: Engine, rates: Rates,
                 facts: Callable[[int], dict[str, Any]]) -> None:  # fmt: skip
        """`facts`: step -> JSON that a resuming run compares with its own (model, data, seed), and the data position."""
        self.is_due, self.saver, self.topo, self.mirror = Every(every), saver, saver.topo, mirror
        self.run_dir, self.view = run, view
        self.engine, self.rates, self.facts = engine, rates, facts
        self.over = self.asked = False  # no step follows; the ranks were asked for a checkpoint

    def due(self, step: int, finished: bool, stopped: bool) -> bool:
        self.over = finished or stopped
        return self.asked or self.is_due(step, finished, stopped) or self.saver.save is not None

    def run(self, step: int, result: StepResult) -> None:
        resume = self.rates.pause()
        if self.over or self.asked or self.is_due(step, False, False):
            self._report(self.saver.finish())
            self._take_request(step)
            check_replicas(self.engine, self.topo, step)
            check_finite(self.engine, self.topo, step)
            stamp = {"written": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
            self._report(self.saver.start(step, self.engine.state(), {**self.facts(step), **stamp}))
            if self.over:
                self._report(self.saver.finish())
        else:
            self._report(self.saver.poll())
        resume()

    def _take_request(self, step: int) -> None:
        """What asks for a checkpoint now has this one."""
        if self.asked:
            self.view.say(f"step {step}: a checkpoint, as {self.run_dir.save} asks")
        if self.topo.is_main:
            self.run_dir.save.unlink(missing_ok=True)
        self.asked = False

    def listening(self, step: Callable[[int], StepResult]) -> Callable[[int], StepResult]:
        """A step function that tells this hook where the ranks were asked for a checkpoint."""

        def told(number: int) -> StepResult:
            result = step(number)
            self.asked |= result.save
            return result

        return told

    def tidy(self) -> None:
        """Before the first step: delete what an earlier start was killed before it could."""
        gone = self.saver.tidy()
        if gone and self.topo.is_main:
            self.run_dir.record("retired", steps=gone)

    def wait(self) -> None:
        """Until no save is under way."""
        self._report(self.saver.finish())

    def _report(self, saved: Saved | None) -> None:
        """Into the ledger what has become of a save."""
        if saved is None:
            return
        problem = f"the checkpoint of step {saved.step} was damaged when it was read again: {saved.corrupt}"
        if saved.corrupt:
            self.view.say(problem)
        if self.topo.is_main:
            self.run_dir.record("save", step=saved.step, path=str(saved.path), seconds=round(saved.seconds, 4),
                                blocked=round(saved.blocked, 4), retired=saved.retired)  # fmt: skip
            if saved.corrupt:
                self.run_dir.record("corrupt_checkpoint", step=saved.step, problem=saved.corrupt, moved_to=str(saved.moved_to))
            else:
                self.mirror.submit(saved.step)
        if saved.corrupt and self.over:  # in the midst of a run the next one will do
            raise RunFailed(f"{problem}; it is set aside, the ones before it are whole: run the same command again")
