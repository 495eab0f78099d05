"""Ranks that stand still: one message names them and where they stand, stacks are kept, everything ends."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import poison
import pytest
import torch
from runs import config, ledger, run

from megatron_scratch.checkpoint.attempt import Attempt
from megatron_scratch.checkpoint.saver import Saver
from megatron_scratch.data.loader import Loader
from megatron_scratch.engine.buckets import Buckets
from megatron_scratch.engine.ddp import DDPEngine
from megatron_scratch.launch import local
from megatron_scratch.models.decoder import Decoder
from megatron_scratch.train import evaluate, heartbeat, worker
from megatron_scratch.train import step as steps
from megatron_scratch.train.activity import state_of
from megatron_scratch.train.heartbeat import SIZE
from megatron_scratch.util.env import Rank, node_name
from megatron_scratch.util.starts import Start, verdict

LIMIT = 2.0  # seconds; a step here takes 0.02
WORDS = ["train.steps=400", "checkpoint.every=0", "train.eval_every=0", "train.micro_batch_size=1", f"fault.hang_timeout={LIMIT}"]


def forever(*_: object) -> None:
    while True:
        time.sleep(60)


def at(on: int, owner: type, name: str, call: int, what: Callable[..., object] = forever) -> poison.Arm:
    """Rank `on` does `what` before the n-th call of a method."""

    def arm(rank: Rank) -> None:
        if rank.rank == on:
            poison.around(owner, name, {call: what}, before=True)

    return arm


def hangs(corpus: Path, path: Path, arm: poison.Arm, *words: str, world: int = 4) -> tuple[list[int], str, list[int]]:
    """(exit codes, the message, the ranks in the ledger) of a run that hangs."""
    codes = run(config(corpus, path, *WORDS, *words, world=world), world, arm=arm)
    (event,) = ledger(path, "hang")
    return codes, event["reason"], event["ranks"]


def stacks(path: Path) -> dict[int, str]:
    return {int(p.stem[-5:]): p.read_text() for p in (path / "logs").glob("hang_1_rank_*.txt")}


def said(capfd: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capfd.readouterr().err.splitlines() if line]


def test_a_rank_that_sleeps_in_its_data(corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    codes, reason, ranks = hangs(corpus, tmp_path, at(2, Loader, "microbatches", 5))
    assert codes == [1] * 4 and ranks == [2]
    assert reason.startswith(f"rank 2 on {node_name()} stands still in data after step 4, at test_hang.py:"), reason
    assert re.search(r"; for it wait: 3 ranks in all_reduce \d+ of world \(after step 4\)$", reason), reason
    (line,) = said(capfd)  # nobody else's traceback: those who see a connection close know why
    assert line.startswith(f"failed: hang: no progress for 2 s (fault.hang_timeout): {reason}; stacks are in {tmp_path}/logs/")
    found = stacks(tmp_path)
    assert set(found) == set(range(4)) and "forever" in found[2] and "all_reduce" in found[0] and "forever" not in found[0]


def hold_the_lock(*_: object) -> None:
    """For ever, in C, with Python's lock held: no thread of Python runs any more."""
    ctypes.PyDLL(None).pause()


