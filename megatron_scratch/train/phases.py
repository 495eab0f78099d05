"""Where the time of a step goes: waiting for data, forward and backward, the optimizer, checkpoints. This rank's own view."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from megatron_scratch.train.metrics import between, mark, synchronize

PARTS = {"data": "data_seconds", "forward/backward": "forward_backward_seconds", "compile": "forward_backward_seconds",
         "reduce": "optimizer_seconds", "update": "optimizer_seconds", "save": "checkpoint_seconds"}  # fmt: skip
"""Phase of the pulse -> the key of a metrics row. `reduce` is the gradient norm, and the wait for other ranks to have theirs."""
DRAIN = 256  # marks that are kept before those of the past are added up


class Phases:
    """Listens to a `heartbeat.Pulse`. On a GPU the marks are events in its stream: what the host has queued is not done yet, and to
    wait for it would cost what is to be measured."""

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self.device, self.clock = device, clock
        self.marks: deque[tuple[str, Any]] = deque()  # (phase that begins, when)
        self.seconds = dict.fromkeys(PARTS.values(), 0.0)

    def entered(self, phase: str) -> None:
        """The training thread is in `phase` from here on."""
        self.marks.append((phase, mark(self.device, self.clock)))
        if len(self.marks) > DRAIN:
            self._add_up()

    def since_last(self) -> dict[str, float]:
        """Seconds of each part since the last call. The device has done all of it: a step has ended."""
        self.marks.append(("", mark(self.device, self.clock)))
        synchronize(self.device)
        self._add_up()
        taken, self.seconds = self.seconds, dict.fromkeys(PARTS.values(), 0.0)
        return taken

    def _add_up(self) -> None:
        """Up to the last mark that the device has passed, which begins what is to come."""
        while len(self.marks) > 1 and (isinstance(end := self.marks[1][1], float) or end.query()):
            phase, begin = self.marks.popleft()
            if phase in PARTS:
                self.seconds[PARTS[phase]] += between(begin, end)
