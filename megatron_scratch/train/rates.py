"""Tokens per second, MFU, memory, and where a step's time goes, between logged steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from megatron_scratch.parallel.topology import Topology
from megatron_scratch.train.metrics import memory_gib, synchronize
from megatron_scratch.train.phases import Phases


class Rates:
    """Evaluation and saving are left out of the clock; what saving took is told apart."""

    def __init__(
        self, tokens_at: Callable[[int], int], flops: tuple[float, float], peak: float, topo: Topology, first: int,
        phases: Phases | None = None,
    ) -> None:  # fmt: skip
        """`flops`: per token, (causal attention, full attention); `peak`: FLOP/s of one device."""
        self.tokens_at, self.flops, self.peak, self.topo = tokens_at, flops, peak, topo
        self.phases = phases or Phases(topo.device)
        self.step, self.began = first, time.perf_counter()

    def since_last(self, step: int) -> dict[str, Any]:
        synchronize(self.topo.device)
        now = time.perf_counter()
        seconds, steps = max(now - self.began, 1e-9), max(step - self.step, 1)
        tokens = self.tokens_at(step) - self.tokens_at(self.step)
        per_device = tokens / seconds / self.topo.world
        row = {
            "tokens": self.tokens_at(step),
            "tokens_per_second": tokens / seconds,
            "step_seconds": seconds / steps,
            **{part: taken / steps for part, taken in self.phases.since_last().items()},
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
        self.phases.since_last()
        self.step, self.began = step, time.perf_counter()
