"""Whether a process works, by what the kernel says of it."""

from __future__ import annotations

import os
import time
from pathlib import Path

from megatron_scratch.util.machine import descendants, process


class Activity:
    """Whether this process works, by what the kernel says: CPU time of it and the processes that it has started, and how often its
    training thread was given the CPU anew (which it is when a read of a disk comes back). Elsewhere than on Linux: its CPU time."""

    BUSY = 0.05  # of one CPU; a beat takes 0.002

    def __init__(self, window: float) -> None:
        """`window`: seconds; a longer time between two calls says nothing of its end."""
        self.window = window
        self.cpu, self.switches, self.at = self._cpu(), self._switches(), time.monotonic()

    def seen(self) -> bool:
        """Since the last call."""
        cpu, switches, at = self._cpu(), self._switches(), time.monotonic()
        busy = cpu - self.cpu >= self.BUSY * (at - self.at) or switches != self.switches
        busy = busy and at - self.at <= self.window
        self.cpu, self.switches, self.at = cpu, switches, at
        return busy

    def _cpu(self) -> float:
        return time.process_time() + sum(told.cpu_seconds for pid in self._helpers() if (told := process(pid)))

    def _switches(self) -> list[str]:
        pids = [os.getpid(), *self._helpers()]
        return [line for pid in pids for line in _text(f"/proc/{pid}/status").splitlines() if line.startswith("voluntary_ctxt")]

    @staticmethod
    def _helpers() -> list[int]:
        """Who works for this process. Those that follow its files (`logs/`) have a session of their own, and work without it."""
        return descendants(os.getpid(), same_session=True)


def _text(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def state_of(pid: int) -> str:
    """What the kernel says of a process on this machine: one letter, or empty when it is gone."""
    told = process(pid)
    return told.state if told else ""