def test_a_rank_that_holds_pythons_lock(corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It cannot speak: the others say that it is silent, its own end comes from a thread of C, with the stacks."""
    codes, reason, ranks = hangs(corpus, tmp_path, at(0, steps.TrainStep, "gradients", 4, hold_the_lock), world=2)
    assert codes == [1, 1] and ranks == [0]
    assert reason.startswith(f"rank 0 on {node_name()} gives no sign of life since "), reason
    assert ": its process runs, but holds Python's lock, or its disk hangs; it was last seen in " in reason
    assert "; for it wait: 1 rank in all_reduce " in reason
    lines = [line for line in said(capfd) if line.startswith("failed")]
    assert len(lines) == 1 and lines[0].startswith("failed: hang: no progress"), "rank 1 speaks, as the main one cannot"
    assert set(stacks(tmp_path)) == {1}
    assert b"hold_the_lock" in (tmp_path / "heartbeats" / "1" / "rank_00000").read_bytes()[SIZE:]


def test_a_rank_that_never_joins_a_collective_of_dp(corpus: Path, tmp_path: Path) -> None:
    """Rank 3's tp neighbour and its dp neighbour wait for it; rank 0 waits for rank 2, which is not to blame."""
    codes, reason, ranks = hangs(corpus, tmp_path, at(3, DDPEngine, "finish_gradients", 3), "parallel.tp=2")
    assert codes == [1] * 4 and ranks == [3], reason
    assert reason.startswith(f"rank 3 on {node_name()} stands still in forward/backward after step 2, at test_hang.py:"), reason


def test_a_rank_that_leaves_a_collective_out(corpus: Path, tmp_path: Path) -> None:
    """It waits in the next one: all wait, for each other, and the numbers of the collectives say who has not arrived."""

    def arm(rank: Rank) -> None:
        whole, count = Buckets._send, [0]

        def send(self: Buckets, bucket: Sequence[torch.nn.Parameter]) -> None:
            count[0] += 1
            if count[0] == 3:
                self.works.append(SimpleNamespace(wait=lambda: None))  # type: ignore[arg-type]
            else:
                whole(self, bucket)

        if rank.rank == 1:
            Buckets._send = send  # type: ignore[method-assign]

    codes, reason, ranks = hangs(corpus, tmp_path, arm, "parallel.tp=2")
    assert codes == [1] * 4 and 1 in ranks, (ranks, reason)
    assert reason.startswith("ranks wait for each other: "), reason
    assert f"rank 1 on {node_name()} has not arrived in all_reduce 3 of dp, where rank 3 on {node_name()} waits" in reason


@pytest.mark.parametrize("words", [["parallel.pp=2"], ["engine=fsdp"]], ids=str)
def test_in_the_midst_of_a_forward_pass(words: list[str], corpus: Path, tmp_path: Path) -> None:
    codes, reason, ranks = hangs(corpus, tmp_path, at(3, Decoder, "forward", 11), *words)
    assert codes == [1] * 4 and ranks == [3], reason
    assert f"rank 3 on {node_name()} stands still in forward/backward after step" in reason


def test_in_an_evaluation_and_in_a_save(corpus: Path, tmp_path: Path) -> None:
    for name, owner, method, call, phase in (("e", evaluate.Stop, "__call__", 3, "evaluate"), ("s", Saver, "start", 1, "save")):
        more = ["train.steps=2", "train.eval_every=1", "train.eval_batches=8"]
        codes, reason, ranks = hangs(corpus, tmp_path / name, at(1, owner, method, call), *more, world=2)
        assert codes == [1, 1] and ranks == [1] and f"rank 1 on {node_name()} stands still in {phase} after step" in reason, reason


def test_one_process_alone(corpus: Path, tmp_path: Path) -> None:
    codes, reason, ranks = hangs(corpus, tmp_path, at(0, Loader, "microbatches", 5), world=1)
    assert codes == [1] and ranks == [0] and "for it wait" not in reason


def test_under_a_supervisor_the_end_of_a_rank_says_why(corpus: Path, tmp_path: Path) -> None:
    """`finally` is not run: what the supervisor shows is written before."""
    start = tmp_path / "jobs" / "0001" / "starts" / "0001"
    start.mkdir(parents=True)

    def supervised(rank: Rank) -> None:
        worker.run = partial(worker.run, start=start)

    codes, reason, _ = hangs(corpus, tmp_path, poison.both(supervised, at(1, Loader, "microbatches", 3)), world=2)
    word = verdict(Start(start).ends(), 1)
    assert codes == [1, 1] and word.word == "failed"
    assert word.reason.startswith(f"rank 0 on {node_name()}: hang: no progress for 2 s (fault.hang_timeout): {reason}; stacks")
    assert word.reason.endswith(f"; rank 1 on {node_name()}: ended with the others, as ranks [1] hang"), "once is enough"


def test_a_stopped_rank_is_ended_by_its_launcher(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """SIGSTOP in a launch of four processes, as a user starts it: it is named, and nothing stays behind."""
    monkeypatch.setattr(local, "GRACE", 1.0)
    cfg = config(corpus, tmp_path, *WORDS, "train.steps=100000", world=4)
    found: list[int] = []

    def stop() -> None:
        beats = [None]
        while None in beats or beats[2].step < 3:
            beats = [heartbeat.read(tmp_path / "heartbeats" / "1", rank) for rank in range(4)]
            time.sleep(0.05)
        found.extend(beat.pid for beat in beats)
        os.kill(found[2], signal.SIGSTOP)

    other = threading.Thread(target=stop)
    other.start()
    assert local.launch(cfg, 4) == 1
    other.join()
    (event,) = ledger(tmp_path, "hang")
    assert event["ranks"] == [2] and event["reason"].startswith(f"rank 2 on {node_name()} gives no sign of life since "), event
    assert ": its process is stopped by a signal; it was last seen in" in event["reason"]
    assert set(stacks(tmp_path)) == {0, 1, 3}
    assert [line for line in said(capfd) if "hang: no progress" in line and "rank 2 on" in line], "on the terminal"
    assert not [pid for pid in found if state_of(pid) not in ("", "Z")], "nothing stays behind"


def test_a_run_in_order_is_not_called_hung(corpus: Path, tmp_path: Path) -> None:
    """A limit of about 20 steps, with evaluations, saves, and records of ranks that are well taken away."""
    more = ["fault.hang_timeout=1.5", "train.steps=60", "train.eval_every=20", "checkpoint.every=15", "checkpoint.async_save=true"]
    cfg = config(corpus, tmp_path, *more, world=2)
    assert run(cfg, 2) == [0, 0] and not ledger(tmp_path, "hang") and not list((tmp_path / "heartbeats").iterdir())


def test_a_long_save_is_no_hang_while_the_main_rank_works(corpus: Path, tmp_path: Path) -> None:
    """Three times the limit; the other rank waits for it in a message, is the first to notice, and waits on."""

    def work(*_: object) -> None:
        until = time.monotonic() + 3.0
        while time.monotonic() < until:
            sum(range(10000))

    cfg = config(corpus, tmp_path, *WORDS, "fault.hang_timeout=1", "train.steps=3", world=2)
    assert run(cfg, 2, arm=at(0, Attempt, "commit", 1, work)) == [0, 0] and not ledger(tmp_path, "hang")
    assert not stacks(tmp_path)
