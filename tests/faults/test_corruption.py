"""300 damages to a checkpoint, of every kind and in every file: not one is loaded."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from megatron_scratch.checkpoint.manifest import CorruptCheckpoint, newest_valid, read, step_folder, verify
from megatron_scratch.checkpoint.store import load, save
from megatron_scratch.parallel import SINGLE, Topology
from megatron_scratch.train.resume import first_whole

DAMAGES = 300
Damage = Callable[[Path, random.Random], None]


def state(step: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(step)
    return {f"model.{n}": torch.randn(9, 7, generator=g) for n in "abcd"} | {"optim.a.step": torch.tensor(float(step))}


def _save(topo: Topology, root: str) -> None:
    for step in (1, 2):
        save(Path(root), step, state(step), {"samples": step * 8, "scaler": {"scale": 65536.0, "good": 3}}, topo)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("good")
    run_ranks(2, _save, str(root))
    assert len(read(step_folder(root, 2)).files) == 2
    return root


def flip(file: Path, rng: random.Random) -> None:
    """One bit."""
    content = bytearray(file.read_bytes())
    at = rng.randrange(len(content) * 8)
    content[at // 8] ^= 1 << at % 8
    file.write_bytes(content)


def truncate(file: Path, rng: random.Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: rng.choice((0, 1, len(content) // 2, len(content) - 1, rng.randrange(len(content))))])


def extend(file: Path, rng: random.Random) -> None:
    with open(file, "ab") as f:
        f.write(rng.choice((b"\0", b"\n", b" ", bytes(4096))))


def delete(file: Path, rng: random.Random) -> None:
    file.unlink()


def zero_tail(file: Path, rng: random.Random) -> None:
    """What a file system leaves of pages that were never written."""
    content = file.read_bytes().rstrip(b"\0")
    keep = rng.randrange(len(content))
    file.write_bytes(content[:keep] + bytes(file.stat().st_size - keep))


def swap(file: Path, rng: random.Random) -> None:
    """The same file of the step before: whole in itself, of the same size."""
    shutil.copyfile(file.parent.with_name("step_00000001") / file.name, file)


def swap_ranks(file: Path, rng: random.Random) -> None:
    """Two files of this step change places."""
    first, second = sorted(p for p in file.parent.iterdir() if p.suffix == ".safetensors")
    first.rename(file.parent / "other")
    second.rename(first)
    (file.parent / "other").rename(second)


DAMAGE: dict[Damage, int] = {flip: 200, truncate: 30, extend: 15, delete: 15, zero_tail: 15, swap: 15, swap_ranks: 10}


def _load(topo: Topology, root: str) -> int:
    """The step that a start comes to go on from."""
    into = {name: torch.zeros_like(t) for name, t in state(2).items()}
    folders = [step_folder(Path(root), step) for step in (2, 1)]
    folder, manifest, _ = first_whole(folders, lambda f, m: load(f, m, into, topo), topo)
    assert all(torch.equal(t, state(manifest.step)[name]) for name, t in into.items()), "loaded, and not what was saved"
    return manifest.step


def test_300_damages(good: Path, tmp_path: Path) -> None:
    rng, root, silent, hit = random.Random(0), tmp_path / "r", [], Counter[str]()
    assert sum(DAMAGE.values()) == DAMAGES
    for damage, times in DAMAGE.items():
        for _ in range(times):
            shutil.rmtree(root, ignore_errors=True)
            shutil.copytree(good, root)
            folder = step_folder(root, 2)
            file = rng.choice(sorted(folder.iterdir()))
            damage(file, rng)
            hit[file.name] += 1
            found, problems = newest_valid(root)
            if found != step_folder(root, 1) or str(folder) not in problems[folder] or _load(SINGLE, str(root)) != 1:
                silent.append((damage.__name__, file.name))
    assert silent == [] and len(hit) == 3 and min(hit.values()) > 60, (silent, hit)


def test_undamaged_it_is_loaded(good: Path) -> None:
    assert newest_valid(good) == (step_folder(good, 2), {}) and _load(SINGLE, str(good)) == 2


def test_two_ranks_agree_on_what_one_of_them_has_seen(good: Path, tmp_path: Path) -> None:
    """Each needs every file here, and finds out by itself; but a file that only one can read must not part them."""
    shutil.copytree(good, tmp_path / "r")
    flip(sorted(step_folder(tmp_path / "r", 2).glob("*.safetensors"))[-1], random.Random(1))
    assert run_ranks(2, _load, str(tmp_path / "r")) == [1, 1]


def _load_where_one_cannot_read(topo: Topology, root: str) -> int:
    if topo.rank == 1:
        from megatron_scratch.checkpoint import reading

        def broken(*args: object) -> None:
            raise CorruptCheckpoint("a disk of this node")

        reading._File.read = broken if topo.rank == 1 else reading._File.read  # type: ignore[assignment, method-assign]
    into = {name: torch.zeros_like(t) for name, t in state(2).items()}
    try:
        load(step_folder(Path(root), 2), read(step_folder(Path(root), 2)), into, topo)
    except CorruptCheckpoint as error:
        assert str(error) == "a disk of this node"
        return 0
    return 2


def test_what_one_rank_cannot_read_no_rank_uses(good: Path) -> None:
    assert run_ranks(2, _load_where_one_cannot_read, str(good)) == [0, 0]


@pytest.mark.parametrize("skipped", ["check_file", "_seal"])
def test_without_the_check_it_would_be_silent(skipped: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutants of this file: the same damages, with one check left out, are loaded."""
    from megatron_scratch.checkpoint import manifest, reading

    root, folder = tmp_path / "r", step_folder(tmp_path / "r", 2)
    shutil.copytree(good, root)
    if skipped == "check_file":
        monkeypatch.setattr(reading, "check_file", lambda *a: None)
        monkeypatch.setattr(manifest, "check_file", lambda *a: None)
        swap(sorted(folder.glob("*.safetensors"))[0], random.Random(0))
    else:
        content = (folder / "manifest.json").read_bytes()
        (folder / "manifest.json").write_bytes(content.replace(b'"samples": 16', b'"samples": 17'))
        monkeypatch.setattr(manifest, "_seal", lambda body: content[-manifest.SEAL_BYTES :])
        assert read(folder).extra["samples"] == 17
    assert verify(folder).step == 2
