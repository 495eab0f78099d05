"""What happens around the steps: metrics, evaluation, checkpoints. Each says when it is due; the loop knows none of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from megatron_scratch.parallel.topology import Topology
from megatron_scratch.train.evaluate import Evaluation
from megatron_scratch.train.guard import Guard
from megatron_scratch.train.heartbeat import Pulse
from megatron_scratch.train.loop import Every, Hook
from megatron_scratch.train.metrics import View, memory_gib, synchronize
from megatron_scratch.train.rundir import RunDir
from megatron_scratch.train.step import StepResult


class Rates:
    """Tokens per second and MFU between logged steps. Evaluation and saving are left out of the clock."""

    def __init__(
        self, tokens_at: Callable[[int], int], flops: tuple[float, float], peak: float, topo: Topology, first: int
    ) -> None:
        """`flops`: per token, (causal attention, full attention); `peak`: FLOP/s of one device."""
        self.tokens_at, self.flops, self.peak, self.topo = tokens_at, flops, peak, topo
        self.step, self.began = first, time.perf_counter()

    def since_last(self, step: int) -> dict[str, Any]:
        synchronize(self.topo.device)
        now = time.perf_counter()
        seconds = max(now - self.began, 1e-9)
        tokens = self.tokens_at(step) - self.tokens_at(self.step)
        per_device = tokens / seconds / self.topo.world
        row = {
            "tokens": self.tokens_at(step),
            "tokens_per_second": tokens / seconds,
            "step_seconds": seconds / max(step - self.step, 1),
            "mfu": per_device * self.flops[0] / self.peak,  # causal attention counted: 6N + 6Lhs
            "mfu_full_attention": per_device * self.flops[1] / self.peak,  # PaLM's convention: 6N + 12Lhs
            "memory_gib": memory_gib(self.topo.device),
        }
        self.step, self.began = step, time.perf_counter()
        return row

    def pause(self) -> Callable[[], None]:
        """Stop the clock; call what is returned to start it again."""
        synchronize(self.topo.device)
        paused = time.perf_counter()

        def resume() -> None:
            self.began += time.perf_counter() - paused

        return resume

    def restart(self, step: int) -> None:
        """Begin again after `step` steps."""
        synchronize(self.topo.device)
        self.step, self.began = step, time.perf_counter()


class LogMetrics:
    """Every n steps: one row in metrics.jsonl, one line on the screen."""

    def __init__(self, every: int, topo: Topology, run: RunDir, view: View, rates: Rates) -> None:
        self.due, self.topo, self.run_dir, self.view, self.rates = Every(every), topo, run, view, rates

    def run(self, step: int, result: StepResult) -> None:
        if result.skipped:  # its loss and norm need not be numbers
            skip = {"step": step, "skipped": result.skipped, "lr": result.lr, **self.rates.since_last(step)}
            if self.topo.is_main:
                self.run_dir.log(skip)
            return
        row = {"step": step, "loss": result.loss, "lr": result.lr, "grad_norm": result.grad_norm, **self.rates.since_last(step)}
        if self.topo.is_main:
            self.run_dir.log(row)
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
    """Every n steps and at the end: loss on the validation set."""

    def __init__(
        self, every: int, topo: Topology, run: RunDir, view: View, rates: Rates, measure: Callable[[], Evaluation | None]
    ) -> None:
        """`measure`: None: it was broken off, as the run was asked to stop."""
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

    def _show(self, step: int, found: Evaluation) -> None:
        row: dict[str, Any] = {"step": step, "val_loss": found.loss, "val_tokens": found.tokens}
        if found.bits_per_byte is not None:
            row["val_bits_per_byte"] = found.bits_per_byte
        if self.topo.is_main:
            self.run_dir.log(row)
        self.view.row(row)
