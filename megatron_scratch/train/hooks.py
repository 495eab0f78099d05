"""What happens around the steps: metrics, evaluation, checkpoints. Each says when it is due; the loop knows none of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from megatron_scratch.parallel.topology import Topology
from megatron_scratch.train.console import View
from megatron_scratch.train.evaluate import Evaluation
from megatron_scratch.train.guard import Guard
from megatron_scratch.train.heartbeat import Pulse
from megatron_scratch.train.loop import Every, Hook
from megatron_scratch.train.rates import Rates
from megatron_scratch.train.rundir import RunDir
from megatron_scratch.train.step import StepResult


class LogMetrics:
    """Every n steps: one row in metrics.jsonl, one line on the screen."""

    def __init__(self, every: int, topo: Topology, run: RunDir, view: View, rates: Rates) -> None:
        self.due, self.topo, self.run_dir, self.view, self.rates = Every(every), topo, run, view, rates

    def run(self, step: int, result: StepResult) -> None:
        row: dict[str, Any] = {"step": step, "time": time.time()}
        if result.skipped:  # its loss and norm need not be numbers
            row |= {"skipped": result.skipped, "lr": result.lr}
        else:
            row |= {"loss": result.loss, "lr": result.lr, "grad_norm": result.grad_norm}
        told = {"loss_scale": result.scale, "spike_score": result.score}
        row |= {key: value for key, value in told.items() if value is not None and math.isfinite(value)}
        row |= self.rates.since_last(step)
        if self.topo.is_main:
            self.run_dir.log(row)
        if not result.skipped:
            self.view.row(row)


class During:
    """A hook, and the phase that a rank is in while it runs."""

    def __init__(self, phase: str, hook: Hook, pulse: Pulse) -> None:
        self.phase, self.hook, self.pulse, self.due = phase, hook, pulse, hook.due

    def run(self, step: int, result: StepResult) -> None:
        with self.pulse.during(self.phase):
            self.hook.run(step, result)


class RecordVerdicts:
    """After every step: what was not like any other goes into the ledger, and a run that must not go on ends."""

    def __init__(self, guard: Guard, topo: Topology, run: RunDir, view: View) -> None:
        self.due, self.guard, self.topo, self.run_dir, self.view = Every(1), guard, topo, run, view

    def run(self, step: int, result: StepResult) -> None:
        verdict = result.verdict
        if verdict.event:
            self.view.say(f"step {step}: {WORDS[verdict.event]}, {verdict.reason}")
            if self.topo.is_main and verdict.event != "stop":  # which the ledger calls a failure
                self.run_dir.record(verdict.event, step=step, reason=verdict.reason)
            self.guard.refuse_to_go_on(step)


WORDS = {"skip": "skipped", "spike": "a spike, applied all the same", "stop": "not applied", "rollback": "not applied"}


class Evaluate:
    """Every n steps and at the end: loss on the validation set, and on each that has a name."""

    def __init__(self, every: int, topo: Topology, run: RunDir, view: View, rates: Rates,
                 measure: Callable[[], dict[str, Evaluation] | None]) -> None:  # fmt: skip
        """`measure`: name -> what was found, the run's own set under ""; None: it was broken off, as the run was asked to stop."""
        self.due, self.topo, self.run_dir = Every(every, at_stop=False), topo, run
        self.view, self.rates, self.measure = view, rates, measure

    def run(self, step: int, result: StepResult) -> None:
        resume = self.rates.pause()
        found = self.measure()
        if found is None:
            self.view.say(f"step {step}: the evaluation is broken off, as the run was asked to stop")
        else:
            self._show(step, found)
        resume()

    def _show(self, step: int, found: dict[str, Evaluation]) -> None:
        row: dict[str, Any] = {"step": step, "time": time.time(), "tokens": self.rates.tokens_at(step)}
        for name, one in found.items():
            tail = f"/{name}" if name else ""
            row |= {f"val_loss{tail}": one.loss, f"val_perplexity{tail}": one.perplexity, f"val_tokens{tail}": one.tokens}
            if one.bits_per_byte is not None:
                row[f"val_bits_per_byte{tail}"] = one.bits_per_byte
        if self.topo.is_main:
            self.run_dir.log(row)
        self.view.row(row)
