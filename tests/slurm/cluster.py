"""A real Slurm cluster of three nodes for all tests of this folder, each node a network namespace with its own host name."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

SCRIPT = Path(__file__).parent / "cluster.sh"
CORE = ["sbatch", "slurmctld", "slurmd", "munged", "ip"]


class Cluster:
    """What a user does on the login node, and what happens to nodes."""

    def __init__(self, folder: Path, tag: str) -> None:
        self.folder, self.tag, self.shell = folder, tag, {}
        settings = {"DIR": str(folder / "c"), "TAG": tag, "NODES": "3", "GPUS": "2", "CPUS": "8"}
        self.settings = {f"CLUSTER_{key}": value for key, value in settings.items()}

    def sh(self, *words: str, check: bool = True, **more: str) -> str:
        """A command of cluster.sh; its output and errors."""
        env = {**os.environ, **self.settings, **more}
        done = subprocess.run(
            [str(SCRIPT), *words], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120
        )
        assert done.returncode == 0 or not check, f"{words}: {done.stdout}"
        return done.stdout

    def node(self, number: int) -> str:
        return f"{self.tag}{number}"

    def processes(self, number: int) -> dict[int, bytes]:
        """Ours on a node, pid -> command line: supervisor, agents, ranks."""
        pids = subprocess.run(["ip", "netns", "pids", f"{self.tag}-{self.node(number)}"], capture_output=True, text=True).stdout
        found = {int(pid): command(pid) for pid in pids.split()}
        return {pid: words for pid, words in found.items() if b"megatron_scratch" in words}

    @contextmanager
    def broken(self, number: int) -> Iterator[None]:
        """A node that the software is missing from, as where a mount has failed."""
        node = self.node(number)
        self.sh("crash", node)
        self.sh("boot", node, CLUSTER_HIDE=sys.prefix)
        try:
            yield
        finally:
            self.sh("crash", node)
            self.sh("boot", node)

    def ranks(self, number: int) -> list[int]:
        return [pid for pid, words in self.processes(number).items() if b"train.worker" in words and b"train.agent" not in words]

    def login(self, *words: str, check: bool = True, **more: str) -> str:
        """Run a command on the login node."""
        return self.sh("exec", *words, check=check, **more)

    def train(self, *words: str, check: bool = True, **more: str) -> str:
        """`megatron-scratch train launcher=slurm ...` there."""
        return self.login(sys.executable, "-m", "megatron_scratch", "train", "launcher=slurm", *words, check=check, **more)

    def job(self, number: int) -> dict[str, str]:
        """Slurm's own words on a job."""
        return dict(word.split("=", 1) for word in self.login("scontrol", "show", "job", "-o", str(number)).split() if "=" in word)

    def state(self, number: int) -> str:
        return self.job(number)["JobState"]

    def wait(self, number: int, *states: str, seconds: float = 120) -> dict[str, str]:
        until(lambda: self.state(number) in states, seconds, lambda: f"job {number} is {self.job(number)}")
        return self.job(number)


def command(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has ended
        return b""


def until(reached: Callable[[], object], seconds: float, what: Callable[[], str]) -> None:
    """Poll; on the deadline fail with what is the case instead."""
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, what()
        time.sleep(0.1)
