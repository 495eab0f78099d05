"""Requests to a run, to save and exit with 75, or only to save: a signal or a file sets a flag, ranks agree in the next step."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from megatron_scratch.util.signals import handled

STOP, SAVE = 1, 1 << 32  # what ranks tell each other: the sum over all of them, of less than 2^31, says who was asked for what
LOOK_EVERY = 1.0  # seconds between two looks for a file: on a parallel file system a look is a request to a server


def told(asked: int, what: int) -> bool:
    """Whether a sum of what ranks were asked for has STOP, or SAVE, in it."""
    return asked >= SAVE if what == SAVE else asked % SAVE > 0


class StopFlag:
    """Why this process was asked to stop, or an empty string. A second Ctrl-C stops at once, without saving."""

    def __init__(self, files: Sequence[Path] = (), save: Path | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """For the main rank: the others hear of it in the next step.

        Args:
            files: one that appears asks to stop; its text says why.
            save: a file that asks for a checkpoint; who makes that one takes the file away.
        """
        self.reason, self.files, self.save, self.clock, self.looked = "", tuple(files), save, clock, -LOOK_EVERY

    def asked(self) -> int:
        """STOP + SAVE, or 0. SAVE only in the call that sees the file: until the next look the checkpoint has been begun."""
        now, save = self.clock(), 0
        if not self.reason and now - self.looked >= LOOK_EVERY:
            self.looked = now
            found = next((path for path in self.files if path.exists()), None)
            if found is not None:
                self.reason = found.read_text(encoding="utf-8", errors="replace").strip()[:200] or f"the file {found}"
            save = SAVE if self.save is not None and self.save.exists() else 0
        return (STOP if self.reason else 0) + save

    def stops(self) -> bool:
        """Whether this process was asked to stop."""
        return told(self.asked(), STOP)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.reason and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name

    @contextmanager
    def listening(self) -> Iterator[StopFlag]:
        """Handle the signals inside, put the old handlers back after."""
        with handled(self._on_signal):
            yield self
