"""`data prepare` killed anywhere and run again: the same bytes as one that never was, only unfinished tasks run, nobody is left."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import prepared
import pytest
from prepared import Watched, all_end, content, make_corpus

from megatron_scratch.config.corpus import CorpusConfig
from megatron_scratch.corpus import pipeline
from megatron_scratch.corpus.engines.local import _Worker
from megatron_scratch.util.errors import UserError

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir")  # audit events of the interpreter, besides opening to write


# every operation on files, one process


def config(source: Path, output: Path) -> CorpusConfig:
    return CorpusConfig(input=f"{source}/part_*.jsonl", output=str(output), tokenizer="byte", workers=1, spans="line",
                        span_chars=10, valid_fraction=0.2, decontaminate=[f"{source}/eval.json"], min_chars=5)  # fmt: skip


def kill_at(folder: Path, nth: int) -> None:
    """End this process before the n-th time that it makes, renames or removes anything in `folder`."""
    came, root = [0], str(folder)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            writes = set("wax+") & set(args[1]) if args[1] else args[2] & (os.O_WRONLY | os.O_RDWR)
            if not writes or not str(args[0]).startswith(root):
                return
        elif event not in CHANGES or not (str(args[0]).startswith(root) or args[-1] != -1):  # shutil.rmtree works by descriptors
            return
        came[0] += 1
        if came[0] == nth:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def forked(source: Path, output: Path, nth: int) -> int:
    """Prepare in a forked process that dies at its n-th operation; the exit code."""

    def work() -> None:
        kill_at(output, nth)
        pipeline.prepare(config(source, output))
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(prepared.WAIT)
    assert process.exitcode is not None
    return process.exitcode


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    root = tmp_path_factory.mktemp("small")
    source = make_corpus(root / "in", files=2, documents=25, words=60)
    manifest = pipeline.prepare(config(source, root / "out"))
    assert {"not JSON", "near copy", "exact copy", "contaminated"} <= set(manifest["dropped"]), "every stage has something to do"
    return source, content(root / "out")


@pytest.mark.parametrize("seed", range(3))
def test_killed_again_and_again_between_any_two_operations(seed: int, small: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    """Each start goes on where the one before it died. The gaps grow: the last step, which joins all, has 100 operations or so."""
    (source, wanted), rng = small, random.Random(seed)
    codes = []
    while not codes or codes[-1]:
        codes.append(forked(source, tmp_path / "out", rng.randint(3, 60) + len(codes)))
        assert len(codes) < 200, "it does not get on"
    assert set(codes[:-1]) == {-signal.SIGKILL} and len(codes) > 8
    assert content(tmp_path / "out") == wanted


@pytest.mark.full
@pytest.mark.parametrize("part", [0, 3, 6])
def test_killed_once_at_every_operation(part: int, small: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    source, wanted = small
    for nth in range(1 + part, 2000, 8):
        output = tmp_path / str(nth)
        if (code := forked(source, output, nth)) == 0:
            return
        assert code == -signal.SIGKILL
        pipeline.prepare(config(source, output))
        assert content(output) == wanted, nth
    raise AssertionError("no run has so many operations")


# a coordinator with workers


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], dict[str, str]]:
    """(words of the command, what an uninterrupted run gives): 5 tasks in a stage."""
    root = tmp_path_factory.mktemp("larger")
    source = make_corpus(root / "in", files=5, documents=140, words=1000)
    words = [f"corpus.input={source}", "corpus.workers=2", "corpus.shard_mb=1", "corpus.tokenizer_bytes=50000",
             "corpus.vocab_size=300", "corpus.spans=line", "corpus.clean=[newlines,whitespace,length]"]  # fmt: skip
    done = prepared.prepare(root / "out", *words)
    assert done.returncode == 0, done.stderr
    return words, content(root / "out")


def stamps(output: Path) -> dict[Path, tuple[int, int]]:
    found = {p: p.stat() for p in sorted((output / ".prepare").glob("*/*.done"))}
    return {p: (s.st_ino, s.st_mtime_ns) for p, s in found.items()}


def strike(run: Watched, victim: str) -> list[int]:
    """Kill the coordinator, one worker, or all of them at once; pidfds of all workers."""
    pids = run.workers()
    fds = [os.pidfd_open(pid) for pid in pids]
    for pid in {"coordinator": [run.process.pid], "worker": pids[:1], "all": [*pids, run.process.pid]}[victim] or [run.process.pid]:
        os.kill(pid, signal.SIGKILL)
    return fds


@pytest.mark.parametrize("seed,kills", [(1, 12), *(pytest.param(s, 40, marks=pytest.mark.full) for s in range(2, 8))])
def test_killed_at_random_moments(seed: int, kills: int, larger: tuple[list[str], dict[str, str]], tmp_path: Path) -> None:
    """Of the coordinator, of a worker alone, of all: tasks that were finished stay as they are, and no process is left."""
    (words, wanted), rng, output = larger, random.Random(seed), tmp_path / "out"
    counted: list[str] = []
    for i in range(kills):
        run, before = Watched(output, *words), stamps(output)
        victim = ("coordinator", "worker", "all")[i % 3]
        if not run.until(rng.randint(1, 4)):
            assert run.end()[0] == 0
            break
        lonely = victim == "worker" and bool(run.workers())
        fds = strike(run, victim)
        assert all_end(fds), "an orphan works on"
        code, said = run.end()
        if lonely and code != 0:  # 0: it was struck after the last task that was its own
            assert code == 1 and said.count("\n") == 1, said
            assert said.startswith("failed: a worker process ended with code -9") and "the same command goes on" in said
        after = stamps(output)
        assert before.items() <= after.items() or not (output / ".prepare").exists(), "a finished task ran again"
        counted += run.seen
    done = prepared.prepare(output, *words)
    assert done.returncode == 0, done.stderr
    assert len(counted) == len(set(counted)), "no count comes twice: what is done is not done again"
    assert content(output) == wanted


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("workers", [1, 2])
def test_asked_to_end(number: int, workers: int, larger: tuple[list[str], dict[str, str]], tmp_path: Path) -> None:
    words, wanted = larger
    run = Watched(tmp_path / "out", *words, f"corpus.workers={workers}")
    assert run.until(3)
    fds = [os.pidfd_open(pid) for pid in run.workers()]
    assert len(fds) == (workers if workers > 1 else 0)
    run.process.send_signal(number)
    assert all_end(fds)
    code, said = run.end()
    assert code == 75, said
    name = signal.Signals(number).name
    assert said == f"stopped: {name}; what is finished is kept, the same command goes on where this one stopped\n"
    assert prepared.prepare(tmp_path / "out", *words).returncode == 0
    assert content(tmp_path / "out") == wanted


def test_a_signal_to_a_worker_that_has_only_begun() -> None:
    worker = _Worker()
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
        worker.process.send_signal(number)
    assert "No such file" in worker._ask("/nowhere", 0)["error"], "it lives, and answers"
    worker.end()


def test_a_signal_to_all_processes_of_a_job(larger: tuple[list[str], dict[str, str]], tmp_path: Path) -> None:
    """As Slurm sends them: the workers take no notice, it is for the coordinator to say."""
    words, _ = larger
    run = Watched(tmp_path / "out", *words)
    assert run.until(2)
    pids = run.workers()
    fds = [os.pidfd_open(pid) for pid in pids]
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
        for pid in pids:
            os.kill(pid, number)
    assert run.until(1), "work goes on"
    run.process.send_signal(signal.SIGTERM)
    assert all_end(fds) and run.end()[0] == 75


# two at once


def test_two_in_one_folder_and_the_lock_of_a_killed_one(larger: tuple[list[str], dict[str, str]], tmp_path: Path) -> None:
    words, wanted = larger
    run = Watched(tmp_path / "out", *words)
    assert run.until(2)
    run.process.send_signal(signal.SIGSTOP)
    second = prepared.prepare(tmp_path / "out", *words)
    assert second.returncode == 2 and second.stderr.startswith("error: corpus.output=")
    assert second.stderr.endswith("is being written by another process; wait, or choose another folder\n")
    fds = strike(run, "coordinator")
    assert all_end(fds)
    run.end()
    assert prepared.prepare(tmp_path / "out", *words).returncode == 0
    assert content(tmp_path / "out") == wanted


def test_output_of_something_else(larger: tuple[list[str], dict[str, str]], tmp_path: Path) -> None:
    """An unfinished folder is not taken for somebody else's, and somebody else's not for ours."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train.bin").write_bytes(b"precious")
    done = prepared.prepare(tmp_path / "out", *larger[0])
    assert done.returncode == 2 and "is not ours" in done.stderr
    assert (tmp_path / "out" / "train.bin").read_bytes() == b"precious"


def test_a_damaged_marker_is_no_marker(small: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    """Half written, empty, of another shape, or of a file that was cut: the task runs again."""
    source, wanted = small
    assert forked(source, tmp_path / "out", 150) == -signal.SIGKILL
    markers = sorted((tmp_path / "out" / ".prepare").glob("*/*.done"))
    assert len(markers) > 3
    told = json.loads(markers[-1].read_text())
    cut = markers[-1].parent / sorted(told["files"])[-1]
    cut.write_bytes(cut.read_bytes()[:-1])
    for marker, raw in zip(markers[:3], (b"", b"{", b"[]"), strict=True):
        marker.write_bytes(raw)
    pipeline.prepare(config(source, tmp_path / "out"))
    assert content(tmp_path / "out") == wanted


def test_another_setting_is_refused_and_nothing_is_overwritten(small: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    source, _ = small
    pipeline.prepare(config(source, tmp_path / "out"))
    before = content(tmp_path / "out")
    other = config(source, tmp_path / "out")
    other.min_chars = 7
    with pytest.raises(UserError, match="was prepared from other inputs or settings"):
        pipeline.prepare(other)
    assert content(tmp_path / "out") == before
