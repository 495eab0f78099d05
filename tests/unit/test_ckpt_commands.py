"""`ckpt ls | inspect | verify | diff`: of any cuts, in little memory, without torch, and naming all that is wrong."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from written import Cuts, checkpoint, flip

from megatron_scratch import cli
from megatron_scratch.checkpoint import boxes, place
from megatron_scratch.checkpoint.boxes import as_float64, pieces, span
from megatron_scratch.checkpoint.diff import diff
from megatron_scratch.checkpoint.inspect import Statistics, ls
from megatron_scratch.checkpoint.manifest import Chunk, read
from megatron_scratch.checkpoint.place import open_place

FACTS = {"model": {"num_layers": 2}, "optim": "adamw", "samples": 40, "attempt": 3, "written": "2026-01-02T03:04:05+0000",
         "written_by": {"order": {"dp": 2, "tp": 4, "pp": 1, "engine": {"name": "fsdp"}}}}  # fmt: skip


def tensors() -> dict[str, tuple[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return {
        "model.a": ("float32", rng.standard_normal((12, 10), np.float32)),
        "model.b": ("bfloat16", torch.from_numpy(rng.standard_normal((3, 8, 6))).bfloat16().view(torch.uint16).numpy()),
        "optim.a.step": ("float32", np.float32(7).reshape(())),
        "optim.a.exp_avg": ("float32", rng.standard_normal((12, 10), np.float32)),
        "optim.a.eight": ("float8_e4m3fn", rng.integers(0, 127, (40,), np.uint8)),
        "optim.a.count": ("int64", np.arange(30).reshape(5, 6)),
    }


ROWS: Cuts = {"model.a": (4, 1), "model.b": (1, 4, 1), "optim.a.exp_avg": (3, 1), "optim.a.eight": (5,), "optim.a.count": (5, 1)}
GRID: Cuts = {"model.a": (5, 3), "model.b": (3, 1, 2), "optim.a.exp_avg": (1, 7), "optim.a.count": (2, 4)}


def run(*words: str) -> int:
    return cli.main(["ckpt", *words])


@pytest.fixture(params=["whole tensors at once", "a few numbers at once"])
def piece(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param.startswith("a few"):
        monkeypatch.setattr(boxes, "PIECE", 56)  # 7 numbers
        monkeypatch.setattr(place, "PIECE", 56)


@pytest.mark.parametrize(("dtype", "stored"), [("bfloat16", torch.uint16), ("float16", torch.uint16),
                                               ("float8_e4m3fn", torch.uint8), ("float8_e5m2", torch.uint8)])  # fmt: skip
def test_every_bit_pattern_is_read_as_torch_reads_it(dtype: str, stored: torch.dtype) -> None:
    bits = torch.arange(2 ** (8 * stored.itemsize), dtype=torch.int32).to(stored)
    ours = bits.numpy().view(np.float16) if dtype == "float16" else bits.numpy()
    want = bits.view(getattr(torch, dtype)).to(torch.float64).numpy()
    assert np.array_equal(as_float64(ours, dtype), want, equal_nan=True)


def test_pieces_cover_a_box_once_and_stay_small() -> None:
    rng = random.Random(0)
    for _ in range(200):
        shape = tuple(rng.randint(1, 7) for _ in range(rng.randint(0, 4)))
        chunk, wide = Chunk((0,) * len(shape), shape, "", 0), tuple(2 * n for n in shape)
        other = Chunk((0,) * len(shape), wide, "", 0)
        limit, seen = rng.randint(1, 9), np.zeros(shape, int)
        for box in pieces((chunk.offset, shape), chunk, other, limit=limit):
            seen[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))] += 1
            for c in (chunk, other):
                begin, end = span(c, box)
                assert end - begin <= limit
        assert (seen == 1).all()


@pytest.mark.usefixtures("piece")
@pytest.mark.parametrize(("left", "right"), [({}, ROWS), (ROWS, GRID), (GRID, {}), (GRID, GRID)])
def test_the_same_numbers_under_other_cuts_are_equal(
    left: Cuts, right: Cuts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = {**FACTS, "written_by": {"order": {"dp": 1, "tp": 1}}, "attempt": 1}
    a = checkpoint(tmp_path / "a", 4, tensors(), left, **FACTS)
    b = checkpoint(tmp_path / "b", 4, tensors(), right, files=3, **other)
    assert run("diff", str(a), str(b)) == 0
    out = capsys.readouterr().out
    assert "model      2 tensors in both, 264 numbers: bitwise equal" in out and "equal: every number and fact" in out
    assert "written_by.order.tp: 4 | 1" in out and "fact " not in out


@pytest.mark.usefixtures("piece")
def test_each_number_that_differs_is_counted(tmp_path: Path) -> None:
    changed = tensors()
    changed["model.a"][1][11, 9] += np.float32(0.5)  # the last number of the last chunk
    changed["model.a"][1][0, 3] += np.float32(0.25)
    changed["optim.a.exp_avg"][1][5, 5] *= np.float32(1 + 1e-6)
    a, b = checkpoint(tmp_path / "a", 4, tensors(), ROWS), checkpoint(tmp_path / "b", 4, changed, GRID)
    lines, equal = diff(str(a), str(b))
    largest = max(abs(tensors()["model.a"][1]).max(), abs(changed["model.a"][1]).max())
    told = f"differs    model.a: 2 of 120 numbers, at most by 5.00e-01, {0.5 / largest:.2e} of the largest"
    assert not equal and told in lines
    assert any(line.startswith("differs    optim.a.exp_avg: 1 of 120") for line in lines) and lines.index(told) == 2, "worst first"
    assert diff(str(a), str(b), 0.1)[1] is False and diff(str(a), str(b), 0.5)[1] is True


def test_what_is_not_finite_and_signs_of_zero(tmp_path: Path) -> None:
    """Equal bits are equal, NaN or not; a NaN on one side is within no tolerance; -0 is 0 within any, and not bitwise."""
    nan, inf = np.float32("nan"), np.float32("inf")
    base = np.array([nan, inf, 0, 1], np.float32)
    for other, bitwise, close in (([nan, inf, 0, 1], True, True), ([nan, inf, -0.0, 1], False, True),
                                  ([nan, -inf, 0, 1], False, False), ([nan, inf, nan, 1], False, False),
                                  ([1, inf, 0, 1], False, False)):  # fmt: skip
        pair = [checkpoint(tmp_path / f"{other}{i}", 1, {"model.x": ("float32", np.array(x, np.float32))})
                for i, x in enumerate((base, other))]  # fmt: skip
        words = [str(p) for p in pair]
        assert (diff(*words)[1], diff(*words, 0.5)[1]) == (bitwise, close), other


@pytest.mark.parametrize(("change", "words"), [
    (lambda t, f: t.pop("model.b"), "only in A  model.b"),
    (lambda t, f: t.update({"model.c": t["model.a"]}), "only in B  model.c"),
    (lambda t, f: t.update({"model.a": ("float32", t["model.a"][1].T)}), "model.a: float32 [12, 10] | float32 [10, 12]"),
    (lambda t, f: t.update({"model.b": ("int16", t["model.b"][1].view(np.int16))}), "model.b: bfloat16 [3, 8, 6] | int16"),
    (lambda t, f: f.update(samples=41), "fact       samples: 40 | 41"),
    (lambda t, f: f.update(model={"num_layers": 2, "bias": None}), "fact       model.bias: - | None"),
])  # fmt: skip
def test_other_differences_are_within_no_tolerance(
    change: Any, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, facts = tensors(), dict(FACTS)
    change(other, facts)
    a, b = checkpoint(tmp_path / "a", 4, tensors(), **FACTS), checkpoint(tmp_path / "b", 4, other, **facts)
    assert run("diff", str(a), str(b), "tolerance=1") == 1
    assert words in capsys.readouterr().out


def test_statistics_are_numpys_piece_by_piece() -> None:
    """Of a large mean with a small spread, too, where a sum of squares would have cancelled."""
    values = 1e8 + np.random.default_rng(0).standard_normal(10_000)
    values[17], values[4_000] = np.nan, -np.inf
    stats = Statistics()
    for part in np.array_split(values, 37):
        stats.add(part)
    stats.add(np.array([np.nan]))
    finite = values[np.isfinite(values)]
    assert (stats.bad, stats.low, stats.high) == (3, finite.min(), finite.max())
    assert stats.mean == pytest.approx(finite.mean(), rel=1e-15) and np.sqrt(stats.squares / stats.count) == pytest.approx(
        finite.std(), rel=1e-9
    )


@pytest.mark.usefixtures("piece")
def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    for step in (4, 12):
        checkpoint(run_dir / "checkpoints", step, tensors(), ROWS, **FACTS)
    assert run("inspect", str(run_dir)) == 0
    out = capsys.readouterr().out
    for words in ("step_00000012\n", "step 12, written 2026-01-02T03:04:05+0000, by 8 processes (dp 2 x tp 4, fsdp), attempt 3",
                  "264 parameters", "optimizer adamw: count of 1, eight of 1, exp_avg of 1, step of 1", "samples: 40",
                  "model.b          bfloat16       [3, 8, 6]    288       4"):  # fmt: skip
        assert words in out
    assert run("inspect", f"run={run_dir}", "tensor=b") == 0
    out = capsys.readouterr().out
    values = as_float64(tensors()["model.b"][1], "bfloat16")
    assert f"min {values.min():.6g}, max {values.max():.6g}, mean {values.mean():.6g}, standard deviation {values.std():.6g}" in out
    assert f"begins with {', '.join(f'{v:.6g}' for v in values[0, 0])}" in out and "[0, 6, 0]  [3, 2, 6]" in out


def test_ls_shows_what_is_there_and_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "run" / "checkpoints"
    folders = {step: checkpoint(root, step, tensors(), **FACTS) for step in (2, 4, 6, 8)}
    folders[2].rename(root / "corrupt_step_00000002")
    next(folders[4].glob("*.safetensors")).write_bytes(b"short")
    flip(next(folders[6].glob("*.safetensors")))
    (root / ".attempt_000003" / "step_00000010").mkdir(parents=True)
    (root / ".attempt_000004").mkdir()  # the folder of a run that is going on
    (root / ".swept_000001_by_000002").mkdir()
    (tmp_path / "run" / "ledger.jsonl").write_text(
        '{"event": "uploaded", "step": 6}\n{"event": "uploaded", "step": 8, "retired": [6]}\n{"ev'
    )
    assert run("ls", str(tmp_path / "run"), "json=true") == 0
    rows = {row["name"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert {name: row["state"].partition(":")[0] for name, row in rows.items()} == {
        "corrupt_step_00000002": "set aside", "step_00000004": "damaged", "step_00000006": "committed",
        "step_00000008": "committed", ".attempt_000003/step_00000010": "being written, or left by a killed save",
        ".swept_000001_by_000002": "left by a killed save",
    }  # fmt: skip
    eight = rows["step_00000008"]
    assert (eight["step"], eight["files"], eight["tensors"], eight["world"], eight["layout"], eight["attempt"], eight["where"]) == (
        8, 3, 6, 8, "dp 2 x tp 4, fsdp", 3, "local")  # fmt: skip
    assert eight["bytes"] == sum(p.stat().st_size for p in folders[8].iterdir()) and eight["written"] == FACTS["written"]
    assert (eight["uploaded"], rows["step_00000006"]["uploaded"]) == (True, False)
    states = {row["name"]: row["state"].partition(":")[0] for row in ls(str(tmp_path / "run"), verify=True)}
    assert (states["step_00000006"], states["step_00000008"]) == ("damaged", "verified")
    assert run("ls", str(folders[8])) == 0 and run("ls", str(root)) == 0
    assert "local, uploaded" not in capsys.readouterr().out, "only a run's ledger says so"


@pytest.mark.usefixtures("piece")
def test_verify_names_every_bad_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "run" / "checkpoints"
    good = [checkpoint(root, step, tensors(), ROWS, files=4) for step in (2, 4, 6)]
    assert run("verify", str(tmp_path / "run")) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("whole: 3 checkpoints (step 2, 4, 6), 15 files")
    first, second, third, _ = sorted(good[0].glob("*.safetensors"))
    flip(first, 0)
    second.write_bytes(second.read_bytes() + b"x")
    third.unlink()
    flip(good[2] / "manifest.json", 40)
    assert run("verify", str(tmp_path / "run")) == 1
    out, err = capsys.readouterr()
    assert [any(str(path) in line for line in out.splitlines()) for path in (first, second, third, good[2] / "manifest.json")] == [
        True
    ] * 4
    assert (
        len(out.splitlines()) == 4
        and str(good[1]) not in out
        and err == f"failed: 2 of 3 checkpoints in {tmp_path / 'run'} damaged\n"
    )
    assert run("verify", f"file://{good[1]}") == 0


def test_little_memory(tmp_path: Path) -> None:
    """64 MiB of numbers that one side has cut into rows and the other into columns."""
    big = {"model.x": ("bfloat16", np.arange(1 << 25, dtype=np.uint32).astype(np.uint16).reshape(1 << 13, 1 << 12))}
    a, b = checkpoint(tmp_path / "a", 1, big, {"model.x": (4, 1)}), checkpoint(tmp_path / "b", 1, big, {"model.x": (1, 4)})
    for words, most in ((["diff", str(a), str(b)], 40), (["inspect", str(a), "tensor=x"], 40), (["verify", str(a)], 40)):
        tracemalloc.start()
        assert run(*words) == 0
        assert tracemalloc.get_traced_memory()[1] < most << 20, words
        tracemalloc.stop()


def test_a_file_that_is_shorter_than_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint(tmp_path, 1, tensors())
    for name in read(folder).files:
        (folder / name).write_bytes((folder / name).read_bytes()[:200])
    assert run("inspect", str(folder), "tensor=a") == 1 and run("diff", str(folder), str(folder)) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("failed") and "shorter than its manifest says" in line for line in lines)


@pytest.mark.parametrize(("words", "said"), [
    (["ls"], "give the checkpoint"), (["ls", "no/such"], "has no checkpoints"), (["verify", "no/such"], "neither a checkpoint"),
    (["inspect", "CKPT", "tensor=modle.a"], "did you mean 'model.a'?"), (["diff", "CKPT"], "ckpt diff A B"),
    (["diff", "CKPT", "CKPT", "tolerance=-1"], "tolerance=-1.0"), (["diff", "CKPT", "CKPT", "CKPT"], "one word too many"),
    (["inspect", "CKPT", "tensr=a"], "did you mean 'tensor'?"), (["verify", "s3://id:secret/with/slash@bucket/x"], "credentials"),
    (["ls", "s3://b/x"], 'pip install "megatron-scratch[s3]"'), (["ls", "gs://b/x"], 'pip install "megatron-scratch[gs]"'),
    (["ls", "memory://x"], "keeps no files"), (["ls", "ss3://x"], "did you mean 's3'?"), (["ls", "file://x/y"], "file:///x/y"),
    (["sl", "x"], "did you mean 'ckpt ls'?"),
])  # fmt: skip
def test_mistakes_are_one_line(words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                               monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr("megatron_scratch.config.remote.find_spec", lambda name: None if name in ("s3fs", "gcsfs") else name)
    folder = str(checkpoint(tmp_path, 1, tensors()))
    assert run(*(folder if word == "CKPT" else word for word in words)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and said in err and "secret" not in err


def test_a_place_is_a_path_or_a_url(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 1, tensors())
    for word, local in ((str(folder), True), (f"{folder}/", True), (f"file://{folder}", False)):
        found = open_place(word)
        assert (found.name, found.is_local, found.path) == (folder.name, local, str(folder))
        assert list(found.entries()) == sorted(p.name for p in folder.iterdir())
