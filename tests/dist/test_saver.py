"""Saves beside training: what is written is what was there when the save began, whatever happens meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from torch.distributed.tensor import DTensor, Shard

from megatron_scratch.checkpoint import saver as saver_module
from megatron_scratch.checkpoint.attempt import Attempt
from megatron_scratch.checkpoint.background import Background
from megatron_scratch.checkpoint.manifest import committed, read, tensor, verify
from megatron_scratch.checkpoint.plan import FILE_BYTES, Planner, make_plan
from megatron_scratch.checkpoint.saver import Saver
from megatron_scratch.checkpoint.store import on_main
from megatron_scratch.config.train import CheckpointConfig
from megatron_scratch.parallel import SINGLE, Topology
from megatron_scratch.util.errors import RunFailed

ASYNC = CheckpointConfig(async_save=True, keep_last=1)


def state(step: float, topo: Topology = SINGLE) -> dict[str, torch.Tensor]:
    """A matrix cut over the ranks, one that all hold, a counter, numbers of two widths and an odd count."""
    cut = torch.arange(24.0).view(8, 3) + step
    if topo.mesh is not None:
        cut = DTensor.from_local(cut.chunk(topo.world)[topo.rank].clone(), topo.axes["dp"], [Shard(0)], run_check=False)
    return {"model.w": cut, "model.n": torch.full((5,), step, dtype=torch.bfloat16), "model.x": torch.full((7,), step),
            "optim.w.step": torch.tensor(step)}  # fmt: skip


def held(folder: Path) -> dict[str, list[float]]:
    manifest = verify(folder)
    return {name: torch.from_numpy(tensor(folder, saved).reshape(-1)).view(getattr(torch, saved.dtype)).float().tolist()
            for name, saved in manifest.tensors.items()}  # fmt: skip


def wanted(step: float) -> dict[str, list[float]]:
    return {name: t.reshape(-1).float().tolist() for name, t in state(step).items()}


def _saves(topo: Topology, root: str) -> list[tuple[int, list[int]]]:
    attempt = Attempt(Path(root), on_main(lambda: Attempt.claim(Path(root)).number, topo, 0))
    saver, live, done = Saver(ASYNC, attempt, topo), state(0.0, topo), []
    for step in (1, 2, 3):
        for name, value in state(float(step), topo).items():
            live[name].copy_(value)
        assert saver.start(step, live, {"samples": step}) is None
        saver.copied()
        for value in live.values():
            value.zero_()  # training goes on
        saved = saver.finish()
        assert saved is not None and saved.path.is_dir() and 0 < saved.blocked
        done.append((saved.step, saved.retired))
    saver.close()
    return done


@pytest.mark.parametrize("world", [1, 2])
def test_what_is_saved_is_what_was_there(world: int, tmp_path: Path) -> None:
    done = [_saves(SINGLE, str(tmp_path))] if world == 1 else run_ranks(world, _saves, str(tmp_path))
    assert done == [[(1, []), (2, [1]), (3, [2])]] * world
    assert committed(tmp_path) == [3] and held(tmp_path / "step_00000003") == wanted(3.0)
    assert len(read(tmp_path / "step_00000003").files) == world


def test_poll_does_not_wait_and_says_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = Attempt.claim(tmp_path)
    saver, release, seen = Saver(ASYNC, attempt, SINGLE), threading.Event(), threading.Event()
    copy = Saver._copy

    def slow(self: Saver, *args: object) -> object:
        seen.set()
        release.wait()
        return copy(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Saver, "_copy", slow)
    monkeypatch.setattr(Saver, "copied", lambda self: None)  # a poll before the update
    saver.start(1, state(1.0), {})
    seen.wait()
    assert saver.poll() is None and saver.save is not None and committed(tmp_path) == []
    monkeypatch.undo()
    release.set()
    saved = saver.finish()
    assert saved is not None and saved.step == 1 and saver.poll() is None and saver.finish() is None
    saver.close()


def _one_fails(topo: Topology, root: str) -> str:
    attempt = Attempt(Path(root), on_main(lambda: Attempt.claim(Path(root)).number, topo, 0))
    saver = Saver(ASYNC, attempt, topo)
    saver.start(1, state(1.0, topo), {})
    saver.finish()
    if topo.rank == 1:
        assert saver.background is not None
        saver.background.process.kill()
    saver.start(2, state(2.0, topo), {})
    try:
        while saver.poll() is None:
            pass
    except RunFailed as error:
        return str(error)
    finally:
        saver.close()
    return ""


def test_a_failure_of_one_rank_is_heard_of_by_all(tmp_path: Path) -> None:
    said = run_ranks(2, _one_fails, str(tmp_path))
    assert said[0] == said[1] and "step 2 could not be written (the background process has ended with -9)" in said[0]
    assert committed(tmp_path) == [1] and held(tmp_path / "step_00000001") == wanted(1.0)


def _plans(topo: Topology) -> list[int]:
    made = [0]
    original = saver_module.Planner.plan.__globals__["make_plan"]

    def counted(*args: object) -> object:
        made[0] += 1
        return original(*args)

    saver_module.Planner.plan.__globals__["make_plan"] = counted
    planner, out = Planner(topo), []
    for values in (state(1.0, topo), state(2.0, topo), {**state(3.0, topo), "optim.w.more": torch.ones(3 + topo.rank * 0)}):
        planner.plan(values)
        out.append(made[0])
    only_one = state(4.0, topo) | ({"optim.w.more": torch.ones(3)} if topo.rank else {})
    planner.plan(only_one)
    return [*out, made[0]]


def test_a_plan_is_made_again_only_when_somebodys_boxes_change() -> None:
    """The last change is on rank 0 alone: the others must not go on with the old plan."""
    assert run_ranks(2, _plans) == [[1, 1, 2, 3]] * 2


def test_a_plan_shares_the_work_out_and_leaves_nothing_out() -> None:
    """Four ranks: a matrix in halves, each held twice, and a large one that all hold."""
    listings = [{"model.a": ["float32", [8, 4], [[[4 * (r % 2), 0], [4, 4]]]], "model.b": ["float32", [64], [[[0], [64]]]],
                 "model.c": ["bfloat16", [3], [[[0], [3]]]]} for r in range(4)]  # fmt: skip
    plans = [make_plan(listings, rank) for rank in range(4)]
    assert all(plan.tensors == plans[0].tensors for plan in plans)
    written = [sorted(slot.key for slots in plan.files.values() for slot in slots) for plan in plans]
    assert sorted(key for keys in written for key in keys) == ["model.a@0,0", "model.a@4,0", "model.b@0", "model.c@0"]
    assert [len(keys) for keys in written] == [1] * 4, "each box by one rank, and no rank two while another has none"
    assert plans[0].bytes == 32 * 4 + 64 * 4 + 3 * 2


def test_a_number_that_nobody_holds_is_a_bug_that_is_seen() -> None:
    with pytest.raises(AssertionError, match="held by nobody"):
        make_plan([{"model.a": ["float32", [8], [[[0], [4]]]]}], 0)


def test_large_states_are_cut_into_files() -> None:
    third = FILE_BYTES // 12
    plan = make_plan([{f"model.{n}": ["float32", [third], [[[0], [third]]]] for n in "abcdefg"}], 0)
    assert [len(slots) for slots in plan.files.values()] == [3, 3, 1]


@pytest.mark.parametrize("up", [False, True])
def test_signals_of_a_scheduler_do_not_end_it(up: bool, tmp_path: Path) -> None:
    """They go to all processes of a job, in their first moment too; the rank is about to save."""
    background = Background()
    if up:
        background.submit({"write": str(tmp_path), "files": {}})
        assert background.answer() == {"files": {}}  # it has set its handlers
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        background.process.send_signal(number)
    background.room(64)[:3] = b"abc"
    background.submit({"write": str(tmp_path), "files": {"x": [0, 3]}})
    assert background.answer()["files"]["x"][0] == 3 and (tmp_path / "x").read_bytes() == b"abc"
    background.close()


def test_it_dies_with_its_rank() -> None:
    code = ("import os, signal; from megatron_scratch.checkpoint.background import Background; b = Background(); "
            "b.submit({'write': '/nowhere', 'files': {}}); b.answer(); print(b.process.pid, flush=True); "
            "os.kill(os.getpid(), signal.SIGKILL)")  # fmt: skip
    rank = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    pid = int(rank.stdout)
    for _ in range(10_000):  # it has the signal by then, and some time to end
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return
        if state == "Z":
            return
        os.sched_yield()
    os.kill(pid, signal.SIGKILL)
    pytest.fail("it is still there")
