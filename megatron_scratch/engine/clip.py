"""One global gradient norm, right over every axis."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.distributed.tensor import DTensor

from megatron_scratch.parallel.collectives import all_reduce_world
from megatron_scratch.parallel.layout import local
from megatron_scratch.parallel.topology import Topology


def copies_of(gradient: torch.Tensor, world: int) -> int:
    """How many ranks of a pipeline stage hold the same numbers: all of them, over the axes that shard."""
    shards = 1
    if isinstance(gradient, DTensor):
        for axis, placement in enumerate(gradient.placements):
            shards *= 1 if placement.is_replicate() else gradient.device_mesh.size(axis)  # Shard, or FSDP's _StridedShard
    return world // shards


@torch.no_grad()
def global_norm(gradients: Sequence[torch.Tensor], topo: Topology) -> torch.Tensor:
    """L2 norm over all ranks' gradients, each distinct number counted once; an fp32 (fp64) scalar on the device.

    sqrt(sum over ranks of |local|^2 / copies): torch's own norm refuses gradients on meshes of different shapes.
    """
    by_copies: dict[int, list[torch.Tensor]] = {}
    for g in gradients:
        by_copies.setdefault(copies_of(g, topo.world // topo.size("pp")), []).append(local(g))
    dtype = torch.promote_types(gradients[0].dtype, torch.float32) if gradients else torch.float32
    total = torch.zeros((), device=topo.device, dtype=dtype)
    # plain data parallel: every rank has the whole sum, no message needed
    replicated = topo.size("pp") == 1 and set(by_copies) <= {topo.world}
    for copies, parts in by_copies.items():
        squares = torch.stack(torch._foreach_norm(parts, 2)).to(dtype).square().sum()
        total += squares if replicated else squares / copies
    return total.sqrt() if replicated else all_reduce_world(total, topo).sqrt()


@torch.no_grad()
def clip_(gradients: Sequence[torch.Tensor], norm: torch.Tensor, limit: float) -> None:
    """Scale gradients in place so that their norm is at most `limit`. No host sync: the factor stays on the device."""
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([local(g) for g in gradients], factor)
