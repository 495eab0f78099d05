"""The life of a job on a real cluster: submitted, run, stopped, requeued, resumed - bitwise the run that was never stopped."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from cluster import Cluster, until
from jobs import STEPS, Job
from runs import ledger


@pytest.mark.parametrize("mode", ["torchrun", "srun"])
def test_two_nodes_with_two_ranks(mode: str, cluster: Cluster, corpus: Path, tmp_path: Path, oracle: Path) -> None:
    job = Job(cluster, corpus, tmp_path, f"launcher.mode={mode}", f"name=two_{mode}")
    job.done()
    job.check(oracle)
    assert job.nodes() == [[cluster.node(1), cluster.node(2)]]


def test_the_time_limit(cluster: Cluster, corpus: Path, tmp_path: Path, oracle: Path) -> None:
    """A real one: Slurm's signal ahead of it, saved, requeued under the same number, resumed."""
    job = Job(cluster, corpus, tmp_path, "name=limit", "launcher.time=0:01:30", "launcher.signal_seconds=20", hold=5)
    job.reach()
    job.asked(90)
    job.let_go()
    check_requeued(job, oracle)


def test_warned_while_slurm_starts_the_ranks(cluster: Cluster, corpus: Path, tmp_path: Path, oracle: Path) -> None:
    """The same signal, sent by hand; each rank a task of srun."""
    job = Job(cluster, corpus, tmp_path, "launcher.mode=srun", "name=warned", hold=5)
    job.reach()
    cluster.login("scancel", "--batch", "--signal=USR1", str(job.number))
    job.asked()
    job.let_go()
    check_requeued(job, oracle)


def check_requeued(job: Job, oracle: Path) -> None:
    job.done()
    job.check(oracle)
    stopped = ledger(job.path, "stop")
    assert len(stopped) == 1 and 5 <= stopped[0]["step"] < STEPS and "time limit" in stopped[0]["reason"]
    assert [row["step"] for row in ledger(job.path, "start")] == [0, stopped[0]["step"]]
    assert [(row["job"], row["requeues"]) for row in ledger(job.path, "job")] == [(job.number, 0), (job.number, 1)]


def test_a_crashed_node(cluster: Cluster, corpus: Path, tmp_path: Path, oracle: Path) -> None:
    """Power is cut: Slurm starts the job again elsewhere, it goes on from the newest checkpoint.

    Who notices first is open. Where it is the ranks, their supervisor tries the nodes that it has once more, and Slurm ends that.
    """
    job = Job(cluster, corpus, tmp_path, "name=crashed", hold=6)
    job.reach()
    cluster.sh("crash", cluster.node(2))
    job.let_go()
    try:
        job.done()
    finally:
        cluster.sh("boot", cluster.node(2))
    job.check(oracle)
    before, (after,) = ([row["nodes"] for row in ledger(tmp_path, "job") if row["requeues"] == n] for n in (0, 1))
    assert before and all(nodes == [cluster.node(1), cluster.node(2)] for nodes in before)
    assert after == job.nodes()[-1] == [cluster.node(1), cluster.node(3)]
    assert [row["step"] for row in ledger(tmp_path, "start")] == [0, 4]


def test_preempted(cluster: Cluster, corpus: Path, tmp_path: Path, oracle: Path) -> None:
    """A job of a partition that may take nodes away: this one saves and is requeued."""
    job = Job(cluster, corpus, tmp_path, "name=preempted", hold=5)
    job.reach()
    urgent = cluster.login("sbatch", "--parsable", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null",
                           "--wrap=true").strip()  # fmt: skip
    job.asked()
    job.let_go()
    job.done(number=int(urgent))
    job.done()
    job.check(oracle)
    assert [row["requeues"] for row in ledger(tmp_path, "job")] == [0, 1]


def test_a_network_cut_fences_off_the_old_ranks(cluster: Cluster, corpus: Path, tmp_path: Path, oracle: Path) -> None:
    """The main rank's node is cut off, its ranks live on. The run is finished elsewhere; then they may go on, and write nothing."""
    job = Job(cluster, corpus, tmp_path, "name=cut", hold=6)
    job.reach()
    supervisor = next(pid for pid, words in cluster.processes(1).items() if b"launch.supervise" in words)
    os.kill(supervisor, signal.SIGSTOP)  # it would see that it is superseded, and end its ranks
    cluster.sh("cut", cluster.node(1))
    try:
        until(lambda: len(ledger(tmp_path, "takeover")) == 1, 90, job.log)
        job.done()
        assert job.nodes()[1] == [cluster.node(2), cluster.node(3)]
        job.check(oracle)
        before = content(tmp_path)
        job.let_go()
        until(lambda: not cluster.ranks(1), 30, lambda: f"{cluster.processes(1)}\n{job.log()}")
        assert "attempt 1 of" in job.said(1) and content(tmp_path) == before
        os.kill(supervisor, signal.SIGCONT)
        until(lambda: not cluster.processes(1), 30, lambda: f"{cluster.processes(1)}\n{job.log()}")
        assert "goes on elsewhere" in job.log() and content(tmp_path) == before
    finally:
        cluster.sh("join", cluster.node(1))
        cluster.sh("crash", cluster.node(1))  # Slurm would take a minute to find it again
        cluster.sh("boot", cluster.node(1))


def content(run: Path) -> dict[str, bytes]:
    """What a run has to show: all but the logs of the ranks."""
    kept = [run / "metrics.jsonl", run / "ledger.jsonl", *run.glob("checkpoints/**/*")]
    return {str(path): path.read_bytes() for path in kept if path.is_file()}
