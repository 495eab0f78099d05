"""Remote storage: what has a manifest there is whole, whatever was killed, flipped or cut off; what is not there stays here."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faulty_storage
import numpy as np
import pytest
from faulty_storage import fail
from runs import config, kill_after, ledger, rows, run, weights
from written import checkpoint, flip

from megatron_scratch.checkpoint import place as places
from megatron_scratch.checkpoint import remote as remotes
from megatron_scratch.checkpoint import uploader
from megatron_scratch.checkpoint import uploads as upload_module
from megatron_scratch.checkpoint.attempt import Attempt
from megatron_scratch.checkpoint.manifest import MANIFEST, CorruptCheckpoint, committed, verify
from megatron_scratch.checkpoint.place import find_problems, open_place, read_manifest
from megatron_scratch.checkpoint.remote import Remote
from megatron_scratch.checkpoint.uploads import Uploads
from megatron_scratch.config.train import CheckpointConfig
from megatron_scratch.util.errors import RunFailed, UserError

STEPS = 8
LONG = ["train.steps=8", "checkpoint.every=2", "model.dropout=0.1", "train.eval_every=4"]
FACTS = {"model": {"layers": 2}, "seed": 1, "data": "abc", "tokenizer": None}
FILES = 3


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    faulty_storage.install(tmp_path, monkeypatch)
    (tmp_path / "store").mkdir()
    return f"faulty://{tmp_path}/store"


def save(root: Path, *steps: int, draw: int = 0, **facts: Any) -> None:
    for step in steps:
        rng = np.random.default_rng([step, draw])
        numbers = {name: ("float32", rng.standard_normal((6, 50), np.float32)) for name in ("model.a", "model.bc", "model.def")}
        checkpoint(root, step, numbers, files=FILES, **{**FACTS, **facts})


def remote(tmp_path: Path, url: str, keep_last: int = 2) -> Remote:
    root = tmp_path / "run" / "checkpoints"
    number = max((int(p.name[-6:]) for p in root.glob(".attempt_*")), default=0)
    return Remote(open_place(url), Attempt(root, number) if number else Attempt.claim(root), CheckpointConfig(keep_last=keep_last))


def whole(url: str) -> list[int]:
    """Steps that are checkpoints there; fails where a manifest promises what is not so."""
    root, found = open_place(url), []
    for step in root.steps():
        try:
            manifest = read_manifest(root.step(step))
        except CorruptCheckpoint:  # none, or half of one, which nobody takes for a whole one
            continue
        assert not find_problems(root.step(step), manifest), f"step {step} has a manifest, and is not whole"
        found.append(step)
    return found


def in_a_process(work: Callable[[], object]) -> int:
    """The exit code of a forked process that does something; negative: the signal that killed it."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:  # never back into the tests
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def upload_and_retire(store: Remote, step: int) -> None:
    store.upload(step)
    store.retire()


