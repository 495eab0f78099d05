"""The life of a job on a real cluster: submitted, run, stopped, requeued, resumed - bitwise the run that was never stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
from cluster import Cluster
from runs import TINY, config, ledger, rows, run, weights

JOB = [
    "launcher.nodes=2",
    "launcher.gpus_per_node=2",
    "launcher.preflight=false",
    "launcher.time=10:00",
    "launcher.signal_seconds=120",
]
STEPS = 12


@pytest.fixture(scope="session")
def oracle(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in four processes here, never stopped."""
    path = tmp_path_factory.mktemp("oracle") / "run"
    assert run(config(corpus, path, f"train.steps={STEPS}", f"checkpoint.every={STEPS}", world=4), 4) == [0] * 4
    return path


def words(corpus: Path, path: Path, *more: str) -> list[str]:
    return [*TINY, f"data.dir={corpus}", f"dir={path}", f"train.steps={STEPS}", f"checkpoint.every={STEPS}", *JOB, *more]


def log(path: Path, job: int) -> str:
    file = path / "logs" / f"slurm_{job}.log"
    return file.read_text() if file.exists() else "no log"


@pytest.mark.parametrize("mode", ["torchrun", "srun"])
def test_two_nodes_with_two_ranks(mode: str, cluster: Cluster, corpus: Path, tmp_path: Path, oracle: Path) -> None:
    job = cluster.submit(*words(corpus, tmp_path, f"launcher.mode={mode}", f"name=two_{mode}"))
    assert cluster.wait(job, "COMPLETED", "FAILED")["JobState"] == "COMPLETED", log(tmp_path, job)
    assert rows(tmp_path) == rows(oracle)
    assert weights(tmp_path, STEPS) == weights(oracle, STEPS)
    assert [row["nodes"] for row in ledger(tmp_path, "job")] == [[f"{cluster.tag}1", f"{cluster.tag}2"]]
