"""A sweep on a real cluster: one job a point, illegal ones dropped before anything is submitted, reports of all states."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from cluster import Cluster, until
from runs import TINY, config, rows, run

WORDS = [*TINY, "train.steps=3", "checkpoint.every=3", "train.eval_every=3"]
JOB = [
    "launcher=slurm",
    "launcher.gpus_per_node=1",
    "launcher.preflight=false",
    "launcher.time=10:00",
    "launcher.signal_seconds=120",
]


def sweep(cluster: Cluster, *words: str) -> str:
    return cluster.login(sys.executable, "-m", "megatron_scratch", "train", "-m", *WORDS, *JOB, *words)


def report(cluster: Cluster, path: Path) -> dict[int, dict[str, Any]]:
    """Point -> its row, in the report's order."""
    out = cluster.login(sys.executable, "-m", "megatron_scratch", "report", "--sweep", str(path), "json=true")
    return {row["number"]: row for row in map(json.loads, out.splitlines())}


def test_four_points_one_of_them_illegal(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "sweep"
    out = sweep(cluster, f"data.dir={corpus}", f"hydra.sweep.dir={path}", "name=four", "train.global_batch_size=2,9,4,8")
    jobs = [int(number) for number in re.findall(r"submitted job (\d+) \(four_[0-3]\)", out)]
    assert len(jobs) == 3 and "point 1 dropped: train.global_batch_size=9: " in out and "3 of 4 points submitted" in out
    early = report(cluster, path)
    assert {early[n]["state"] for n in (0, 2, 3)} <= {"pending", "running"}, "it did not wait"
    assert early[1]["state"] == "dropped" and "train.micro_batch_size" in early[1]["reason"] and not (path / "1").exists()
    assert [cluster.job(job)["JobName"] for job in jobs] == ["four_0", "four_2", "four_3"]
    for job in jobs:
        cluster.wait(job, "COMPLETED")
    late = report(cluster, path)
    assert [late[n]["state"] for n in range(4)] == ["finished", "dropped", "finished", "finished"], late
    losses = [row["val_loss"] for row in late.values()]
    assert losses[:3] == sorted(losses[:3]) and losses[3] is None
    assert run(config(corpus, tmp_path / "alone", *WORDS, "train.global_batch_size=4")) == [0]
    assert rows(path / "2") == rows(tmp_path / "alone") and late[2]["loss"] == rows(tmp_path / "alone")[3][0]


def test_optuna_waits_for_its_jobs_and_the_cluster_has_the_last_word(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    """Two trials at once, one of a size that the cluster does not have: a failed trial, and the study goes on with the other."""
    path = tmp_path / "study"
    out = sweep(cluster, f"data.dir={corpus}", f"hydra.sweep.dir={path}", "name=study", "train.global_batch_size=16",
                "hydra/sweeper=optuna", "hydra/sweeper/sampler=grid", "hydra.sweeper.n_trials=2", "launcher.nodes=1,8")  # fmt: skip
    assert "waiting for 1 jobs" in out and "sbatch refuses" in out and "best: point " in out
    found = report(cluster, path)
    assert sorted(row["state"] for row in found.values()) == ["dropped", "finished"]
    assert not any((path / str(n)).exists() for n, row in found.items() if row["state"] == "dropped")


def test_a_cancelled_point(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "sweep"
    out = sweep(cluster, f"data.dir={corpus}", f"hydra.sweep.dir={path}", "name=cancelled", "train.steps=20000",
                "optim.lr=1e-3,1e-4", "train.log_every=500", "launcher.exclude=" + cluster.node(1))  # fmt: skip
    jobs = re.findall(r"submitted job (\d+)", out)
    until(lambda: all((path / name / "metrics.jsonl").exists() for name in "01"), 60, lambda: str(report(cluster, path)))
    assert [row["state"] for row in report(cluster, path).values()] == ["running"] * 2
    cluster.login("scancel", *jobs)
    for job in jobs:
        cluster.wait(int(job), "CANCELLED", "COMPLETED", "FAILED")
    found = report(cluster, path)
    assert [(row["state"], row["reason"][:10]) for row in found.values()] == [("stopped", "stopped by")] * 2, found
