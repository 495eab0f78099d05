"""Rows beside the matrix: options that must change no number, under layouts where they could."""

from __future__ import annotations

import pytest
from cells import Cell, References, compare

from megatron_scratch.train import parity

TP2, TP4 = Cell(2, "ddp", "llama", 4, True), Cell(4, "fsdp", "gpt2", 1, True)
PLAIN = Cell(2, "ddp", "gpt2", 1, False)

# (cell, overrides): dropout has the same masks everywhere; documents, z-loss, head norms, post-norm, more ranks than k/v heads
ROWS = [
    (TP2, ["model.dropout=0.2"]),
    (PLAIN, ["model.dropout=0.2"]),
    (Cell(1, "fsdp", "scratch", 4, False), ["model.dropout=0.2"]),
    (TP2, ["data.mask_documents=true", "train.z_loss=1e-2"]),
    (TP2, ["parallel.overlap=true"]),
    (PLAIN, ["parallel.overlap=true"]),
    (TP2, ["model.qk_norm=true", "model.qkv_bias=true", "model.sliding_window=6"]),
    (PLAIN, ["model.qk_norm=true", "model.norm_place=post"]),
    (TP4, ["model.num_kv_heads=1", "model.fused_qkv=false", "model.qkv_bias=true"]),
    (Cell(4, "ddp", "gpt2", 1, False), ["model.num_kv_heads=2", "model.fused_qkv=false", "model.qk_norm=true"]),
    (TP2, ["model.vocab_size=60", "precision=fp32"]),  # padded to 128: the second rank holds nothing but padding
    (TP2, ["model.position=sinusoidal", "model.mlp=geglu", "model.head_dim=24"]),
    (Cell(1, "fsdp", "llama", 4, False), ["engine.reshard_after_forward=false"]),
    (Cell(1, "fsdp", "scratch", 4, False), ["engine.reduce_every_microbatch=true"]),
    (Cell(2, "hsdp", "llama", 4, True), ["engine.reduce_every_microbatch=true", "engine.reshard_after_forward=false"]),
    (Cell(2, "zero2", "llama", 4, True), ["engine.offload_optimizer=true", "model.dropout=0.2"]),
    (Cell(1, "zero3", "gpt2", 4, False), ["engine.offload_optimizer=true", "engine.offload_param=true"]),
    (TP2, ["optim=sgd", "optim.clip_grad_norm=0.01"]),
    (Cell(2, "fsdp", "llama", 1, True), ["optim=lion"]),
    (Cell(2, "ddp", "llama", 1, True), ["model.attention=reference"]),
]


# The same as rows above, on more ranks.
FULL = [
    (TP4, ["model.dropout=0.2"]),
    (TP4, ["train.z_loss=1e-2"]),
    (Cell(2, "hsdp", "llama", 1, True), ["engine.reshard_after_forward=false"]),
]


@pytest.mark.parametrize(
    ("cell", "overrides"),
    [*(pytest.param(*row, id=f"{row[0]}-{'-'.join(row[1])}") for row in ROWS),
     *(pytest.param(*row, id=f"{row[0]}-{'-'.join(row[1])}", marks=pytest.mark.full) for row in FULL)],
)  # fmt: skip
def test_equals_one_process(cell: Cell, overrides: list[str], references: References) -> None:
    cfg = cell.config(*overrides)
    rows = compare(cfg, references)
    assert parity.passed(rows, parity.tolerance(cfg)), rows


ROUNDED = [("fp32", TP2), ("fp32", Cell(2, "fsdp", "gpt2", 1, True)), ("bf16", TP2), ("bf16", TP4), ("bf16", PLAIN),
           ("bf16", Cell(2, "hsdp", "scratch", 1, True)), *(("bf16", Cell(2, f"zero{n}", "llama", 4, True)) for n in (1, 2, 3)),
           ("bf16", Cell(1, "fsdp", "llama_tied", 4, False)), ("bf16", Cell(1, "zero3", "gpt2", 1, False))]  # fmt: skip


@pytest.mark.parametrize(("precision", "cell"), ROUNDED, ids=[f"{precision}-{cell}" for precision, cell in ROUNDED])
def test_equals_one_process_in(precision: str, cell: Cell, references: References) -> None:
    cfg = cell.config(f"precision={precision}")
    rows = compare(cfg, references)
    assert parity.passed(rows, parity.tolerance(cfg)), rows
