"""Checkpoints: whole or absent, verified, free of code, the same under another number of ranks."""

from __future__ import annotations

import pickle
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor, Shard

from megatron_scratch.checkpoint.attempt import Attempt, retire, surplus
from megatron_scratch.checkpoint.manifest import CorruptCheckpoint, committed, newest_valid, read, verify, write
from megatron_scratch.checkpoint.shard import write_file
from megatron_scratch.checkpoint.store import load, save
from megatron_scratch.config.train import CheckpointConfig
from megatron_scratch.parallel import SINGLE, Topology
from megatron_scratch.util.errors import RunFailed, UserError


def whole() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return {"model.w": torch.randn(8, 12, generator=g), "model.n": torch.randn(5, generator=g).bfloat16(),
            "optim.w.step": torch.tensor(3.0), "optim.w.exp_avg": torch.randn(8, 12, generator=g)}  # fmt: skip


def sharded(topo: Topology, values: dict[str, torch.Tensor], dim: int) -> dict[str, torch.Tensor]:
    """The matrices cut over tp, the rest replicated, as engines give them."""
    if topo.mesh is None:
        return {k: v.clone() for k, v in values.items()}
    n, i = topo.size("tp"), topo.index("tp")
    return {k: DTensor.from_local(v.chunk(n, dim)[i].contiguous(), topo.mesh["tp"], [Shard(dim)]) if v.ndim == 2 else v.clone()
            for k, v in values.items()}  # fmt: skip


def _save(topo: Topology, root: str, dim: int) -> None:
    save(Path(root), 4, sharded(topo, whole(), dim), {"samples": 40}, topo)


def _load(topo: Topology, root: str, dim: int) -> bool:
    state = sharded(topo, {k: torch.zeros_like(v) for k, v in whole().items()}, dim)
    folder, problems = newest_valid(Path(root))
    assert folder is not None and not problems
    load(folder, verify(folder), state, topo)
    want = sharded(topo, whole(), dim)
    return all(torch.equal(a.to_local() if isinstance(a, DTensor) else a, b.to_local() if isinstance(b, DTensor) else b)
               for a, b in zip(state.values(), want.values(), strict=True))  # fmt: skip


@pytest.mark.parametrize(("writers", "readers", "dims"), [(1, 2, (0, 0)), (2, 1, (1, 0)), (2, 4, (0, 1)), (4, 2, (1, 0))])
def test_any_number_of_ranks_to_any_other(writers: int, readers: int, dims: tuple[int, int], tmp_path: Path) -> None:
    for world, fn, dim in ((writers, _save, dims[0]), (readers, _load, dims[1])):
        degrees = {"tp": world}
        answers = [fn(SINGLE, str(tmp_path), dim)] if world == 1 else run_ranks(world, fn, str(tmp_path), dim, degrees=degrees)
    assert all(answers)


def _bytes_per_rank(topo: Topology, root: str) -> None:
    save(Path(root), 1, {f"model.{i}": torch.ones(64, 64) for i in range(8)}, {}, topo)


def test_replicated_state_is_written_once_and_shared_out(tmp_path: Path) -> None:
    run_ranks(2, _bytes_per_rank, str(tmp_path))
    sizes = [f.bytes for f in verify(tmp_path / "step_00000001").files.values()]
    assert len(sizes) == 2 and max(sizes) < 5 * 64 * 64 * 4


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for step in (1, 2):
        save(tmp_path, step, whole(), {"samples": step}, SINGLE)
    return tmp_path


