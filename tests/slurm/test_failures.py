"""What goes wrong on a cluster: ranks that die, input that is bad, nodes that are bad, runs that come to nothing, users who change
their mind. Each ends, says why, and leaves nothing running."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from cluster import Cluster, until
from jobs import STEPS, Job
from runs import ledger


def test_a_rank_that_dies_is_started_again_in_the_same_job(cluster: Cluster, corpus: Path, tmp_path: Path, oracle: Path) -> None:
    job = Job(cluster, corpus, tmp_path, "name=dies", hold=6)
    job.reach()
    os.kill(cluster.ranks(2)[0], signal.SIGKILL)
    job.let_go()
    job.done()
    job.check(oracle)
    assert [row["start"] for row in ledger(tmp_path, "job")] == [1, 2] and len(ledger(tmp_path, "job_failed")) == 1
    assert [row["step"] for row in ledger(tmp_path, "start")] == [0, 4]


def test_a_rank_that_hangs(cluster: Cluster, corpus: Path, tmp_path: Path, oracle: Path) -> None:
    """A stopped process says nothing and ends nothing: the others name it and end, Slurm kills it, all start again."""
    job = Job(cluster, corpus, tmp_path, "name=hangs", "fault.hang_timeout=15", hold=6)
    job.reach()
    os.kill(cluster.ranks(2)[0], signal.SIGSTOP)
    job.let_go()
    job.done()
    job.check(oracle)
    (hang,) = ledger(tmp_path, "hang")
    assert len(hang["ranks"]) == 1 and hang["ranks"][0] in (2, 3) and f"on {cluster.node(2)}" in hang["reason"]
    assert "stopped by a signal" in hang["reason"] or "its process or its host does not run" in hang["reason"]
    assert "hang: no progress" in ledger(tmp_path, "job_failed")[0]["reason"]


def test_a_run_without_progress_gives_up(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    job = Job(cluster, corpus, tmp_path, "name=fails", "launcher.max_restarts=1", "launcher.chain=2", fail=2)
    job.done("FAILED")
    job.done("CANCELLED", number=job.number + 1)
    assert "2 starts in a row have left no new checkpoint" in job.log() and "made to fail" in job.log()
    assert len(ledger(tmp_path, "job_failed")) == 2


def test_bad_input_is_not_tried_again(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    """What only the nodes can see: the data is gone when the job starts."""
    data = tmp_path / "data"
    data.symlink_to(corpus)
    job = Job(cluster, data, tmp_path, "name=refused", "launcher.sbatch={begin: 'now+3'}", "launcher.chain=2")
    data.unlink()
    job.done("FAILED")
    job.done("CANCELLED", number=job.number + 1)
    assert cluster.job(job.number)["ExitCode"] == "2:0" and str(data) in job.log()
    assert len(ledger(tmp_path, "job")) == 1


def test_a_chain_goes_on_where_a_job_stopped(cluster: Cluster, corpus: Path, tmp_path: Path, oracle: Path) -> None:
    """Without requeue, the next job takes over; when the run is finished, those that still wait are cancelled."""
    job = Job(cluster, corpus, tmp_path, "name=chain", "launcher.chain=3", "launcher.requeue=false", hold=5)
    job.reach()
    cluster.login("scancel", "--batch", "--signal=USR1", str(job.number))
    job.asked()
    job.let_go()
    job.done(number=job.number + 1)
    job.done("CANCELLED", number=job.number + 2)
    job.check(oracle)
    assert [row["job"] for row in ledger(tmp_path, "job")] == [job.number, job.number + 1]


def test_the_stop_file_ends_a_run_for_good(cluster: Cluster, corpus: Path, tmp_path: Path, oracle: Path) -> None:
    """Saved, its chain cancelled, not started again while the file is there."""
    job = Job(cluster, corpus, tmp_path, "name=stopped", "launcher.chain=2", hold=5)
    job.reach()
    (tmp_path / "stop").touch()
    job.let_go()
    job.done("FAILED")  # Slurm's word for exit code 75
    job.done("CANCELLED", number=job.number + 1)
    assert cluster.job(job.number)["ExitCode"] == "75:0"
    assert 5 < ledger(tmp_path, "stop")[0]["step"] < STEPS
    said = job.submit_again(check=False)
    assert f"{tmp_path}/stop is there" in said and "submitted" not in said
    (tmp_path / "stop").unlink()
    job.submit_again()
    job.done()
    job.check(oracle)


def test_scancel_leaves_nothing_behind(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    job = Job(cluster, corpus, tmp_path, "name=cancelled", hold=6)
    job.reach()
    assert all(cluster.processes(n) for n in (1, 2))
    cluster.login("scancel", str(job.number))
    job.done("CANCELLED")
    until(lambda: not any(cluster.processes(n) for n in (1, 2, 3)), 30, lambda: str([cluster.processes(n) for n in (1, 2, 3)]))


def test_a_bad_node_and_a_spare(cluster: Cluster, corpus: Path, tmp_path: Path, oracle: Path) -> None:
    """Three nodes are asked for, two are needed: the one that has no Python is left out."""
    with cluster.broken(2):
        job = Job(
            cluster, corpus, tmp_path, "name=spare", "launcher.preflight=true", "launcher.gpus=false", "launcher.spare_nodes=1"
        )
        job.done()
    job.check(oracle)
    assert [(row["node"], row["job"]) for row in ledger(tmp_path, "bad_node")] == [(cluster.node(2), job.number)]
    assert job.nodes() == [[cluster.node(1), cluster.node(3)]]


def test_a_bad_node_without_a_spare(cluster: Cluster, corpus: Path, tmp_path: Path, oracle: Path) -> None:
    """The job is submitted again without it."""
    with cluster.broken(2):
        job = Job(cluster, corpus, tmp_path, "name=excluded", "launcher.preflight=true", "launcher.gpus=false")
        job.done("FAILED")
        again = ledger(tmp_path, "resubmitted")[0]["as_job"]
        job.done(number=again)
    job.check(oracle)
    assert cluster.job(again)["ExcNodeList"] == cluster.node(2)
    assert job.nodes() == [[cluster.node(1), cluster.node(3)]]


def test_a_first_node_that_cannot_even_start_python(cluster: Cluster, corpus: Path, tmp_path: Path, oracle: Path) -> None:
    """There the batch script itself is all that runs."""
    with cluster.broken(1):
        job = Job(cluster, corpus, tmp_path, "name=first")
        job.done("FAILED")
        job.done(number=job.number + 1)
    job.check(oracle)
    assert cluster.job(job.number + 1)["ExcNodeList"] == f"{cluster.node(1)}"
    assert job.nodes() == [[cluster.node(2), cluster.node(3)]]
