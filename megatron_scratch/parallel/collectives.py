"""Collectives by axis name. Over an axis of size 1 each of them is the identity, so callers never ask.

None of these is differentiable: counts, norms, metrics, gradients that engines add up. Layers use those of `tensor.py`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_scratch.parallel.topology import Topology

_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}

# torch 2.13 renamed them and warns of the old names; 2.11 knows only the old ones. (output, input, group=, async_op=)
all_gather_rows = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_rows = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_reduce(x: torch.Tensor, topo: Topology, axis: str, op: str = "sum") -> torch.Tensor:
    """Reduce `x` in place over an axis, and return it."""
    group = topo.group(axis)
    if group is not None:
        dist.all_reduce(x, op=_OPS[op], group=group)
    return x


def all_gather(x: torch.Tensor, topo: Topology, axis: str) -> torch.Tensor:
    """(...) -> (n, ...): what each rank of the axis has, in order."""
    group = topo.group(axis)
    if group is None:
        return x.unsqueeze(0)
    out = x.new_empty(topo.size(axis), *x.shape)
    all_gather_rows(out.flatten(0, 1) if x.ndim else out, x.contiguous(), group=group)
    return out


@torch.no_grad()
def sum_over(tensors: Sequence[torch.Tensor], topo: Topology, axis: str) -> None:
    """Sum plain tensors of one dtype in place over an axis: one message for all of them."""
    group = topo.group(axis)
    if group is None or not tensors:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat, group=group)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def swap(x: torch.Tensor, topo: Topology, axis: str, other: int) -> torch.Tensor:
    """What the rank at coordinate `other` of an axis has, while it gets ours."""
    theirs, group = torch.empty_like(x, memory_format=torch.contiguous_format), topo.group(axis)
    both = [dist.P2POp(dist.isend, x.contiguous(), group=group, group_peer=other),
            dist.P2POp(dist.irecv, theirs, group=group, group_peer=other)]  # fmt: skip
    for work in dist.batch_isend_irecv(both):
        work.wait()
    return theirs


def all_reduce_world(x: torch.Tensor, topo: Topology, op: str = "sum") -> torch.Tensor:
    """Reduce `x` in place over every rank, and return it. CPU tensors go over gloo, whatever the device."""
    if topo.world > 1:
        dist.all_reduce(x, op=_OPS[op])
    return x


def barrier(topo: Topology) -> None:
    """Wait for every rank. An all-reduce of one CPU number: NCCL's own barrier would need a device."""
    all_reduce_world(torch.zeros(1), topo)


def gather_json(value: Any, topo: Topology, axis: str | None = None) -> list[Any]:
    """The `value` of every rank of the world, or of an axis, in order of rank, on each of them. JSON travels, not pickle: bytes
    from a peer are only data."""
    size, group = (topo.world, None) if axis is None else (topo.size(axis), topo.group(axis))
    if size == 1:
        return [value]
    mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.long) for _ in range(size)]
    dist.all_gather(lengths, torch.tensor([mine.numel()]), group=group)
    longest = int(max(lengths))
    rows = [torch.zeros(longest, dtype=torch.uint8) for _ in range(size)]
    dist.all_gather(rows, torch.cat([mine, mine.new_zeros(longest - mine.numel())]), group=group)
    return [json.loads(bytes(row[: int(n)].tolist())) for row, n in zip(rows, lengths, strict=True)]