def test_every_corruption_is_seen_and_the_older_one_is_taken(root: Path) -> None:
    folder, rng = root / "step_00000002", random.Random(0)
    keep = root.parent / f"{root.name}_good"
    shutil.copytree(folder, keep)
    name = next(p.name for p in folder.glob("*.safetensors"))
    size = (folder / name).stat().st_size

    def flip(at: int) -> None:
        data = bytearray((folder / name).read_bytes())
        data[at // 8] ^= 1 << at % 8
        (folder / name).write_bytes(data)

    damages = [lambda at=at: flip(at) for at in rng.sample(range(size * 8), 200)]
    damages += [lambda n=n: (folder / name).write_bytes((keep / name).read_bytes()[:n]) for n in (0, 1, size // 2, size - 1)]
    damages += [lambda: (folder / name).unlink(), lambda: (folder / "manifest.json").write_text("{"),
                lambda: (folder / "manifest.json").unlink(), lambda: (folder / name).write_bytes(b"x" * size)]  # fmt: skip
    for damage in damages:
        damage()
        found, problems = newest_valid(root)
        assert found == root / "step_00000001" and list(problems) == [folder] and str(folder) in problems[folder]
        shutil.rmtree(folder)
        shutil.copytree(keep, folder)
    assert newest_valid(root) == (folder, {})


def test_nothing_in_it_is_unpickled(root: Path, tmp_path: Path) -> None:
    folder, canary = root / "step_00000002", tmp_path / "canary"

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (canary,))

    for file in [*folder.iterdir(), folder / ".metadata"]:
        file.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CorruptCheckpoint):
        verify(folder)
    assert newest_valid(root)[0] == root / "step_00000001" and not canary.exists()


def test_a_manifest_cannot_point_outside(root: Path) -> None:
    """Not even one that was sealed by whoever made it up."""
    folder = root / "step_00000002"
    whole = read(folder)
    (name,) = whole.files
    for evil in ("../../etc/passwd", "/etc/passwd", "..", "a/b", "a\\b"):
        write(folder, replace(whole, files={**whole.files, evil: whole.files[name]}))
        with pytest.raises(CorruptCheckpoint, match="outside"):
            verify(folder)


def test_a_manifest_of_another_step_or_at_odds_with_itself_is_refused(root: Path) -> None:
    folder = root / "step_00000002"
    whole = read(folder)
    saved = whole.tensors["model.w"]
    (chunk,) = saved.chunks
    for changed, words in (
        (replace(whole, step=3), "of step 3"),
        (replace(whole, tensors={"model.w": replace(saved, chunks=())}), "not the whole tensor"),
        (replace(whole, tensors={"model.w": replace(saved, dtype="object")}), "dtype 'object'"),
        (replace(whole, tensors={"model.w": replace(saved, chunks=(replace(chunk, at=1 << 40),))}), "outside of rank_00000"),
        (replace(whole, tensors={"model.w": replace(saved, chunks=(replace(chunk, at=-1),))}), "outside of rank_00000"),
        (replace(whole, tensors={"model.w": replace(saved, chunks=(replace(chunk, offset=(4, 0)),))}), r"from \[4, 0\]"),
        (replace(whole, tensors={"model.w": replace(saved, chunks=(replace(chunk, file="other"),))}), "not in the list"),
    ):
        write(folder, changed)
        with pytest.raises(CorruptCheckpoint, match=words):
            read(folder)


def test_a_crash_while_writing_leaves_the_old_ones(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*args: object) -> None:
        raise OSError("no space left")

    for point in ("megatron_scratch.checkpoint.store.write_file", "megatron_scratch.checkpoint.manifest.write",
                  "megatron_scratch.checkpoint.attempt.os.rename"):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(point, crash)
            with pytest.raises(RunFailed, match="no space left"):
                save(root, 3, whole(), {}, SINGLE)
        assert committed(root) == [1, 2] and newest_valid(root)[0] == root / "step_00000002"
    save(root, 3, whole(), {}, SINGLE)  # what the crashes left behind is in nobody's way
    assert committed(root) == [1, 2, 3]


def test_other_model_is_refused_with_the_name(root: Path) -> None:
    folder = root / "step_00000002"
    for change, words in ((lambda s: s.pop("model.n"), "model.n"), (lambda s: s.update(extra=torch.ones(1)), "extra"),
                          (lambda s: s.update({"model.n": torch.ones(6).bfloat16()}), "model.n"),
                          (lambda s: s.update({"model.n": torch.ones(5)}), "model.n is torch.bfloat16")):  # fmt: skip
        state = whole()
        change(state)
        with pytest.raises(UserError, match=words):
            load(folder, verify(folder), state, SINGLE)


@pytest.mark.parametrize(("last", "every", "kept"), [(2, 0, [5, 6]), (0, 0, [1, 2, 3, 4, 5, 6]), (1, 2, [2, 4, 6]), (1, 5, [5, 6])])
def test_retention(last: int, every: int, kept: list[int], tmp_path: Path) -> None:
    attempt = Attempt.claim(tmp_path)
    for step in range(1, 7):
        save(tmp_path, step, {"x": torch.ones(1)}, {}, SINGLE, attempt)
        retire(attempt, CheckpointConfig(keep_last=last, keep_every=every), {step})
    assert committed(tmp_path) == kept and not list(attempt.folder.iterdir())


def test_the_last_one_that_was_read_again_is_never_deleted(tmp_path: Path) -> None:
    attempt, rule = Attempt.claim(tmp_path), CheckpointConfig(keep_last=1)
    for step in range(1, 5):
        save(tmp_path, step, {"x": torch.ones(1)}, {}, SINGLE, attempt)
    assert retire(attempt, rule, verified=()) == [] and surplus(committed(tmp_path), rule) == [1, 2, 3]
    assert retire(attempt, rule, verified={2}) == [1]
    assert retire(attempt, rule, verified={2, 4}, held={3}) == [2]
    assert committed(tmp_path) == [3, 4]


def test_a_stale_writer_is_fenced_off(tmp_path: Path) -> None:
    """Two starts of a run, the first one still alive: whatever it does from then on comes to nothing."""
    first = Attempt.claim(tmp_path)
    save(tmp_path, 1, whole(), {}, SINGLE, first)
    folder = first.stage(2)
    (folder / "half").write_bytes(b"x")
    with open(folder / "open", "wb") as still_open:
        second = Attempt.claim(tmp_path)
        still_open.write(b"late")
    assert second.number == first.number + 1 and not first.folder.exists()
    with pytest.raises(RunFailed, match="attempt 1 .* is over"):
        first.commit(2)
    with pytest.raises(RunFailed, match="attempt 1 .* is over"):
        save(tmp_path, 2, whole(), {}, SINGLE, first)
    with pytest.raises(RunFailed, match="attempt 1 .* is over"):
        retire(first, CheckpointConfig(keep_last=1), {1})
    with pytest.raises(FileNotFoundError):
        write_file(folder / "rank_00000_000.safetensors", [memoryview(b"late")])
    save(tmp_path, 2, whole(), {}, SINGLE, second)
    assert committed(tmp_path) == [1, 2] and read(tmp_path / "step_00000002").extra["attempt"] == 2


def test_no_checkpoint_is_ever_overwritten(root: Path) -> None:
    before = (root / "step_00000002" / "manifest.json").read_bytes()
    with pytest.raises(RunFailed, match="step_00000002 exists"):
        save(root, 2, whole(), {"samples": 3}, SINGLE)
    assert (root / "step_00000002" / "manifest.json").read_bytes() == before


def test_files_are_safetensors_that_anybody_can_open(root: Path) -> None:
    manifest = read(root / "step_00000002")
    (name,) = manifest.files
    theirs = load_file(root / "step_00000002" / name)
    assert all(torch.equal(theirs[f"{key}@{','.join('0' * t.ndim)}"], t) for key, t in whole().items())
