"""Collectives by axis name. Over an axis of size 1 each of them is the identity, so callers never ask."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist

from megatron_scratch.parallel.topology import Topology

_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


def all_reduce(x: torch.Tensor, topo: Topology, axis: str, op: str = "sum") -> torch.Tensor:
    """Reduce `x` in place over an axis, and return it. Not differentiable: for counts, norms and metrics."""
    group = topo.group(axis)
    if group is not None:
        dist.all_reduce(x, op=_OPS[op], group=group)
    return x


def all_reduce_world(x: torch.Tensor, topo: Topology, op: str = "sum") -> torch.Tensor:
    """Reduce `x` in place over every rank, and return it. CPU tensors go over gloo, whatever the device."""
    if topo.world > 1:
        dist.all_reduce(x, op=_OPS[op])
    return x


def barrier(topo: Topology) -> None:
    """Wait for every rank. An all-reduce of one CPU number: NCCL's own barrier would need a device."""
    all_reduce_world(torch.zeros(1), topo)


def gather_json(value: Any, topo: Topology) -> list[Any]:
    """Every rank's `value`, in order of rank, on every rank. JSON travels, not pickle: bytes from a peer are only data."""
    if topo.world == 1:
        return [value]
    mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.long) for _ in range(topo.world)]
    dist.all_gather(lengths, torch.tensor([mine.numel()]))
    longest = int(max(lengths))
    rows = [torch.zeros(longest, dtype=torch.uint8) for _ in range(topo.world)]
    dist.all_gather(rows, torch.cat([mine, mine.new_zeros(longest - mine.numel())]))
    return [json.loads(bytes(row[: int(n)].tolist())) for row, n in zip(rows, lengths, strict=True)]
