"""The signals that ask for an end, and who hears them for a while."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # Slurm's end of time, Ctrl-C, the usual advance warning


@contextmanager
def handled(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Call `handler` for the signals of ENDING inside; put the old handlers back after. Main thread only, as Python has it."""
    old = {number: signal.signal(number, handler) for number in ENDING}
    try:
        yield
    finally:
        for number, before in old.items():
            signal.signal(number, before)
