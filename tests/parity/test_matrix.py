"""Every layout computes the numbers of one process, or is refused before anything starts."""

from __future__ import annotations

import pytest
from cells import CELLS, Cell, References, compare, covering

from megatron_scratch import registry
from megatron_scratch.train import parity
from megatron_scratch.util.errors import UserError

COVERING = covering()


def illegal(cell: Cell) -> str:
    """Words of the refusal of a cell that cannot be; empty for a legal one."""
    return "parallel.sequence_parallel=true has no effect" if cell.tp == 1 and cell.sequence_parallel else ""


@pytest.mark.parametrize("cell", [c if c in COVERING else pytest.param(c, marks=pytest.mark.full) for c in CELLS if not illegal(c)],
                         ids=str)  # fmt: skip
def test_equals_one_process(cell: Cell, references: References) -> None:
    cfg = cell.config()
    rows = compare(cfg, references)
    assert parity.passed(rows, parity.tolerance(cfg)), rows
    assert {row.quantity for row in rows} == {"loss", "gradient norm", "gradient", "update of weights"}


FEW = {c for c in CELLS if c.accumulation == 1 and c.model in ("gpt2", "llama")}


@pytest.mark.parametrize("cell", [c if c in FEW else pytest.param(c, marks=pytest.mark.full) for c in CELLS if illegal(c)], ids=str)
def test_refused(cell: Cell, references: References) -> None:
    with pytest.raises(UserError, match=illegal(cell)):
        compare(cell.config(), references)


def test_the_subset_covers() -> None:
    assert {(c.tp, c.engine) for c in COVERING} == {(c.tp, c.engine) for c in CELLS} and set(registry.names("engine")) == {
        c.engine for c in CELLS
    }
    for field in ("model", "accumulation", "sequence_parallel"):
        for other in ("tp", "engine"):
            met = {(getattr(c, field), getattr(c, other)) for c in COVERING}
            if field != "model":
                assert met == {(getattr(c, field), getattr(c, other)) for c in CELLS if not illegal(c)}, (field, other)
    assert {c.model for c in COVERING} == {c.model for c in CELLS}
