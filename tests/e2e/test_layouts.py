"""A layout is a free choice, also in the middle of a run: stop under one, go on under another, and the losses are the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import config, rows, run

from megatron_scratch.cli import main
from megatron_scratch.engine.zero import import_deepspeed

SGD = ["schedule=constant", "optim=sgd", "optim.lr=0.1", "optim.momentum=0.9", "train.micro_batch_size=1"]

# processes, overrides
LAYOUTS = {
    "one": (1, []),
    "tp": (2, ["parallel.tp=2"]),
    "fsdp_tp": (4, ["engine=fsdp", "parallel.tp=2"]),
    "hsdp": (4, ["engine=hsdp", "engine.replicas=2"]),
    "zero1": (2, ["engine=zero1"]),
    "zero2_tp": (4, ["engine=zero2", "parallel.tp=2"]),
    "zero3": (4, ["engine=zero3"]),
    "tp_overlap": (4, ["parallel.tp=2", "parallel.overlap=true"]),
}
# The layout of steps 1 to 3, and that of steps 4 to 6. By default those that tests/faults/test_reshard.py has not.
SWITCHES = [("tp_overlap", "zero3"), ("zero2_tp", "zero1"),
            *(pytest.param(*pair, marks=pytest.mark.full)
              for pair in [("one", "fsdp_tp"), ("fsdp_tp", "tp"), ("hsdp", "one"), ("zero3", "zero2_tp"), ("zero1", "fsdp_tp"),
                           ("zero3", "one")])]  # fmt: skip


def _go(corpus: Path, path: Path, layout: str, steps: int) -> None:
    world, overrides = LAYOUTS[layout]
    assert run(config(corpus, path, *SGD, *overrides, f"train.steps={steps}", world=world), world) == [0] * world


@pytest.fixture(scope="module", autouse=True)
def deepspeed() -> None:
    """Imported here once, instead of 2 s in every forked rank."""
    import_deepspeed("zero1", torch.device("cpu"))


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[float, float]]:
    """Six steps in one process, never stopped."""
    path = tmp_path_factory.mktemp("whole")
    _go(corpus, path, "one", 6)
    return rows(path)


@pytest.mark.parametrize(("before", "after"), SWITCHES)
def test_stop_under_one_layout_go_on_under_another(
    before: str, after: str, corpus: Path, tmp_path: Path, whole: dict[int, tuple[float, float]]
) -> None:
    _go(corpus, tmp_path, before, 3)
    _go(corpus, tmp_path, after, 6)
    found = rows(tmp_path)
    assert list(found) == list(whole)
    for step, (loss, norm) in whole.items():  # the tolerance of test_train: fp32 sums over 256 tokens, six steps
        assert found[step] == (pytest.approx(loss, rel=1e-5), pytest.approx(norm, rel=1e-5)), step


@pytest.mark.full
@pytest.mark.parametrize("layout", ["tp", "tp_overlap", "fsdp_tp"])
def test_compiled_blocks_compute_the_same(layout: str, corpus: Path, tmp_path: Path) -> None:
    found = []
    for name in ("one", layout):
        world, overrides = LAYOUTS[name]
        more = ["model.dropout=0.1", "train.micro_batch_size=2", "train.steps=3", f"train.compile={name == layout}"]
        assert run(config(corpus, tmp_path / name, *SGD[:-1], *overrides, *more, world=world), world) == [0] * world
        found.append(rows(tmp_path / name))
    for step, (loss, norm) in found[0].items():
        assert found[1][step] == (pytest.approx(loss, rel=1e-5), pytest.approx(norm, rel=1e-5)), step


def test_a_model_trained_over_tp_is_evaluated_and_writes_in_one_process(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _go(corpus, tmp_path, "fsdp_tp", 3)
    logged = [line for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if "val_loss" in line]
    assert main(["eval", str(tmp_path), "batches=2", "micro_batch_size=8"]) == 0
    assert f"loss {float(logged[-1].split('val_loss')[1].split(':')[1].split(',')[0]):.4f}" in capfd.readouterr().out
    assert main(["generate", str(tmp_path), "prompt=import", "max_new_tokens=4", "stop_at_eod=false"]) == 0


@pytest.mark.parametrize("layout", ["one", "tp"])
def test_an_id_outside_of_the_vocabulary_ends_every_layout_alike(
    layout: str, corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    world, overrides = LAYOUTS[layout]
    cfg = config(corpus, tmp_path, *SGD, *overrides, "data.check_ids=false", world=world)
    cfg.model.vocab_size = 100  # the corpus is bytes: ids up to 256
    assert run(cfg, world) == [2] * world
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == world
    assert all("is outside of the vocabulary: allowed: 0 to 99 (model.vocab_size=100)" in line for line in lines)
