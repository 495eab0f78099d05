"""One global gradient norm, right over every axis."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.distributed.tensor import DTensor, Shard

from megatron_scratch.parallel.collectives import all_reduce_world
from megatron_scratch.parallel.topology import Topology


def _copies(gradient: torch.Tensor, world: int) -> int:
    """How many ranks hold the same numbers: the world, over the axes that shard."""
    shards = 1
    if isinstance(gradient, DTensor):
        for axis, placement in enumerate(gradient.placements):
            shards *= gradient.device_mesh.size(axis) if isinstance(placement, Shard) else 1
    return world // shards


@torch.no_grad()
def global_norm(gradients: Sequence[torch.Tensor], topo: Topology) -> torch.Tensor:
    """L2 norm over all ranks' gradients, each distinct number counted once; an fp32 scalar on the device.

    sqrt(sum over ranks of |local|^2 / copies): torch's own norm refuses gradients on meshes of different shapes.
    """
    by_copies: dict[int, list[torch.Tensor]] = {}
    for g in gradients:
        by_copies.setdefault(_copies(g, topo.world), []).append(g.to_local() if isinstance(g, DTensor) else g)
    total = torch.zeros((), device=topo.device)
    replicated = set(by_copies) <= {topo.world}  # plain data parallel: every rank has the whole sum, no message needed
    for copies, local in by_copies.items():
        squares = torch.stack(torch._foreach_norm(local, 2)).float().square().sum()
        total += squares if replicated else squares / copies
    return total.sqrt() if replicated else all_reduce_world(total, topo).sqrt()


@torch.no_grad()
def clip_(gradients: Sequence[torch.Tensor], norm: torch.Tensor, limit: float) -> None:
    """Scale gradients in place so that their norm is at most `limit`. No host sync: the factor stays on the device."""
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([g.to_local() if isinstance(g, DTensor) else g for g in gradients], factor)
