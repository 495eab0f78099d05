"""Who holds up a run, from records of all ranks; what a record holds; what asks a run for something."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_scratch.config.fault import FaultConfig, check_fault, check_replicas
from megatron_scratch.logs.followers import End
from megatron_scratch.train import heartbeat
from megatron_scratch.train.activity import Activity
from megatron_scratch.train.fault import LOOK_EVERY, SAVE, STOP, StopFlag, told
from megatron_scratch.train.hang import Hang, judge
from megatron_scratch.train.heartbeat import SIZE, Beat, Group, Pulse, Recorder, unpacked
from megatron_scratch.util.errors import UserError
from megatron_scratch.util.machine import descendants

LIMIT, SLACK, NOW = 100.0, 3.0, 10_000.0


def beat(rank: int, waits: bool = True, idle: float = LIMIT, **more: object) -> Beat:
    groups = more.pop("groups", {"0": Group("world", 7, 7, "all_reduce")} if waits else {"0": Group("world", 6)})
    fields = {"host": f"node{rank // 2}", "pid": 1, "count": 500, "time": NOW - 1, "phase": "data", "step": 12, "at": "x.py:3 f"}
    return Beat(rank, **{**fields, "idle": idle, "waits": waits, "groups": groups, **more})  # type: ignore[arg-type]


def judged(*beats: Beat | None, before: list[Beat | None] | None = None) -> Hang | None:
    """The second look finds `beats`, the first one two beats less."""
    earlier = [b and replace(b, count=b.count - 2) for b in beats] if before is None else before
    return judge(earlier, list(beats), NOW, LIMIT, SLACK, "elsewhere")


def test_the_one_that_does_not_wait() -> None:
    found = judged(beat(0), beat(1), beat(2, waits=False), beat(3))
    assert found == Hang("rank 2 on node1 stands still in data after step 12, at x.py:3 f; for it wait: 3 ranks in "
                         "all_reduce 7 of world (after step 12)", [2], [])  # fmt: skip


def test_one_that_works_is_not_to_blame() -> None:
    """Others wait for it longer than the limit; it has done something since."""
    assert judged(beat(0, waits=False, idle=LIMIT / 2), beat(1), beat(2)) is None
    assert judged(beat(0, waits=False, idle=LIMIT - SLACK - 1), beat(1)) is None
    assert judged(beat(0, waits=False, idle=LIMIT - SLACK + 1), beat(1)) is not None, "ranks notice some beats apart"


def test_one_that_works_does_not_hide_one_that_does_not() -> None:
    found = judged(beat(0, waits=False, idle=0), beat(1), beat(2, waits=False))
    assert found is not None and found.ranks == [2]


def test_a_silent_rank() -> None:
    old = beat(1, waits=False, idle=1, time=NOW - LIMIT)
    found = judged(beat(0), old, before=[beat(0, count=498), old])
    assert found is not None and (found.ranks, found.silent) == ([1], [1])
    assert found.message.startswith("rank 1 on node0 gives no sign of life since ")
    assert "its process or its host does not run; it was last seen in data after step 12; for it wait: 1 rank in" in found.message


def test_a_clock_that_is_wrong_and_a_slow_disk_make_nobody_silent() -> None:
    wrong = beat(1, time=NOW - 3600)
    late = beat(2, time=NOW - LIMIT / 4)
    found = judged(beat(0), wrong, late, before=[beat(0, count=498), replace(wrong, count=498), late])
    assert found is not None and found.silent == []


def test_a_rank_without_a_record() -> None:
    found = judged(beat(0), None)
    assert found is not None and found.ranks == [1] and "rank 1 has never given a sign of life" in found.message


def test_all_wait_for_each_other() -> None:
    """Rank 1 has left out the 3rd message of its dp group, and waits where rank 3, which waits for it there, cannot come."""

    def of(world: int, dp: int, group: str) -> dict[str, Group]:
        return {"0": Group("world", world, world if world == 7 else 0, "all_reduce"),
                group: Group("dp", dp, dp if world == 6 else 0, "reduce_scatter")}  # fmt: skip

    found = judged(*(beat(r, groups=of(*state)) for r, state in enumerate([(7, 3, "a"), (7, 2, "b"), (7, 3, "a"), (6, 3, "b")])))
    assert found is not None and found.ranks == [1, 3]
    assert "rank 1 on node0 has not arrived in reduce_scatter 3 of dp, where rank 3 on node1 waits" in found.message
    assert "rank 3 on node1 has not arrived in all_reduce 7 of world, where rank 0 on node0, rank 1" in found.message


def test_all_have_arrived() -> None:
    found = judged(beat(0), beat(1))
    assert found is not None and found.ranks == [] and "look at the network" in found.message


def test_messages_still_come_through() -> None:
    assert judged(beat(0), beat(1, idle=2.0), beat(2)) is None


def test_a_thousand_ranks_make_one_line() -> None:
    found = judged(*(beat(r, waits=False) for r in range(1000)))
    assert found is not None and len(found.ranks) == 1000 and len(found.message) < 1000 and "and 992 more ranks" in found.message


def test_a_record_has_one_size_and_comes_back(tmp_path: Path) -> None:
    one = beat(3)
    assert len(one.packed()) == SIZE and unpacked(one.packed()) == one
    many = replace(one, groups={str(n): Group("replicate", 10**9, 10**9, "reduce_scatter_tensor_coalesced") for n in range(40)})
    assert len(many.packed()) == SIZE and unpacked(many.packed()) == replace(many, groups={})
    for content in (b"", one.packed()[:100], b"null".ljust(SIZE), b"[1]".ljust(SIZE), b'{"rank": 1}'.ljust(SIZE)):
        assert unpacked(content) is None
    assert heartbeat.read(tmp_path, 3) is None


def test_what_the_recorder_tells() -> None:
    recorder = Recorder.__new__(Recorder)
    recorder.groups = {"0": Group("world"), "2": Group("dp")}

    def entry(group: str, number: int, retired: bool, **more: object) -> dict[str, object]:
        return {"process_group": [group, "x"], "collective_seq_id": number, "retired": retired, "state": "scheduled",
                "profiling_name": "gloo:all_gather", "is_p2p": False, **more}  # fmt: skip

    assert not recorder._take([entry("0", 4, True), entry("2", 8, False), entry("2", 9, False), entry("other", 1, False)])
    assert recorder.groups == {"0": Group("world", 4, 0, "all_gather"), "2": Group("dp", 9, 8, "all_gather")}, "the first open one"
    assert recorder._take([entry("2", 10, False, profiling_name="nccl:all_reduce"), entry("0", 1, False, is_p2p=True)])
    assert recorder.groups["2"] == Group("dp", 10, 10, "all_reduce") and recorder.groups["0"].begun == 4


def test_a_first_pass_may_compile() -> None:
    pulse, seen = Pulse(compiles=True), []
    for phase in ("data", "forward/backward", "update", "forward/backward"):
        pulse.enter(phase)
        seen.append(pulse.phase)
    with pulse.during("evaluate"):
        seen.append(pulse.phase)
    assert seen == ["data", "compile", "update", "forward/backward", "compile"] and pulse.phase == "forward/backward"


def test_activity() -> None:
    """Work is seen, sleep is not, and work of long ago says nothing of now."""
    here, stale, idle = Activity(window=60.0), Activity(window=0.0), Activity(window=60.0)
    until = time.process_time() + 0.1
    while time.process_time() < until:
        pass
    idle._switches = lambda: idle.switches  # type: ignore[method-assign]
    idle.cpu = time.process_time()
    idle.at -= 10.0
    assert here.seen() and not stale.seen() and not idle.seen()


WORKS = "import time; u = time.process_time() + 30\nwhile time.process_time() < u: pass"


def test_the_work_of_a_process_that_it_has_started_counts() -> None:
    with subprocess.Popen([sys.executable, "-c", WORKS]) as child:
        here = Activity(window=60.0)
        here._switches = lambda: here.switches  # type: ignore[method-assign]
        deadline = time.monotonic() + 30
        while not (found := here.seen()) and time.monotonic() < deadline:
            time.sleep(0.05)  # the kernel counts in hundredths
        child.kill()
    assert found


def test_the_work_of_one_that_follows_the_run_does_not() -> None:
    """It goes on while the rank hangs: a follower has a session of its own, and so has what it starts."""
    with subprocess.Popen([sys.executable, "-c", WORKS], start_new_session=True) as child:
        there, helpers = descendants(os.getpid()), Activity(window=60.0)._helpers()
        child.kill()
    assert child.pid in there and child.pid not in helpers


def test_a_follower_is_one_of_those(tmp_path: Path) -> None:
    end = End("tensorboard", tmp_path)
    end.start(0)
    assert end.process is not None
    pid, helpers = end.process.pid, Activity(window=60.0)._helpers()
    end.finish(time.monotonic())
    assert pid not in helpers


def test_what_a_run_is_asked_for(tmp_path: Path) -> None:
    now = [0.0]
    flag = StopFlag([tmp_path / "stop"], tmp_path / "save", clock=lambda: now[0])
    assert flag.asked() == 0
    (tmp_path / "save").touch()
    assert flag.asked() == 0, "it has looked in this second"
    now[0] += LOOK_EVERY
    assert [flag.asked(), flag.asked()] == [SAVE, 0], "once a look: the next step has begun the checkpoint"
    now[0] += LOOK_EVERY
    (tmp_path / "stop").write_text("maintenance\n")
    assert flag.asked() == SAVE + STOP and flag.reason == "maintenance"
    (tmp_path / "save").unlink()
    assert flag.asked() == STOP and flag.stops()


def test_what_ranks_were_asked_for_adds_up() -> None:
    for world in (1, 2, 3, 4096):
        for stops in {0, 1, world}:
            for saves in {0, 1, world}:
                asked = stops * STOP + saves * SAVE
                assert (told(asked, STOP), told(asked, SAVE)) == (stops > 0, saves > 0)


@pytest.mark.parametrize(("more", "message"), [
    ({"hang_timeout": 0.5}, "fault.hang_timeout=0.5 must be 0"), ({"hang_timeout": -1}, "fault.hang_timeout=-1 must be 0"),
    ({"hang_timeout": float("nan")}, "must be 0"), ({"hang_timeout": float("inf")}, "must be 0"),
    ({"straggler": 1.0}, "fault.straggler=1 must be 0"), ({"straggler": float("nan")}, "must be 0"),
])  # fmt: skip
def test_refused(more: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_fault(FaultConfig(**more), 100, 10)  # type: ignore[arg-type]


@pytest.mark.parametrize(("engine", "dp", "allowed"), [("ddp", 2, True), ("zero1", 2, True), ("hsdp", 4, True),
                                                       ("ddp", 1, False), ("fsdp", 4, False), ("zero3", 4, False)])  # fmt: skip
def test_stragglers_where_none_can_be_told(engine: str, dp: int, allowed: bool) -> None:
    for ratio in (0.0, FaultConfig.straggler):
        check_replicas(FaultConfig(straggler=ratio), engine, dp)
    if allowed:
        return check_replicas(FaultConfig(straggler=2.0), engine, dp)
    with pytest.raises(UserError, match=f"fault.straggler=2 has no effect with engine={engine}"):
        check_replicas(FaultConfig(straggler=2.0), engine, dp)
