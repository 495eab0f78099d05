"""Parity is worth what it catches: known bugs of parallel training, put in one at a time, and each is seen.

The ranks are forked, so they inherit the mutant; the one process that they are compared with has no collectives for it to be in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import stages
import torch
import torch.distributed as dist
from cells import Cell, References, compare

from megatron_scratch.engine import clip, ddp, fsdp, torch_engine
from megatron_scratch.engine.buckets import Buckets
from megatron_scratch.engine.torch_engine import TorchEngine
from megatron_scratch.models import decoder, dropout, linear, objective
from megatron_scratch.parallel import tensor
from megatron_scratch.parallel.deferred import WeightGradients
from megatron_scratch.parallel.topology import Topology
from megatron_scratch.train import parity
from megatron_scratch.train.passes import Stages

PLAIN, SEQUENCE = Cell(2, "ddp", "gpt2", 4, False), Cell(2, "ddp", "gpt2", 4, True)
LLAMA, SHARDED = Cell(2, "ddp", "llama", 4, True), Cell(2, "fsdp", "llama", 4, True)

Patch = Callable[[pytest.MonkeyPatch], None]


def replace(owner: Any, name: str, new: Any) -> Patch:
    return lambda patch: patch.setattr(owner, name, new, raising=False)


def method(owner: type, name: str, new: Callable[..., Any]) -> Patch:
    return replace(owner, name, staticmethod(new))


def average(self: Buckets, bucket: Sequence[torch.nn.Parameter]) -> None:
    for parameter in bucket:
        parameter.grad /= 2
    send(self, bucket)


send = Buckets._send


def rank_in_seed(*parts: object) -> int:
    return dropout_seed(*parts, dist.get_rank())


dropout_seed = dropout.seed_from

# name, the mutant, where it lives, further overrides, the quantity in which it must show
Mutant = tuple[str, Patch, Cell | stages.Cell, list[str], str]
DROPOUT = ["model.dropout=0.2"]

REDUCTIONS: list[Mutant] = [
    ("no all-reduce after a row-parallel layer",
     method(tensor._Reduce, "forward", lambda ctx, x, group: x.clone()), PLAIN, [], "loss"),
    ("no all-reduce of the gradient at a column-parallel layer",
     method(tensor._Copy, "backward", lambda ctx, dy: (dy, None)), PLAIN, [], "gradient"),
    ("a gradient scaled by tp: all-reduced where it is whole",
     method(tensor._Reduce, "backward", lambda ctx, dy: (dy * 2, None)), PLAIN, [], "gradient"),
    ("a gradient scaled by 1/tp: averaged over tp",
     method(tensor._Gather, "backward", lambda ctx, dy: (tensor._scatter(dy, ctx.group) / 2, None)), SEQUENCE, [], "gradient"),
    ("partial gradients of norms not added up",
     replace(TorchEngine, "finish_gradients", lambda self: None), LLAMA, [], "gradient"),
    ("partial gradients added up in every microbatch",
     replace(ddp.DDPEngine, "backward", lambda self, loss: (loss.backward(), self.finish_gradients())),
     LLAMA, [], "gradient"),
    ("copied key/value heads keep their part of the gradient",
     replace(linear, "shard_param", lambda *a, whole=linear.shard_param, **k: whole(*a, **{**k, "partial": False})),
     Cell(4, "ddp", "gpt2", 1, False), ["model.num_kv_heads=2", "model.fused_qkv=false"], "gradient"),
    ("the bias of a row-parallel layer added by every rank",
     replace(linear.RowParallelLinear, "forward", lambda self, x: linear.leave(
         linear.linear(x, linear.cast(self.weight, x.dtype), linear.cast(self.bias, x.dtype)), self.topo)),
     SEQUENCE, [], "gradient"),
    ("the log-sum-exp over this rank's vocabulary alone",
     replace(objective, "all_gather", lambda x, topo, axis: torch.stack([x, x - 1e30])), LLAMA, [], "loss"),
]  # fmt: skip
COUNTS: list[Mutant] = [
    ("a norm counted twice: replicated parameters once per tp rank",
     replace(clip, "copies_of", lambda g, world: 1), LLAMA, [], "gradient norm"),
    ("a norm counted short: only what this rank holds",
     replace(clip, "all_reduce_world", lambda x, topo: x), SHARDED, [], "gradient norm"),
    ("gradients averaged over dp",
     replace(Buckets, "_send", average), LLAMA, [], "gradient"),
    ("gradients of fsdp averaged over dp",
     replace(fsdp.FSDPModule, "set_gradient_divide_factor", lambda self, factor: None), SHARDED, [], "gradient"),
    ("tokens counted by every tp rank",
     replace(Topology, "counts_tokens", True), LLAMA, [], "gradient"),
]  # fmt: skip
RANDOMNESS: list[Mutant] = [
    ("dropout: tp ranks draw different masks where they hold the same",
     replace(dropout, "seed_from", rank_in_seed), PLAIN, DROPOUT, "loss"),
    ("dropout: tp ranks draw the same mask where they hold different tokens",
     replace(dropout, "token_part", lambda tokens, topo: slice(0, tokens // topo.size("tp"))), SEQUENCE, DROPOUT, "loss"),
    ("dropout: every rank's heads draw as the first rank's",
     replace(decoder.Attention, "first_head", property(lambda self: 0, lambda self, value: None)), PLAIN, DROPOUT, "loss"),
]  # fmt: skip


def take_all_but_one(self: WeightGradients) -> Callable[[], None]:
    self.left = self.left[1:]
    return take(self)


def one_seed(self: Stages, batches: list[Any], seeds: list[int], divisor: float) -> torch.Tensor:
    return gradients(self, batches, seeds[:1] * len(seeds), divisor)


take, gradients = WeightGradients.take, Stages.gradients
TIED, V = stages.Cell(2, "1f1b", "ddp", 1, "none", 1), stages.Cell(2, "zbv_zero_bubble", "fsdp", 1, "none", 2)
GPT2 = ["model=gpt2_tiny", "model.tie_embeddings=true", "data.mask_documents=false"]
PIPELINE: list[Mutant] = [
    ("pipeline: each end of a tied embedding keeps its own gradient",
     replace(torch_engine, "swap", lambda x, *_: torch.zeros_like(x)), TIED, GPT2, "gradient"),
    ("pipeline: a tied embedding counts twice in the norm",
     replace(TorchEngine, "_counted", lambda self, gradients: list(gradients.values())), TIED, GPT2, "gradient norm"),
    ("pipeline: the second of a tied embedding is not updated",
     replace(TorchEngine, "_changed", lambda self: None), V, GPT2, "gradient"),
    ("pipeline: a norm over this stage alone",
     replace(clip, "all_reduce_world", lambda x, topo: x), TIED, GPT2, "gradient norm"),
    ("pipeline: a weight gradient left for later is forgotten",
     replace(WeightGradients, "take", take_all_but_one), V, GPT2, "gradient"),
    ("pipeline: every microbatch draws the dropout of the first",
     replace(Stages, "gradients", one_seed), TIED, [*GPT2, "model.dropout=0.2"], "gradient"),
]  # fmt: skip
MUTANTS = [*REDUCTIONS, *COUNTS, *RANDOMNESS, *PIPELINE]


@pytest.fixture(scope="module")
def healthy() -> dict[str, bool]:
    """Which configs have been seen to pass without a mutant."""
    return {}


@pytest.mark.parametrize("mutant", MUTANTS, ids=[m[0] for m in MUTANTS])
def test_is_caught(mutant: Mutant, references: References, healthy: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    _, mutate, cell, overrides, quantity = mutant
    cfg = cell.config(*overrides)
    limit, key = parity.tolerance(cfg), f"{cell} {overrides}"
    if key not in healthy:
        healthy[key] = parity.passed(compare(cfg, references), limit)
    assert healthy[key], "the test itself"
    mutate(monkeypatch)
    rows = compare(cfg, references)
    seen = {row.quantity for row in rows if not row.error <= limit.value}
    assert quantity in seen, rows
    worst = max(row.error for row in rows if row.quantity == quantity)
    assert worst > 1e6 * limit.value, "seen, and not by a hair"
