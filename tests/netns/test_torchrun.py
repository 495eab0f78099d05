"""launch/torchrun.sh on two hosts with two ranks each: the numbers of four local ranks, whatever is killed or told to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hosts import STEPS, Hosts
from runs import config, ledger, rows, run, weights

GATE = Path(__file__).resolve().parents[1] / "slurm"  # gate.py there holds the main rank at a step
WITH_GATE = ["plugins=[gate]"]


@contextmanager
def started(hosts: Hosts, tmp_path: Path, words: list[str], **env: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The run on both hosts, which holds at step 6: between two checkpoints. Whatever is left of it in the end is killed."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "hold").write_text("6")
    agents = [hosts.torchrun(number, tmp_path / f"host{number}.log", *words, *WITH_GATE, PYTHONPATH=str(GATE), **env)
              for number in range(2)]  # fmt: skip
    try:
        yield agents
    finally:
        for agent in agents:
            agent.kill()
            agent.wait()


def said(tmp_path: Path) -> str:
    return "\n".join((tmp_path / f"host{number}.log").read_text()[-3000:] for number in range(2))


def until(reached: Callable[[], object], tmp_path: Path, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, said(tmp_path)
        time.sleep(0.05)


def rank(hosts: Hosts, host: str, number: int) -> int | None:
    """The process of a rank, if it runs on `host`."""
    for pid in hosts.pids(host):
        try:
            command, environment = (Path(f"/proc/{pid}/{name}").read_bytes().split(b"\0") for name in ("cmdline", "environ"))
        except OSError:
            continue
        if b"megatron_scratch.train.worker" in command and f"RANK={number}".encode() in environment:
            return pid
    return None


def ends(agents: list[subprocess.Popen[bytes]], seconds: float = 90) -> list[int]:
    return [agent.wait(seconds) for agent in agents]


def kill_one(hosts: Hosts, tmp_path: Path, rendezvous: str, killed: int) -> None:
    """SIGKILL a rank once the run holds."""
    until((tmp_path / "run" / "held").exists, tmp_path)
    # ranks 2 and 3 are those of the second host; c10d goes by the names of the hosts, and host10 comes before host2
    last = hosts.names[1 if rendezvous == "static" else 0]
    assert rank(hosts, last, 3), said(tmp_path)
    pid = rank(hosts, hosts.names[0], killed) or rank(hosts, hosts.names[1], killed)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def check_equal(path: Path, oracle: Path) -> None:
    assert rows(path) == rows(oracle)
    assert weights(path, STEPS) == weights(oracle, STEPS)


TIMES = [("static", 0), *(pytest.param(kind, n, marks=pytest.mark.full) for n in range(1, 10) for kind in ("static", "c10d"))]


@pytest.mark.parametrize(("rendezvous", "time_"), TIMES)
def test_a_killed_rank_is_started_again(rendezvous: str, time_: int, hosts: Hosts, words: list[str], tmp_path: Path,
                                        oracle: Path) -> None:  # fmt: skip
    """Each rank in its turn, those beside the store and those on the other host; what comes out is the run never killed."""
    with started(hosts, tmp_path, words, RENDEZVOUS=rendezvous, MAX_RESTARTS="2") as agents:
        kill_one(hosts, tmp_path, rendezvous, 3 - time_ % 4)
        (tmp_path / "run" / "held").unlink()
        assert ends(agents) == [0, 0], said(tmp_path)
    assert [event["step"] for event in ledger(tmp_path / "run", "start")] == [0, 4], said(tmp_path)
    check_equal(tmp_path / "run", oracle)


@pytest.mark.parametrize(("rendezvous", "host"), [("c10d", 1), pytest.param("static", 0, marks=pytest.mark.full)])
def test_killed_then_sigterm_on_one_host_stops_both(rendezvous: str, host: int, hosts: Hosts, words: list[str], tmp_path: Path,
                                                    corpus: Path, oracle: Path) -> None:  # fmt: skip
    """Exit code 75 on both, at once, and four local ranks go on: torchrun's agents alone would wait five minutes for each other in
    their last barrier, or take the stop for a failure and start the ranks again."""
    with started(hosts, tmp_path, words, RENDEZVOUS=rendezvous, MAX_RESTARTS="2") as agents:
        kill_one(hosts, tmp_path, rendezvous, 3)
        (tmp_path / "run" / "held").unlink()  # it goes on, and finds one missing
        (tmp_path / "run" / "hold").write_text("9")
        until((tmp_path / "run" / "held").exists, tmp_path)
        agents[host].send_signal(signal.SIGTERM)
        (tmp_path / "run" / "held").unlink()
        assert ends(agents, 40) == [75, 75], said(tmp_path)
    stopped = ledger(tmp_path / "run", "stop")[-1]
    assert 9 <= stopped["step"] < STEPS and (tmp_path / "run" / "checkpoints" / f"step_{stopped['step']:08d}").is_dir()
    assert run(config(corpus, tmp_path / "run", *words[-2:], world=4), 4) == [0] * 4
    assert [event["step"] for event in ledger(tmp_path / "run", "start")] == [0, 4, stopped["step"]]
    check_equal(tmp_path / "run", oracle)
