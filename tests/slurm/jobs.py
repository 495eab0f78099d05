"""One submitted run on the cluster, and the run that it is compared with."""

from __future__ import annotations

import re
from pathlib import Path

from cluster import Cluster, until
from runs import TINY, ledger, rows, weights

STEPS = 12
JOB = ["launcher.nodes=2", "launcher.gpus_per_node=2", "launcher.preflight=false", "launcher.time=10:00",
       "launcher.signal_seconds=120"]  # fmt: skip


class Job:
    """One submitted run of four ranks on two nodes, held at a step until it is let go."""

    def __init__(
        self, cluster: Cluster, data: Path, path: Path, *more: str, hold: int | None = None, fail: int | None = None
    ) -> None:
        """`hold`, `fail`: at which step. See gate.py."""
        self.cluster, self.path = cluster, path
        for name, step in (("hold", hold), ("fail", fail)):
            if step is not None:
                (path / name).write_text(str(step))
        self.words = [*TINY, f"data.dir={data}", f"dir={path}", f"train.steps={STEPS}", "checkpoint.every=4", "plugins=[gate]",
                      "fault.straggler=0", *JOB, *more]  # fmt: skip
        self.submit_again()

    def submit_again(self, check: bool = True) -> str:
        """The same command again; what it says."""
        said = self.cluster.train(*self.words, check=check, PYTHONPATH=str(Path(__file__).parent))
        found = re.search(r"submitted job (\d+)", said)
        assert found or not check, said
        self.number = int(found[1]) if found else 0
        return said

    def log(self) -> str:
        found = sorted((self.path / "logs").glob("*.log"))
        return "\n".join(f"--- {file.name}\n{file.read_text()}" for file in found)

    def said(self, start: int) -> str:
        """How the main rank of a start ended."""
        return next(self.path.glob(f"jobs/*/starts/{start:04d}/rank_00000.json")).read_text()

    def reach(self) -> None:
        """Until the run has come to where it is held."""
        until((self.path / "held").exists, 120, self.log)

    def asked(self, seconds: float = 30) -> None:
        """Until the supervisor has asked the ranks to stop."""
        until(lambda: list(self.path.glob("jobs/*/starts/*/stop")), seconds, self.log)

    def let_go(self) -> None:
        (self.path / "held").unlink()

    def done(self, *states: str, number: int | None = None) -> None:
        number = self.number if number is None else number
        wanted = states or ("COMPLETED",)
        until(lambda: self.cluster.state(number) in wanted, 150, lambda: f"{self.cluster.job(number)}\n{self.log()}")

    def nodes(self) -> list[list[str]]:
        """Of each start."""
        return [row["nodes"] for row in ledger(self.path, "job")]

    def check(self, oracle: Path) -> None:
        """Every step once, the numbers and the state bitwise those of the run that was never stopped."""
        assert rows(self.path) == rows(oracle)
        assert weights(self.path, STEPS) == weights(oracle, STEPS)
