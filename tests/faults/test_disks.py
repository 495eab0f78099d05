"""Disks that are full, fail, or cannot be written to: loud, older checkpoints intact, and on it goes after the repair."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hog import fill
from kills import BASE, Layout, differences, unreadable
from points import wrap
from runs import config, run

from megatron_scratch.checkpoint.manifest import committed
from megatron_scratch.train.rundir import RunDir
from megatron_scratch.util.env import Rank

LAYOUTS = {"one": Layout(1), "two": Layout(2), "async_two": Layout(2, ("checkpoint.async_save=true",))}


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Path]]:
    root = tmp_path_factory.mktemp("whole")
    for world in (1, 2):
        assert run(config(corpus, root / str(world), *BASE, world=world), world) == [0] * world
    yield {world: root / str(world) for world in (1, 2)}


def fail_write(number: int, rank: int, nth: int) -> Any:
    """The n-th write of a checkpoint's bytes on a rank fails."""

    def arm(me: Rank) -> None:
        came = [0]

        def write(original: Any, fd: int, content: memoryview) -> None:
            came[0] += 1
            if came[0] == nth:
                os.write(fd, content[: len(content) // 2])
                raise OSError(number, os.strerror(number))
            original(fd, content)

        if me.rank == rank:
            wrap("megatron_scratch.checkpoint.shard:write_all", write)

    return arm


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT], ids=lambda n: errno.errorcode[n])
def test_a_write_fails(number: int, world: int, corpus: Path, tmp_path: Path, capfd: Any, whole: dict[int, Path]) -> None:
    cfg = config(corpus, tmp_path / "r", *BASE, world=world)
    assert run(cfg, world, arm=fail_write(number, world - 1, 12)) == [1] * world
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("failed")]
    assert len(lines) == world and all("the checkpoint of step" in line and os.strerror(number) in line for line in lines)
    assert unreadable(tmp_path / "r") == []
    assert run(cfg, world) == [0] * world
    assert differences(tmp_path / "r", whole[world]) == []


@pytest.mark.parametrize("layout", ["one", "async_two"])
def test_no_file_may_grow(layout: str, corpus: Path, tmp_path: Path, capfd: Any, whole: dict[int, Path]) -> None:
    """A limit of the system, which also the process that writes beside training runs into."""
    world, overrides = LAYOUTS[layout].world, LAYOUTS[layout].overrides

    def limited(rank: Rank) -> None:
        if rank.rank == world - 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    cfg = config(corpus, tmp_path / "r", *BASE, *overrides, "train.steps=4", "schedule.steps=7", world=world)
    assert run(cfg, world, arm=limited) == [1] * world
    assert "File too large" in capfd.readouterr().err and committed(tmp_path / "r" / "checkpoints") == []
    assert run(config(corpus, tmp_path / "r", *BASE, *overrides, world=world), world) == [0] * world
    assert differences(tmp_path / "r", whole[world]) == []