@pytest.mark.parametrize("replaced", [False, True])
def test_killed_at_every_operation_of_an_upload(
    replaced: bool, faulty: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two checkpoints are there, a third is brought (in the place of another of its step, or not), the first is deleted: killed
    before and in the middle of every operation."""
    monkeypatch.setattr(places, "THREADS", 1)
    log, root = tmp_path / "log", tmp_path / "run" / "checkpoints"
    save(root, 1, 2, 3)
    store = remote(tmp_path, faulty)
    for step in (1, 2):
        upload_and_retire(store, step)
    if replaced:  # the run had gone further, has lost its folder, and comes to step 3 again
        store.upload(3)
        shutil.rmtree(root / "step_00000003")
        save(root, 3, draw=1)
    shutil.move(tmp_path / "store", tmp_path / "before")
    monkeypatch.setenv("FAULTY_LOG", str(log))
    killed = 0
    for nth, action in itertools.product(range(1, 100), ("kill", "half")):
        shutil.rmtree(tmp_path / "store", ignore_errors=True)
        shutil.copytree(tmp_path / "before", tmp_path / "store")
        log.unlink(missing_ok=True)
        fail(monkeypatch, "any", nth, action)
        code = in_a_process(lambda: upload_and_retire(store, 3))
        monkeypatch.delenv("FAULTY")
        if code == 0 and action == "kill":
            break  # it has fewer operations than that
        assert code == -signal.SIGKILL or (code == 0 and action == "half"), "only what is written can be written by half"
        killed += code != 0
        assert {2} <= set(whole(faulty)) <= {1, 2, 3}
        upload_and_retire(store, 3)
        assert whole(faulty) == [2, 3] and sorted(os.listdir(tmp_path / "store")) == ["step_00000002", "step_00000003"]
    operations = {line.split()[0] for line in log.read_text().splitlines()}
    assert killed >= 14 and operations >= {"put_file", "pipe_file", "cat_file", "rm_file", "rm"}


@pytest.mark.parametrize("action", ["flip", "cut"])
@pytest.mark.parametrize("op", ["put_file", "pipe_file"])
def test_what_arrives_otherwise_than_it_was_sent_is_seen(
    op: str, action: str, faulty: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "run" / "checkpoints", 1)
    store = remote(tmp_path, faulty)
    for nth in (1, FILES) if op == "put_file" else (1,):
        shutil.rmtree(tmp_path / "store" / "step_00000001", ignore_errors=True)  # what has arrived well would not be sent again
        fail(monkeypatch, op, nth, action)
        with pytest.raises(CorruptCheckpoint, match="read back"):
            store.upload(1)
        assert whole(faulty) == [] and MANIFEST not in open_place(faulty).step(1).entries()
    monkeypatch.delenv("FAULTY")
    assert store.upload(1) and whole(faulty) == [1]


def test_a_local_file_that_has_rotted_is_told_from_a_bad_line(tmp_path: Path) -> None:
    root = tmp_path / "run" / "checkpoints"
    save(root, 1)
    rotten = next((root / "step_00000001").glob("*.safetensors"))
    flip(rotten)
    with pytest.raises(CorruptCheckpoint) as caught:
        remote(tmp_path, f"file://{tmp_path}/store").upload(1)
    assert str(caught.value).startswith(f"{rotten}: its sha256 is not the manifest's")


def test_what_is_there_is_trusted_only_where_it_was_read_back(faulty: str, tmp_path: Path) -> None:
    """At a restart sizes are enough; a step that is saved anew is read, even where the manifest is the same."""
    save(tmp_path / "run" / "checkpoints", 1)
    store = remote(tmp_path, faulty)
    store.upload(1)
    flip(next((tmp_path / "store" / "step_00000001").glob("*.safetensors")))
    assert store.upload(1, trust=True) == 0
    assert store.upload(1) > 0 and whole(faulty) == [1]
    cut = next((tmp_path / "store" / "step_00000001").glob("*.safetensors"))
    cut.write_bytes(b"")
    assert store.upload(1, trust=True) > 0 and whole(faulty) == [1]


def test_durable_before_the_manifest_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of `file://` every file and its folder are, before the manifest is renamed to its name."""
    done: list[str] = []
    for name in ("durable", "fsync_dir", "atomic_write"):
        actual = getattr(remotes, name)
        monkeypatch.setattr(remotes, name, lambda path, n=name, f=actual: (done.append(f"{n} {Path(path).name}"), f(path))[1])
    save(tmp_path / "run" / "checkpoints", 1)
    remote(tmp_path, f"file://{tmp_path}/store").upload(1)
    assert sorted(done[:FILES]) == [f"durable rank_{i:05d}_000.safetensors" for i in range(FILES)]
    assert done[FILES:] == ["fsync_dir store", "atomic_write manifest.json", "fsync_dir step_00000001"]


def test_retention_there(tmp_path: Path, faulty: str) -> None:
    """The run's rule; what is no checkpoint goes; later ones stay, of a run that had gone further before it lost its folder."""
    root = tmp_path / "run" / "checkpoints"
    save(root, *range(1, 6), 9)
    store = remote(tmp_path, faulty)
    store.upload(9)
    (tmp_path / "store" / "step_00000002").mkdir()
    (tmp_path / "store" / "step_00000002" / "rank_00000_000.safetensors").write_bytes(b"half")
    (root / "step_00000009").rename(tmp_path / "lost")
    for step in (1, 4, 3):  # the newest first, as a backlog is brought there
        store.upload(step)
    assert store.retire() == [1] and sorted(os.listdir(tmp_path / "store")) == [f"step_{s:08d}" for s in (3, 4, 9)]
    assert not store.superseded(5), "step 9 is of a past that this run has gone back behind"
    assert store.superseded(1) and not store.superseded(3)


def test_another_run_is_never_mixed_in_nor_deleted(tmp_path: Path, faulty: str) -> None:
    save(tmp_path / "other", 7, seed=2)
    Remote(open_place(faulty), Attempt.claim(tmp_path / "other"), CheckpointConfig()).upload(7)
    save(tmp_path / "run" / "checkpoints", 1)
    with pytest.raises(RunFailed, match="of another run .another seed."):
        remote(tmp_path, faulty).upload(1)
    assert whole(faulty) == [7]


def test_a_start_that_is_over_puts_no_manifest(tmp_path: Path, faulty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "run" / "checkpoints", 1)
    store = remote(tmp_path, faulty)
    actual = remotes.in_parallel

    def taken_over(*args: Any) -> None:
        Attempt.claim(tmp_path / "run" / "checkpoints")
        actual(*args)

    monkeypatch.setattr(remotes, "in_parallel", taken_over)
    with pytest.raises(RunFailed, match="attempt 1 .* is over"):
        store.upload(1)
    assert whole(faulty) == []


# --- the process beside training ---


def uploads(tmp_path: Path, url: str, keep_last: int = 2) -> Uploads:
    return Uploads(CheckpointConfig(keep_last=keep_last, remote=url), Attempt.claim(tmp_path / "run" / "checkpoints"))


def test_the_newest_goes_first_and_all_are_held_until_they_are_there(tmp_path: Path, faulty: str) -> None:
    root = tmp_path / "run" / "checkpoints"
    save(root, 1, 2, 3, 4)
    ours = uploads(tmp_path, faulty)
    ours.submit(committed(root))
    assert ours.held() == {1, 2, 3, 4}
    events = ours.finish()
    ours.close()
    assert [e["step"] for e in events] == [4, 3, 2, 1] and ours.held() == set()
    assert [e.get("superseded", False) for e in events] == [False, False, True, True], "the rule would delete those at once"
    assert whole(faulty) == [3, 4]


@pytest.mark.parametrize(("action", "why"), [("raise", "ConnectionError: the network is down"), ("kill", "ended with -9")])
def test_what_fails_is_held_and_tried_again(
    action: str, why: str, tmp_path: Path, faulty: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "run" / "checkpoints", 1, 2)
    fail(monkeypatch, "put_file", 2, action, once=tmp_path / "failed")
    ours = uploads(tmp_path, faulty)
    ours.submit([1])
    while not (events := ours.poll(1.0)):
        pass
    assert why in events[0]["error"] and ours.held() == {1} and whole(faulty) == []
    with pytest.raises(RunFailed, match="the checkpoints of step 1 are not on faulty://"):
        ours.check()
    ours.submit([2])
    assert ours.held() == {1, 2}
    assert {e["step"]: "error" in e for e in ours.finish()} == {1: False, 2: False}
    ours.check()
    ours.close()
    assert whole(faulty) == [1, 2]


def test_a_network_that_hangs_is_taken_for_dead(tmp_path: Path, faulty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "run" / "checkpoints", 1)
    fail(monkeypatch, "put_file", 0, "hang")
    monkeypatch.setattr(upload_module, "STALL", 1.5)
    monkeypatch.setattr(upload_module, "POLL", 0.2)
    ours = uploads(tmp_path, faulty)
    ours.submit([1])
    began = time.monotonic()
    assert ours.poll() == [] and time.monotonic() - began < 1.0, "a step never waits"
    assert "no sign of life" in ours.finish()[0]["error"] and ours.held() == {1}
    ours.close()


def test_a_checkpoint_that_was_set_aside_is_not_waited_for(tmp_path: Path, faulty: str) -> None:
    root = tmp_path / "run" / "checkpoints"
    save(root, 1)
    ours = uploads(tmp_path, faulty)
    (root / "step_00000001").rename(root / "corrupt_step_00000001")
    ours.submit([1])
    assert "error" in ours.finish()[0] and ours.held() == set()
    ours.check()
    ours.close()


def test_it_outlives_signals_and_dies_with_its_rank(tmp_path: Path, faulty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler's SIGTERM reaches all processes of a job; the last checkpoint must get away. A dead rank's uploader must not."""
    save(tmp_path / "run" / "checkpoints", 1)
    here = tmp_path / "pid"
    fail(monkeypatch, "put_file", 1, "hang", once=here)

    def rank() -> None:
        ours = uploads(tmp_path, faulty)
        ours.submit([1])
        while not here.exists() or not here.read_text():
            ours.poll(0.02)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(int(here.read_text()), number)
        assert ours.poll(0.5) == [] and ours.process is not None and ours.process.poll() is None
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_process(rank) == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while _alive(int(here.read_text())):
        assert time.monotonic() < deadline, "it is still there"
    assert whole(faulty) == []


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# --- whole runs ---


@pytest.fixture(scope="module")
def uninterrupted(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    done = {}
    for world in (1, 2):
        done[world] = tmp_path_factory.mktemp("whole") / str(world)
        assert run(config(corpus, done[world], *LONG, world=world), world) == [0] * world
    return done


@pytest.mark.parametrize(("world", "asynchronous"), [(1, False), (2, True)])
def test_from_the_remote_storage_alone_a_run_goes_on_bitwise(
    world: int, asynchronous: bool, corpus: Path, tmp_path: Path, uninterrupted: dict[int, Path]
) -> None:
    """Killed, and its whole directory lost; the one that goes on somewhere else has the losses and weights of one never stopped."""
    url = f"checkpoint.remote=file://{tmp_path}/store"
    words = [*LONG, url, f"checkpoint.async_save={str(asynchronous).lower()}"]
    first = config(corpus, tmp_path / "a", *words, "train.steps=4", "schedule.steps=8", world=world)
    assert run(first, world) == [0] * world
    assert [row["step"] for row in ledger(tmp_path / "a", "uploaded")] == [2, 4]
    flip(next((tmp_path / "store" / "step_00000004").glob("*.safetensors")))
    (tmp_path / "a").rename(tmp_path / "gone")
    assert run(config(corpus, tmp_path / "b", *words, world=world), world) == [0] * world
    assert "step_00000004" in ledger(tmp_path / "b", "corrupt_checkpoint")[0]["problem"], "the damaged one is passed over, by name"
    assert (ledger(tmp_path / "b", "fetched")[0]["step"], ledger(tmp_path / "b", "resume")[0]["step"]) == (2, 2)
    whole_run = rows(uninterrupted[world])
    assert rows(tmp_path / "b") == {step: row for step, row in whole_run.items() if step > 2}
    assert weights(tmp_path / "b", STEPS) == weights(uninterrupted[world], STEPS)
    assert whole(f"file://{tmp_path}/store") == committed(tmp_path / "b" / "checkpoints") == [6, 8]
    verify(tmp_path / "store" / "step_00000008")


@pytest.mark.parametrize(
    "point", ["megatron_scratch.checkpoint.uploads:Uploads.submit", "megatron_scratch.train.mirror:Mirror.run"]
)
def test_a_killed_run_brings_there_what_it_had_left_to_do(
    point: str, corpus: Path, tmp_path: Path, uninterrupted: dict[int, Path]
) -> None:
    cfg = config(corpus, tmp_path / "r", *LONG, f"checkpoint.remote=file://{tmp_path}/store", "checkpoint.keep_last=1")
    assert run(cfg, 1, kill_after(point, 5)) == [-signal.SIGKILL]
    assert run(cfg) == [0]
    assert weights(tmp_path / "r", STEPS) == weights(uninterrupted[1], STEPS)
    assert whole(f"file://{tmp_path}/store") == committed(tmp_path / "r" / "checkpoints") == [8]


def test_what_is_not_there_is_not_deleted_here(
    corpus: Path, tmp_path: Path, faulty: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The network is down from the first checkpoint on: training is done, every checkpoint is kept, the last line says so. The same
    command, once it is up, brings them there and retires what is left over."""
    fail(monkeypatch, "put_file", 0, "raise")
    cfg = config(corpus, tmp_path / "r", *LONG, f"checkpoint.remote={faulty}", "checkpoint.keep_last=1")
    assert run(cfg) == [1]
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("failed: the checkpoints of step 2, 4, 6, 8 are not on faulty://") and "the network is down" in last
    assert committed(tmp_path / "r" / "checkpoints") == [2, 4, 6, 8] and whole(faulty) == []
    assert {row["step"] for row in ledger(tmp_path / "r", "upload_failed")} == {2, 4, 6, 8}
    assert ledger(tmp_path / "r", "finish"), "training itself is done"
    monkeypatch.delenv("FAULTY")
    assert run(cfg) == [0]
    assert whole(faulty) == [8] and committed(tmp_path / "r" / "checkpoints") == [8]


@pytest.mark.parametrize("world", [1, 2])
def test_a_storage_that_cannot_be_written_to_is_refused_before_anything_is_computed(
    world: int, corpus: Path, tmp_path: Path, faulty: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fail(monkeypatch, "pipe_file", 0, "raise")
    assert run(config(corpus, tmp_path / "r", *LONG, f"checkpoint.remote={faulty}", world=world), world) == [2] * world
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == world and all("cannot be used: ConnectionError: the network is down" in line for line in lines)
    assert not (tmp_path / "r" / "metrics.jsonl").exists()


def test_no_whole_checkpoint_there_is_no_fresh_start(corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A run whose checkpoints are all damaged, or that must not go on from them, does not silently begin again."""
    words = [*LONG, f"checkpoint.remote=file://{tmp_path}/store", "train.steps=2"]
    assert run(config(corpus, tmp_path / "a", *words)) == [0]
    assert run(config(corpus, tmp_path / "b", *words, "checkpoint.resume=never")) == [2]
    assert "has checkpoints (step 2)" in capfd.readouterr().err and committed(tmp_path / "b" / "checkpoints") == []
    assert run(config(corpus, tmp_path / "c", *words, "seed=7")) == [2]
    assert "seed is 7 here" in capfd.readouterr().err
    damaged = next((tmp_path / "store" / "step_00000002").glob("*.safetensors"))
    flip(damaged)
    assert run(config(corpus, tmp_path / "d", *words)) == [1]
    assert f"is corrupt: file://{damaged}" in capfd.readouterr().err
    assert [p.name for p in (tmp_path / "d" / "checkpoints").iterdir() if not p.name.startswith(".")] == []


@pytest.mark.parametrize(("url", "said"), [("/tmp/x", "is not a URL"), ("s3://id:key@bucket", "credentials"),
                                           ("s3://bucket?key=1", "credentials"), ("file://tmp/x", "file:///tmp/x"),
                                           ("s4://bucket", "did you mean 's3'?"), ("file:///a/../b", "'..'"),
                                           ("memory://x", "keeps no files")])  # fmt: skip
def test_a_place_that_cannot_be_one_is_refused(url: str, said: str, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^checkpoint.remote=") as caught:
        config(corpus, tmp_path / "r", f"checkpoint.remote='{url}'")
    assert said in str(caught.value) and "key@" not in str(caught.value) and "key=1" not in str(caught.value)


def test_ledger_of_an_upload_names_no_secret_and_is_json(tmp_path: Path, faulty: str) -> None:
    save(tmp_path / "run" / "checkpoints", 1)
    answer = uploader.do(remote(tmp_path, faulty), {"do": "upload", "step": 1})
    assert json.loads(json.dumps(answer)) == answer and answer["bytes"] > 0 and answer["retired"] == []
