"""A job array of Slurm from outside: which element has which tasks, what the queue says of it, what its logs say."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_scratch.launch.scheduler import ask
from megatron_scratch.util.errors import RunFailed

TAIL = 20  # lines of a log that are shown
OVER = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
        "TIMEOUT")  # fmt: skip


class Array:
    """A submitted array: which element has which tasks, and what Slurm says of each."""

    def __init__(self, number: int, elements: int, indices: list[int]):
        self.number, self.elements = number, elements
        self.place = {index: i for i, index in enumerate(indices)}
        self.states: dict[int, str] = {}
        self.over: set[int] = set()
        self.alive = True
        self.told: set[str] = set()

    def element(self, index: int) -> int:
        return self.place[index] % self.elements

    def look(self, say: Callable[[str], Any]) -> None:
        """Ask the queue. An element that it no longer knows has ended; that it cannot be asked says nothing of the array."""
        try:
            said = query("squeue", "--noheader", "--array", "--states=all", f"--jobs={self.number}", "--format=%K|%T|%r")
        except RunFailed as error:
            self._tell(f"the queue cannot be asked; waiting: {error}", say)
            return
        alive = set()
        for line in said.splitlines():
            element, state, reason = line.split("|", 2)
            self.states[int(element)] = state
            if state not in OVER:
                alive.add(int(element))
                self._held(int(element), reason, say)
        self.alive, self.over = bool(alive), set(range(self.elements)) - alive

    def _held(self, element: int, reason: str, say: Callable[[str], Any]) -> None:
        """What waits for a person and not for other jobs is told; what a broken node threw back is ended, to be submitted anew."""
        if re.search("launch.failed", reason):
            subprocess.run(["scancel", f"{self.number}_{element}"], check=False)
        if re.search("held|Held|Never|Invalid|Limit$", reason) and reason != "JobArrayTaskLimit":
            self._tell(f"array job {self.number} waits: {reason} (squeue -j {self.number})", say)

    def _tell(self, words: str, say: Callable[[str], Any]) -> None:
        """Once."""
        if words not in self.told:
            self.told.add(words)
            say(words)


def largest_array() -> int:
    """Elements that Slurm takes in one array: its indices are below MaxArraySize."""
    found = re.search(r"MaxArraySize\s*=\s*(\d+)", ask("scontrol", "show", "config"))
    return max(1, int(found[1])) if found else 1001


def tail(log: Path) -> str:
    """The last lines of a log."""
    try:
        with open(log, "rb") as f:
            f.seek(max(0, os.fstat(f.fileno()).st_size - (1 << 16)))
            return "\n".join(f.read().decode("utf-8", "replace").splitlines()[-TAIL:])
    except OSError as error:
        return f"({error.strerror})"


def last_words(log: Path) -> str:
    """The last line of a log, or nothing."""
    lines = tail(log).strip().splitlines() if log.exists() else []
    return lines[-1] if lines else ""


def query(*words: str) -> str:
    """`ask`, but a job that Slurm has forgotten is one without lines."""
    try:
        return ask(*words)
    except RunFailed as error:
        if "nvalid job id" in str(error):
            return ""
        raise