def test_a_failure_beside_training_is_heard_of_in_the_next_step(corpus: Path, tmp_path: Path, capfd: Any) -> None:
    """The writing process dies; nobody waits for the end of the run to find out."""

    def arm(rank: Rank) -> None:
        def submit(original: Any, self: Any, job: dict[str, Any]) -> None:
            self.process.kill()
            self.process.wait()
            original(self, job)

        wrap("megatron_scratch.checkpoint.background:Background.submit", submit)

    cfg = config(corpus, tmp_path / "r", *BASE, "checkpoint.async_save=true", "train.steps=50", "schedule.steps=50")
    assert run(cfg, arm=arm) == [1]
    err = capfd.readouterr().err
    assert "the checkpoint of step 2 could not be written (the background process has ended with -9)" in err
    assert committed(tmp_path / "r" / "checkpoints") == []
    steps = [line for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert len(steps) <= 4, "the save began after step 2"


def test_a_disk_that_is_full_before_anything_is_written(small_disk: Path, corpus: Path, capfd: Any) -> None:
    cfg = config(corpus, small_disk / "r", *BASE, "model.hidden_size=64", "model.ffn_size=256")
    assert run(cfg) == [1]
    err = capfd.readouterr().err
    assert "no space left: it needs" in err and "the ones before it are whole" in err and unreadable(small_disk / "r") == []


def test_a_disk_that_becomes_full_and_has_room_again(small_disk: Path, corpus: Path, capfd: Any, whole: dict[int, Path]) -> None:
    """Another file takes the room away in the midst of a run; without it the run goes on, bitwise."""
    cfg = config(corpus, small_disk / "r", *BASE)

    def arm(rank: Rank) -> None:
        def stage(original: Any, self: Any, step: int) -> Any:
            if step == 4:
                fill(small_disk)
            return original(self, step)

        wrap("megatron_scratch.checkpoint.attempt:Attempt.stage", stage)

    assert run(cfg, arm=arm) == [1]
    assert "pace left" in capfd.readouterr().err and committed(small_disk / "r" / "checkpoints") == [2]
    assert unreadable(small_disk / "r") == []
    (small_disk / "hog").unlink()
    assert run(cfg) == [0]
    assert differences(small_disk / "r", whole[1]) == []


def test_a_disk_that_cannot_be_written_to(small_disk: Path, corpus: Path, capfd: Any) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert run(config(corpus, small_disk / "r", *BASE)) == [2]
    assert "cannot be written: Read-only file system; give another dir=" in capfd.readouterr().err


def test_what_is_under_way_is_not_lost_with_a_run_that_fails(corpus: Path, tmp_path: Path, capfd: Any) -> None:
    """The loss is no number in the step after a save began, and the save takes longer than the step."""

    def arm(rank: Rank) -> None:
        wrap("megatron_scratch.checkpoint.background:Background.ready", lambda original, self: False)
        wrap("megatron_scratch.train.step:shared_numbers",
             lambda original, *a: (float("nan"), 1.0) if came.append(0) or len(came) == 3 else original(*a))  # fmt: skip

    came: list[int] = []
    cfg = config(corpus, tmp_path / "r", *BASE, "checkpoint.async_save=true", world=2)
    assert run(cfg, 2, arm=arm) == [1, 1]
    assert "step 3: loss nan" in capfd.readouterr().err and committed(tmp_path / "r" / "checkpoints") == [2]
    assert unreadable(tmp_path / "r") == []


def test_a_checkpoint_that_is_damaged_when_it_is_read_again(corpus: Path, tmp_path: Path, capfd: Any) -> None:
    """In the midst of a run it is set aside, and nothing older is deleted for it; as the last word of a run it is a failure."""

    def damage(steps: tuple[int, ...]) -> Any:
        def arm(rank: Rank) -> None:
            def commit(original: Any, self: Any, step: int) -> Path:
                folder = original(self, step)
                if step in steps:
                    with open(folder / "rank_00000_000.safetensors", "r+b", buffering=0) as f:
                        f.seek(-1, os.SEEK_END)
                        f.write(b"\xff")
                return folder  # type: ignore[no-any-return]

            wrap("megatron_scratch.checkpoint.attempt:Attempt.commit", commit)

        return arm

    for steps, code, left in (((4,), 0, [7]), ((4, 7), 1, [6]), ((7,), 1, [6])):
        path = tmp_path / str(len(steps)) / str(code)
        assert run(config(corpus, path, *BASE), arm=damage(steps)) == [code]
        out = capfd.readouterr()
        assert f"the checkpoint of step {steps[0]} was damaged when it was read again" in out.out
        assert committed(path / "checkpoints") == left and unreadable(path) == []
        assert [p.name for p in sorted((path / "checkpoints").glob("corrupt_*"))] == [f"corrupt_step_{s:08d}" for s in steps]
        if code:
            assert "it is set aside, the ones before it are whole: run the same command again" in out.err
            assert run(config(corpus, path, *BASE)) == [0] and committed(path / "checkpoints") == [7]


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts fence there; any other failure of a lock is a failure."""
    run_dir = RunDir(tmp_path / "r")
    run_dir.create()

    def flock(number: int) -> Any:
        def fail(*args: object) -> None:
            raise OSError(number, os.strerror(number))

        return fail

    monkeypatch.setattr("megatron_scratch.train.rundir.fcntl.flock", flock(errno.ENOLCK))
    with run_dir.locked():
        assert "process" in (run_dir.path / ".lock").read_text()
    monkeypatch.setattr("megatron_scratch.train.rundir.fcntl.flock", flock(errno.EIO))
    with pytest.raises(OSError, match="Input/output"), run_dir.locked():
        pass
