"""Stopping on request: a signal sets a flag, the ranks agree on it in the next step, the run saves and exits with 75."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # Slurm's end of time, Ctrl-C, the usual advance warning


class StopFlag:
    """Why this process was asked to stop, or an empty string. A second Ctrl-C stops at once, without saving."""

    def __init__(self) -> None:
        self.reason = ""

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.reason and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name

    @contextmanager
    def listening(self) -> Iterator[StopFlag]:
        """Handle the signals inside, put the old handlers back after."""
        old = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
