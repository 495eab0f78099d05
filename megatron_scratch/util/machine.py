"""What machine this is."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any


@cache
def cpu_vendor() -> str:
    """`AuthenticAMD`, `GenuineIntel`, ... as Linux tells it; elsewhere what Python knows, maybe nothing."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("vendor_id"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def local_gpus() -> int:
    """GPUs of this machine, asked of nvidia-smi: importing torch to count them would take seconds."""
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent() -> None:
    """Let the kernel end this process (SIGTERM, then it saves) when its launcher dies, however that dies: no orphan trains on."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before the call
            os.kill(os.getpid(), signal.SIGTERM)


@dataclass(frozen=True)
class Process:
    """A line of Linux's list of processes."""

    state: str  # one letter: R, S, Z, ...
    parent: int
    session: int
    cpu_seconds: float


def process(pid: int) -> Process | None:
    """None: it is gone, or this is not Linux."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return Process(fields[0], int(fields[1]), int(fields[3]), (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return None


def descendants(pid: int, same_session: bool = False) -> list[int]:
    """The processes that a process has started, and those that they have; on Linux. One whose parent has ended is nobody's.

    Args:
        same_session: not those that were given a session of their own, nor what they have started.
    """
    if not os.path.isdir("/proc/self/task"):
        return []
    known = {number: told for number in map(int, filter(str.isdigit, os.listdir("/proc"))) if (told := process(number))}
    found = [pid]
    for parent in found:
        children = [number for number, told in known.items() if told.parent == parent]
        found += [number for number in children if not same_session or known[number].session == known[parent].session]
    return found[1:]


SIGNALS = (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)  # what a terminal and a scheduler send to all processes of a job


def start_helper(command: list[str], **given: Any) -> subprocess.Popen[Any]:
    """Start a process that calls `outlive_signals`. Signals wait until it has: one that came while it imports would end it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # inherited
    try:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **given)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def outlive_signals() -> None:
    """For a process that works for a rank: only the rank's death ends it.

    A scheduler's signals go to all processes of a job. The rank saves then, and what it has under way must not be lost for that.
    """
    rank = os.getppid()
    signal.signal(signal.SIGTERM, lambda *args: os._exit(1) if os.getppid() != rank else None)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def outlive_rank(seconds: int) -> None:
    """Like `outlive_signals`, for a process that has something to finish when its rank has died. The kernel ends it after `seconds`
    (SIGALRM), whatever hangs by then; one that hears of the end otherwise sets `signal.alarm` itself."""
    rank = os.getppid()

    def heard(*args: Any) -> None:
        if os.getppid() != rank:
            signal.alarm(seconds)

    signal.signal(signal.SIGTERM, heard)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    die_with_parent()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@cache
def code_version() -> str | None:
    """The commit of the checkout that this code is in, with `+changes` where files of it differ; None where it is in none."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists() or shutil.which("git") is None:
        return None
    asked = ["git", "-C", str(here), "describe", "--always", "--abbrev=40", "--dirty=+changes", "--exclude=*"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return told.stdout.strip() or None if told.returncode == 0 else None
