"""Whether a process works, by what the kernel says of it."""

from __future__ import annotations

import os
import time
from pathlib import Path


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
        return time.process_time() + sum(_cpu_of(pid) for pid in _children(os.getpid()))

    def _switches(self) -> list[str]:
        pids = [os.getpid(), *_children(os.getpid())]
        return [line for pid in pids for line in _text(f"/proc/{pid}/status").splitlines() if line.startswith("voluntary_ctxt")]


def _text(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _children(pid: int) -> list[int]:
    """And theirs."""
    if not os.path.isdir("/proc/self/task"):
        return []
    parents = {int(p): _parent(p) for p in os.listdir("/proc") if p.isdigit()}
    found = [pid]
    for known in found:
        found += [child for child, parent in parents.items() if parent == known]
    return found[1:]


def _parent(pid: str) -> int:
    fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return int(fields[1]) if len(fields) > 1 else 0


def _cpu_of(pid: int) -> float:
    fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if len(fields) > 12 else 0.0


def state_of(pid: int) -> str:
    """What the kernel says of a process on this machine: one letter, or empty when it is gone."""
    fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[0] if fields else ""
