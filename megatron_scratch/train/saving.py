"""When and how a run saves itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from megatron_scratch.checkpoint.saver import Saved, Saver
from megatron_scratch.engine import Engine
from megatron_scratch.parallel.topology import Topology
from megatron_scratch.train.hooks import Rates, refuse_non_finite
from megatron_scratch.train.loop import Every
from megatron_scratch.train.metrics import View
from megatron_scratch.train.rundir import RunDir
from megatron_scratch.train.step import StepResult


class SaveCheckpoint:
    """Every n steps, at the end, and when stopped; in the steps between it asks what has become of an asynchronous one."""

    def __init__(self, every: int, saver: Saver, topo: Topology, run: RunDir, view: View, engine: Engine, rates: Rates,
                 facts: Callable[[int], dict[str, Any]]) -> None:  # fmt: skip
        """`facts`: step -> JSON that a resuming run compares with its own (model, data, seed), and the data position."""
        self.is_due, self.saver, self.topo, self.run_dir, self.view = Every(every), saver, topo, run, view
        self.engine, self.rates, self.facts = engine, rates, facts
        self.over = False

    def due(self, step: int, finished: bool, stopped: bool) -> bool:
        self.over = finished or stopped
        return self.is_due(step, finished, stopped) or self.saver.save is not None

    def run(self, step: int, result: StepResult) -> None:
        resume = self.rates.pause()
        if self.over or self.is_due(step, False, False):
            self._report(self.saver.finish())
            if not result.skipped:  # which left the weights as they were
                refuse_non_finite(step, result, self.topo)
            stamp = {"written": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
            self._report(self.saver.start(step, self.engine.state(), {**self.facts(step), **stamp}))
            if self.over:
                self._report(self.saver.finish())
        else:
            self._report(self.saver.poll())
        resume()

    def _report(self, saved: Saved | None) -> None:
        """Into the ledger what has become of a save."""
        if saved is None:
            return
        if saved.corrupt:
            self.view.say(f"the checkpoint of step {saved.step} was damaged when it was read again: {saved.corrupt}")
        if self.topo.is_main:
            self.run_dir.record("save", step=saved.step, path=str(saved.path), seconds=round(saved.seconds, 4),
                                blocked=round(saved.blocked, 4), retired=saved.retired)  # fmt: skip
            if saved.corrupt:
                self.run_dir.record("corrupt_checkpoint", step=saved.step, problem=saved.corrupt, moved_to=str(saved.moved_to))
