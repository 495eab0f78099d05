"""fp16: a run that is stopped goes on bitwise, an overflow is skipped by all ranks alike, and an endless row of them ends."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from runs import config, kill_after, ledger, rows, run, weights

from megatron_scratch.train import passes

STEPS = 8
FP16 = ["precision=fp16", "train.steps=8", "checkpoint.every=3", "precision.growth_interval=3"]
LAYOUTS = {"one": (1, []), "ddp": (2, []), "fsdp": (2, ["engine=fsdp"]), "tp": (2, ["parallel.tp=2"]),
           "hsdp": (4, ["engine=hsdp", "engine.replicas=2"]), "pp": (2, ["parallel.pp=2"])}  # fmt: skip


def overflow(*steps: int) -> None:
    """In these steps (counted from 1, in this process) backward overflows on this rank."""
    number = count(1)
    for kind, whole in ((kind, kind.gradients) for kind in (passes.WholeModel, passes.Stages)):  # a run has one of them
        kind.gradients = _overflowing(whole, number, steps)  # type: ignore[method-assign]


def _overflowing(whole: Callable[..., Any], number: Iterator[int], steps: tuple[int, ...]) -> Callable[..., Any]:
    def gradients(self: Any, batches: Any, seeds: Any, divisor: float) -> Any:
        return whole(self, batches, seeds, 1e-60 if next(number) in steps else divisor)  # which is 0 in fp32

    return gradients


def scaler_of(run_dir: Path, step: int) -> dict[str, float]:
    found: dict[str, float] = json.loads((run_dir / "checkpoints" / f"step_{step:08d}" / "manifest.json").read_text())["scaler"]
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_overflow_on_one_rank_is_skipped_by_all(layout: str, corpus: Path, tmp_path: Path) -> None:
    """The last rank alone overflows in step 3. Steps 1, 2 and then 4 to 6 are good ones; growth is after every third in a row."""
    world, words = LAYOUTS[layout]
    cfg = config(corpus, tmp_path, *FP16, *words, "checkpoint.keep_last=0", world=world)
    assert run(cfg, world, lambda: overflow(3)) == [0] * world
    (skip,) = ledger(tmp_path, "skip")
    assert skip["step"] == 3 and skip["reason"] == "gradients overflowed under the loss scale 65536, it is 32768 now"
    assert sorted(rows(tmp_path)) == [1, 2, 4, 5, 6, 7, 8]
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged if "skipped" in row] == [3]
    assert scaler_of(tmp_path, 3) == {"scale": 32768.0, "good": 0}
    assert scaler_of(tmp_path, 6) == {"scale": 65536.0, "good": 0}, "grown after three good steps"
    assert scaler_of(tmp_path, 8) == {"scale": 65536.0, "good": 2}


def test_a_skipped_step_updates_nothing(corpus: Path, tmp_path: Path) -> None:
    """Not even the optimizer's counters: the checkpoints before and after it hold the same tensors."""
    cfg = config(corpus, tmp_path, *FP16, "checkpoint.every=1", "checkpoint.keep_last=0")
    assert run(cfg, 1, lambda: overflow(3)) == [0]
    assert weights(tmp_path, 2) == weights(tmp_path, 3) != weights(tmp_path, 4)


@pytest.mark.parametrize("layout", ["one", "fsdp"])
def test_killed_and_resumed_is_never_stopped(layout: str, corpus: Path, tmp_path: Path) -> None:
    """Scale and good steps are in the checkpoint. Overflows in steps 2 and 5; killed in step 6, it goes on from step 3's."""
    world, words = LAYOUTS[layout]
    whole, again = (config(corpus, tmp_path / name, *FP16, *words, world=world) for name in ("whole", "again"))
    assert run(whole, world, lambda: overflow(2, 5)) == [0] * world

    def fatal() -> None:
        overflow(2, 5)
        kill_after("megatron_scratch.train.passes:WholeModel.gradients", 6)()

    assert run(again, world, fatal)[-1] == -signal.SIGKILL
    assert run(again, world, lambda: overflow(2)) == [0] * world  # its second step is the fifth of the run
    assert [row["step"] for row in ledger(tmp_path / "whole", "skip")] == [2, 5]
    assert [row["step"] for row in ledger(tmp_path / "again", "skip")] == [2, 5, 5]
    assert rows(tmp_path / "again") == rows(tmp_path / "whole")
    assert weights(tmp_path / "again", STEPS) == weights(tmp_path / "whole", STEPS)
    assert scaler_of(tmp_path / "again", STEPS) == scaler_of(tmp_path / "whole", STEPS) == {"scale": 32768.0, "good": 0}


@pytest.mark.parametrize("layout", ["one", "ddp"])
def test_an_endless_row_of_skips_ends(layout: str, corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    world, words = LAYOUTS[layout]
    cfg = config(corpus, tmp_path, "precision=fp16", *words, "precision.scale=4", "train.steps=20", world=world)
    assert run(cfg, world, lambda: overflow(*range(4, 20))) == [1] * world
    said = [(4, "4, it is 2 now"), (5, "2, it is 1 now"), (6, "1, the smallest one")]
    assert [(row["step"], row["reason"].partition("scale ")[2]) for row in ledger(tmp_path, "skip")] == said
    failed = [line for line in capfd.readouterr().err.splitlines() if line.startswith("failed")]
    assert len(failed) == world and all("step 6: gradients overflow under precision.min_scale=1 too" in line for line in failed)
    assert not (tmp_path / "checkpoints" / "step_00000006").exists()


def test_a_start_above_the_range_comes_down_by_itself(corpus: Path, tmp_path: Path) -> None:
    """2^40 is more than fp16 holds: real overflows, on the way through the layers."""
    cfg = config(corpus, tmp_path, "precision=fp16", "precision.scale=1099511627776", "train.steps=30", "precision.backoff=0.0625")
    assert run(cfg) == [0]
    skips = [row["step"] for row in ledger(tmp_path, "skip")]
    assert skips[:4] == [1, 2, 3, 4] and len(skips) < 10
    found = [loss for loss, _ in rows(tmp_path).values()]
    assert found[-1] < found[0]


def test_from_and_to_another_precision(corpus: Path, tmp_path: Path) -> None:
    """Masters and optimizer state are fp32 in all of them: a run may change, and begins with a fresh scale."""
    assert run(config(corpus, tmp_path, "precision=bf16", "train.steps=2")) == [0]
    assert run(config(corpus, tmp_path, "precision=fp16", "train.steps=4")) == [0]
    assert scaler_of(tmp_path, 4) == {"scale": 65536.0, "good": 2}
    assert run(config(corpus, tmp_path, "precision=fp32", "train.steps=6")) == [0]
    assert sorted(rows(tmp_path)) == [1, 2, 3, 4, 5, 6]


def test_it_trains_as_fp32_does(corpus: Path, tmp_path: Path) -> None:
    found = {}
    for precision in ("fp32", "fp16"):
        assert run(config(corpus, tmp_path / precision, f"precision={precision}", "train.steps=20")) == [0]
        found[precision] = rows(tmp_path / precision)
    assert not ledger(tmp_path / "fp16", "skip")
    for step, (loss, norm) in found["fp32"].items():
        assert found["fp16"][step] == (pytest.approx(loss, rel=2e-3), pytest.approx(norm, rel=2e-2)), step
