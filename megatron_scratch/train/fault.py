"""Stopping on request: a signal or a file sets a flag, the ranks agree on it in the next step, the run saves and exits with 75."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # Slurm's end of time, Ctrl-C, the usual advance warning
LOOK_EVERY = 1.0  # seconds between two looks for a file: on a parallel file system a look is a request to a server


class StopFlag:
    """Why this process was asked to stop, or an empty string. A second Ctrl-C stops at once, without saving."""

    def __init__(self, files: Sequence[Path] = ()) -> None:
        """`files`: one that appears asks, too; its text says why. For the main rank: the others hear of it in the next step."""
        self.reason, self.files, self.looked = "", tuple(files), 0.0

    def asked(self) -> bool:
        now = time.monotonic()
        if not self.reason and now - self.looked >= LOOK_EVERY:
            self.looked = now
            found = next((path for path in self.files if path.exists()), None)
            if found is not None:
                self.reason = found.read_text(encoding="utf-8", errors="replace").strip()[:200] or f"the file {found}"
        return bool(self.reason)

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
