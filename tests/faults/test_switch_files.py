"""Files that ask a run for something: `stop`, `save`; and how soon it does it."""

from __future__ import annotations

import json
from pathlib import Path

import poison
import pytest
from runs import config, ledger, rows, run, weights

from megatron_scratch.checkpoint.manifest import committed
from megatron_scratch.train import evaluate, fault
from megatron_scratch.train.step import TrainStep
from megatron_scratch.util.env import Rank

WORDS = ["train.steps=8", "checkpoint.every=0", "checkpoint.keep_last=0", "train.eval_every=0", "train.micro_batch_size=1"]


def touch(path: Path, step: int, text: str = "") -> poison.Arm:
    """Before the n-th step the main rank finds a file; it looks in every step."""

    def arm(rank: Rank) -> None:
        fault.LOOK_EVERY = 0.0
        if rank.rank == 0:
            poison.around(TrainStep, "gradients", {step: lambda *_: path.write_text(text)}, before=True)

    return arm


@pytest.mark.parametrize("words", [[], ["checkpoint.async_save=true", "checkpoint.every=7"], ["engine=fsdp"]], ids=str)
def test_save_saves_once_and_the_run_goes_on_bitwise(words: list[str], corpus: Path, tmp_path: Path) -> None:
    whole, asked = (config(corpus, tmp_path / name, *WORDS, *words, world=2) for name in "wa")
    assert run(whole, 2) == [0, 0]
    assert run(asked, 2, arm=touch(tmp_path / "a" / "save", 3)) == [0, 0]
    assert committed(tmp_path / "a" / "checkpoints") == sorted({*committed(tmp_path / "w" / "checkpoints"), 3})
    assert not (tmp_path / "a" / "save").exists() and [e["step"] for e in ledger(tmp_path / "a", "save")].count(3) == 1
    assert rows(tmp_path / "a") == rows(tmp_path / "w") and weights(tmp_path / "a", 8) == weights(tmp_path / "w", 8)


def test_save_and_stop_at_once(corpus: Path, tmp_path: Path) -> None:
    cfg = config(corpus, tmp_path, *WORDS, world=2)
    arm = poison.both(touch(tmp_path / "save", 3), touch(tmp_path / "stop", 3, "maintenance"))
    assert run(cfg, 2, arm=arm) == [75, 75] and committed(tmp_path / "checkpoints") == [3]
    assert not (tmp_path / "save").exists() and (tmp_path / "stop").exists()
    assert [e["reason"] for e in ledger(tmp_path, "stop")] == ["maintenance"]


@pytest.mark.parametrize(("world", "on", "words"), [
    (1, 0, []), (2, 0, []), (2, 1, []), (4, 3, ["parallel.tp=2"]), (2, 1, ["parallel.pp=2"]),
    (4, 2, ["parallel.pp=4", "model.num_layers=4"]), (2, 1, ["engine=fsdp"]),
])  # fmt: skip
def test_a_stop_ends_an_evaluation(world: int, on: int, words: list[str], corpus: Path, tmp_path: Path) -> None:
    """Any rank is told, in the midst of the second evaluation: all break off before the same batch, and its loss is nowhere."""
    asked: list[int] = []

    def arm(rank: Rank) -> None:
        whole, count = evaluate.Stop.__call__, [0]

        def call(self: evaluate.Stop) -> bool:
            count[0] += 1
            batches = 0 if count[0] <= limit else count[0] - limit
            if rank.rank == on and batches == 3:
                self.asked.__self__.reason = "a test"  # type: ignore[attr-defined]
            broken = whole(self)
            (tmp_path / f"asked{rank.rank}").write_text(str(batches))
            return broken

        evaluate.Stop.__call__ = call  # type: ignore[method-assign]

    more = ["train.steps=6", "train.eval_every=2", "train.eval_batches=10"]
    cfg = config(corpus, tmp_path, *WORDS, *more, *words, world=world)
    model_ranks = cfg.parallel.tp * cfg.parallel.pp
    limit = 10 * 8 * model_ranks // world
    codes = run(cfg, world, arm=arm)
    asked = [int((tmp_path / f"asked{rank}").read_text()) for rank in range(world)]
    assert codes == [75] * world and asked == [3 + cfg.parallel.pp] * world, "as soon as all can know, and on one batch"
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in found if "val_loss" in row] == [2]
    assert committed(tmp_path / "checkpoints") == [5], "the step after it agrees to stop"


def test_whole_evaluations_are_what_they_were(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = ["train.steps=2", "train.eval_every=1", "parallel.pp=2"]
    losses = []
    for name in ("with", "without"):
        if name == "without":
            monkeypatch.setattr(evaluate.Stop, "__call__", lambda self: False)
        assert run(config(corpus, tmp_path / name, *WORDS, *more, world=2), 2) == [0, 0]
        found = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses.append([row["val_loss"] for row in found if "val_loss" in row])
    assert losses[0] == losses[1] and len(losses[0]) == 2
