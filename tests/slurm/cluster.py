"""A real Slurm cluster of three nodes for all tests of this folder, each node a network namespace with its own host name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
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

    def login(self, *words: str, check: bool = True, **more: str) -> str:
        """Run a command on the login node."""
        return self.sh("exec", *words, check=check, **more)

    def train(self, *words: str, check: bool = True, **more: str) -> str:
        """`megatron-scratch train launcher=slurm ...` there."""
        return self.login(sys.executable, "-m", "megatron_scratch", "train", "launcher=slurm", *words, check=check, **more)

    def submit(self, *words: str, **more: str) -> int:
        found = re.search(r"submitted job (\d+)", out := self.train(*words, **more))
        assert found, out
        return int(found[1])

    def job(self, number: int) -> dict[str, str]:
        """Slurm's own words on a job."""
        return dict(word.split("=", 1) for word in self.login("scontrol", "show", "job", "-o", str(number)).split() if "=" in word)

    def state(self, number: int) -> str:
        return self.job(number)["JobState"]

    def wait(self, number: int, *states: str, seconds: float = 120) -> dict[str, str]:
        until(lambda: self.state(number) in states, seconds, lambda: f"job {number} is {self.job(number)}")
        return self.job(number)


def until(reached: Callable[[], object], seconds: float, what: Callable[[], str]) -> None:
    """Poll; on the deadline fail with what is the case instead."""
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, what()
        time.sleep(0.1)
