"""Every pipeline computes the numbers of one process, or is refused before anything starts."""

from __future__ import annotations

import pytest
from cells import References, compare
from stages import CELLS, ENGINES, RECOMPUTE, SCHEDULES, Cell, covering, illegal

from megatron_scratch import registry
from megatron_scratch.train import parity
from megatron_scratch.util.errors import UserError

COVERING = covering()
LEGAL = [cell for cell in CELLS if not illegal(cell)]


@pytest.mark.parametrize("cell", [c if c in COVERING else pytest.param(c, marks=pytest.mark.full) for c in LEGAL], ids=str)
def test_equals_one_process(cell: Cell, references: References) -> None:
    cfg = cell.config()
    rows = compare(cfg, references)
    assert parity.passed(rows, parity.tolerance(cfg)), rows
    assert {row.quantity for row in rows} == {"loss", "gradient norm", "gradient", "update of weights"}


REFUSED = [cell for cell in CELLS if illegal(cell)]
FEW = {c for c in REFUSED if (c.pp, c.engine, c.tp, c.recompute) == (2, "ddp", 1, "none")}


@pytest.mark.parametrize("cell", [c if c in FEW else pytest.param(c, marks=pytest.mark.full) for c in REFUSED], ids=str)
def test_refused(cell: Cell, references: References) -> None:
    with pytest.raises(UserError, match=illegal(cell)):
        compare(cell.config(), references)


def test_the_subset_covers() -> None:
    assert COVERING <= set(LEGAL) and set(registry.names("pipeline")) == set(SCHEDULES)
    assert {(c.schedule, c.engine) for c in COVERING} == {(s, e) for s in SCHEDULES for e in ENGINES}
    for field, values in (("pp", {2, 4}), ("tp", {1, 2}), ("recompute", set(RECOMPUTE))):
        for schedule in SCHEDULES:
            assert {getattr(c, field) for c in COVERING if c.schedule == schedule} == values, (field, schedule)
    assert {c.deal % 3 for c in COVERING} == {0, 1, 2}


# What is not an axis: (cell, overrides).
ROWS = [
    (Cell(2, "1f1b", "fsdp", 1, "none", 1), ["engine.reshard_after_forward=true"]),
    (Cell(2, "zbv_zero_bubble", "fsdp", 1, "none", 2), ["engine.reshard_after_forward=true"]),
    (Cell(2, "1f1b", "fsdp", 1, "full", 1), ["engine.reduce_every_microbatch=true"]),
    (Cell(2, "dualpipev", "hsdp", 1, "none", 2), ["engine.reduce_every_microbatch=true", "engine.reshard_after_forward=true"]),
    (Cell(2, "1f1b", "ddp", 2, "none", 1), ["parallel.overlap=true", "parallel.stages=[7,2]", "engine.bucket_mb=1"]),
    (Cell(2, "interleaved_1f1b", "ddp", 2, "none", 2), ["parallel.sequence_parallel=false", "parallel.stages=[3,2,2,2]"]),
    (Cell(2, "interleaved_zero_bubble", "ddp", 2, "none", 2), ["model.norm_place=post", "model.qk_norm=true", "train.z_loss=1e-2"]),
    (Cell(2, "zbv_zero_bubble", "ddp", 1, "none", 2), ["model.position=learned", "model.dropout=0.2"]),
    (Cell(2, "interleaved_1f1b", "fsdp", 1, "none", 3), []),
    (Cell(2, "gpipe", "ddp", 1, "none", 1), ["launcher.processes=2", "precision=fp32"]),  # one data-parallel rank
    (Cell(2, "zbv_zero_bubble", "fsdp", 1, "none", 2), ["launcher.processes=2"]),
]


@pytest.mark.parametrize(("cell", "overrides"), ROWS, ids=[f"{cell}-{'-'.join(words)}" for cell, words in ROWS])
def test_options(cell: Cell, overrides: list[str], references: References) -> None:
    cfg = cell.config(*(word for word in overrides if not word.startswith("launcher")))
    if "launcher.processes=2" in overrides:
        cfg.launcher.processes = 2
    rows = compare(cfg, references)
    assert parity.passed(rows, parity.tolerance(cfg)), rows


ROUNDED = [Cell(2, "1f1b", "ddp", 2, "none", 1), Cell(2, "zbv_zero_bubble", "fsdp", 1, "full", 2),
           Cell(2, "dualpipev", "ddp", 1, "none", 2), Cell(4, "interleaved_1f1b", "fsdp", 1, "selective", 2)]  # fmt: skip


@pytest.mark.parametrize("cell", ROUNDED, ids=str)
def test_equals_one_process_in_bf16(cell: Cell, references: References) -> None:
    cfg = cell.config("precision=bf16")
    rows = compare(cfg, references)
    assert parity.passed(rows, parity.tolerance(cfg)), rows
