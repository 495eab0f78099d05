"""A bit that flips on one rank is found, named, and never in a checkpoint."""

from __future__ import annotations

from pathlib import Path

import poison
import pytest
import torch
from runs import config, ledger, rows, run, weights

from megatron_scratch.checkpoint.manifest import committed
from megatron_scratch.engine.zero import import_deepspeed

LONG = ["train.steps=7", "checkpoint.every=3", "checkpoint.keep_last=0", "train.eval_every=0", "train.micro_batch_size=1"]
UP = "model.layers.1.mlp.up.weight"


def found(
    corpus: Path, path: Path, world: int, arm: poison.Arm, *words: str
) -> tuple[list[int], list[int], str]:  # fmt: skip
    """(exit codes, committed steps, what the ledger says) of a run."""
    cfg = config(corpus, path, *LONG, *words, world=world)
    codes = run(cfg, world, arm=arm)
    return codes, committed(path / "checkpoints"), "; ".join(row["reason"] for row in ledger(path, "failed"))


@pytest.mark.parametrize(("world", "on", "name", "words", "who"), [
    (2, 1, UP, [], "ranks 0, 1 differ, and no majority"),
    (4, 2, UP, [], "rank 2 differs from the other 3"),
    (4, 3, UP, ["parallel.tp=2"], "ranks 1, 3 differ"),
    (4, 1, UP, ["engine=hsdp", "engine.replicas=2"], "ranks 1, 3 differ"),
    (2, 0, "optim.layers.0.attention.out.weight.exp_avg", ["precision=bf16"], "ranks 0, 1 differ"),
    (4, 0, "model.embed.weight", ["parallel.pp=2"], "ranks 0, 1 differ"),
])  # fmt: skip
def test_found_before_a_commit(
    world: int, on: int, name: str, words: list[str], who: str, corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    codes, steps, said = found(corpus, tmp_path, world, poison.flip(on, 4, name), *words)
    assert codes == [1] * world and steps == [3], "also the ranks whose copies are in order"
    assert said.startswith("step 6: ") and who in said, said
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("failed")]
    assert lines == [f"failed: {said}"] * world


def test_found_in_time(corpus: Path, tmp_path: Path) -> None:
    """Every second step they are compared, and the tensor itself is named; afterwards the run goes on as one without a fault."""
    codes, steps, said = found(corpus, tmp_path / "a", 2, poison.flip(1, 4, UP), "fault.replica_check_every=2")
    assert (codes, steps) == ([1, 1], [3])
    assert said.startswith(f"step 4: {UP} is not the same on all ranks that hold a copy"), "in the step of the flip nothing else is"
    again, whole = (config(corpus, tmp_path / name, *LONG, world=2) for name in ("a", "w"))
    assert run(again, 2) == run(whole, 2) == [0, 0]
    assert rows(tmp_path / "a") == rows(tmp_path / "w") and weights(tmp_path / "a", 7) == weights(tmp_path / "w", 7)


@pytest.mark.parametrize(("byte", "bit"), [(0, 0), (3, 7)])
def test_the_lowest_bit_and_the_sign_just_before_a_commit(byte: int, bit: int, corpus: Path, tmp_path: Path) -> None:
    codes, steps, said = found(corpus, tmp_path, 2, poison.flip(1, 6, UP, byte, bit))
    assert (codes, steps) == ([1, 1], [3]) and said.startswith(f"step 6: {UP} is not the same")


@pytest.mark.parametrize("words", [["engine=fsdp"], ["parallel.pp=2"], ["engine=zero1"], ["engine=zero3"]], ids=str)
def test_what_is_not_finite_is_not_saved(words: list[str], corpus: Path, tmp_path: Path) -> None:
    """Where nobody has a copy to compare with: an update overflows on the last rank, in the step before a checkpoint."""
    if "zero" in words[0]:
        import_deepspeed("zero1", torch.device("cpu"))
    name = "optim.layers.1.mlp.up.weight.exp_avg_sq" if "zero" not in words[0] else "optim.head.weight.exp_avg_sq"
    codes, steps, said = found(corpus, tmp_path, 2, poison.overflow(1, 6, name), *words)
    assert (codes, steps) == ([1, 1], [3])
    assert said.startswith(f"step 6: {name} is not finite, though the loss and the gradient norm were")


def test_copies_stay_equal(corpus: Path, tmp_path: Path) -> None:
    """No false alarm: compared after every step."""
    for name, world, words in (("ddp", 2, ["parallel.tp=1", "precision=bf16"]), ("hsdp", 4, ["engine=hsdp", "engine.replicas=2"]),
                               ("tp", 4, ["parallel.tp=2"])):  # fmt: skip
        cfg = config(corpus, tmp_path / name, *LONG, *words, "fault.replica_check_every=1", "model.dropout=0.1", world=world)
        assert run(cfg, world) == [0] * world
