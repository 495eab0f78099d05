"""Recomputation under layouts and engines: the numbers of one process, and every rank keeps what the formulas say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from megatron_scratch.config.shrink import shrink, small_world, vet
from megatron_scratch.engine.zero import import_deepspeed
from megatron_scratch.train import parity

sys.path += [str(Path(__file__).resolve().parents[1] / "parity"), str(Path(__file__).resolve().parents[2] / "benchmarks")]
import activation_memory
from cells import Cell, References, compare

FULL, SELECTIVE, OFFLOAD = "parallel.recompute=full", "parallel.recompute=selective", "parallel.offload_activations=true"
OPS = ["parallel.recompute=ops", "parallel.recompute_save=[matmul,attention]", "model.attention=sdpa"]
BUDGET = ["parallel.recompute=budget", "parallel.recompute_budget=0.5"]
ROWS = [
    (Cell(2, "ddp", "gpt2", 1, True), [FULL]),
    (Cell(2, "ddp", "llama", 1, True), [FULL, "parallel.overlap=true"]),
    (Cell(2, "ddp", "gpt2", 4, False), [FULL, "parallel.recompute_every=2", OFFLOAD]),
    (Cell(2, "fsdp", "llama", 4, True), OPS),
    (Cell(2, "fsdp", "gpt2", 1, True), [SELECTIVE]),
    (Cell(1, "hsdp", "gpt2", 1, False), BUDGET),
    (Cell(2, "fsdp", "gpt2", 1, True), [*BUDGET, "precision=bf16"]),
    (Cell(2, "zero1", "gpt2", 4, False), [SELECTIVE]),
    (Cell(1, "zero2", "llama", 1, False), OPS),
    (Cell(2, "zero3", "gpt2", 4, False), [FULL, "engine.persist=8"]),
    (Cell(1, "zero3", "llama", 4, False), [SELECTIVE, OFFLOAD, "engine.persist=0"]),
    (Cell(1, "zero3", "gpt2", 1, False), [FULL, OFFLOAD, "precision=bf16"]),
    (Cell(2, "fsdp", "gpt2", 4, True), [FULL, "parallel.pp=2"]),
    (Cell(1, "ddp", "gpt2", 4, False), [*BUDGET, "parallel.pp=2", "parallel.schedule=zbv_zero_bubble"]),
    (Cell(1, "ddp", "llama", 4, False), [*OPS, "parallel.pp=2", "parallel.schedule=zbv_zero_bubble"]),
]


@pytest.fixture(scope="module")
def references() -> References:
    import_deepspeed("zero1", torch.device("cpu"))  # once, instead of in every forked rank
    return References()


@pytest.mark.parametrize(("cell", "overrides"), ROWS, ids=[f"{cell}-{'-'.join(words)}" for cell, words in ROWS])
def test_equals_one_process_that_keeps_all(cell: Cell, overrides: list[str], references: References) -> None:
    cfg = cell.config("model.dropout=0.2", *overrides)
    rows = compare(cfg, references)
    assert parity.passed(rows, parity.tolerance(cfg)), rows


COMPILED = [(FULL, Cell(2, "fsdp", "gpt2", 1, True)), (SELECTIVE, Cell(1, "ddp", "gpt2", 1, False))]


# torch.compile (2.13) looks whether what comes out of a message has a gradient, instantiates autograd Functions, and warns of both.
@pytest.mark.full
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf", "ignore:.*should not be instantiated")
@pytest.mark.parametrize(("mode", "cell"), COMPILED, ids=[f"{mode}-{cell}" for mode, cell in COMPILED])
def test_compiled_equals_one_process_that_is_not(mode: str, cell: Cell, references: References) -> None:
    """`shrink` takes train.compile away; here it comes back, dropout and the messages of tp inside of what is computed again."""
    cfg = cell.config("model.dropout=0.2", mode)
    world = small_world(cfg)
    vet(cfg, world)
    small, _ = parity.comparable(shrink(cfg, world))
    truths = references(small)
    small.train.compile = True
    rows = parity.compare(small, world, 2, truths)
    assert parity.passed(rows, parity.tolerance(cfg)), rows


TP_ROWS = [row for row in activation_memory.rows() if any(word.startswith("parallel.tp") for word in row.words)]


@pytest.mark.parametrize("row", TP_ROWS, ids=[f"{row.what}-{row.mode}" for row in TP_ROWS])
def test_a_rank_keeps_what_the_formulas_say(row: activation_memory.Row) -> None:
    counted, expected = activation_memory.kept(row)
    assert abs(counted / expected - 1) <= activation_memory.LIMIT
