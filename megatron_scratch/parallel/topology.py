"""Who am I on each axis of the layout. Passed to whoever needs it; nothing here is global."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megatron_scratch.parallel.deferred import WeightGradients

AXES = ("pp", "dp", "cp", "tp")  # outermost first: tp neighbours are neighbours in rank, hence on one node
HYBRID = ("replicate", "shard")  # the two halves of dp under hybrid sharding: copies of the model, and the ranks that share one


@dataclass(frozen=True)
class Topology:
    """Degrees of the layout and this rank's place in it. An axis of size 1 has no group: collectives over it are identity."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")
    degrees: Mapping[str, int] = field(default_factory=dict)  # axis -> size; missing: 1
    mesh: DeviceMesh | None = None  # all axes; None in a world of one
    axes: Mapping[str, DeviceMesh] = field(default_factory=dict)  # axis -> its part of the mesh: cutting one out takes 0.7 ms
    groups: Mapping[str, dist.ProcessGroup] = field(default_factory=dict)  # of the axes with more than one rank
    indices: Mapping[str, int] = field(default_factory=dict)  # axis -> this rank's coordinate
    sequence_parallel: bool = False  # between tensor-parallel layers each tp rank holds a part of the tokens, not all of them
    overlap: bool = False  # tp messages of the backward pass travel while matrices are multiplied
    deferred: WeightGradients | None = None  # where linears leave their weight gradients; None: they compute them at once

    @staticmethod
    def build(
        degrees: Mapping[str, int], rank: int, world: int, device: torch.device, sequence_parallel: bool = False,
        overlap: bool = False, deferred: WeightGradients | None = None,
    ) -> Topology:  # fmt: skip
        """Make the mesh; with more than one rank the default process group must exist.

        Args:
            degrees: sizes of pp, cp, tp; dp is what is left of `world`. `replicate` > 1 splits dp into (replicate, shard).
        """
        sizes = {axis: degrees.get(axis, 1) for axis in AXES}
        sizes["dp"] = world // math.prod(sizes[a] for a in AXES if a != "dp")
        assert math.prod(sizes.values()) == world, (sizes, world)
        copies = degrees.get("replicate", 1)
        assert sizes["dp"] % copies == 0, (sizes, copies)
        halves = {"replicate": copies, "shard": sizes["dp"] // copies}
        several = sizes["tp"] > 1
        flags: dict[str, Any] = {"sequence_parallel": sequence_parallel and several, "overlap": overlap and several,
                                 "deferred": deferred}  # fmt: skip
        sizes |= halves
        if world == 1:
            return Topology(rank, world, device, sizes, **flags)
        dims = ("pp", *(HYBRID if copies > 1 else ("dp",)), "cp", "tp")
        mesh = init_device_mesh(device.type, tuple(sizes[d] for d in dims), mesh_dim_names=dims)
        axes = {d: mesh[d] for d in dims}
        if copies > 1:
            axes["dp"] = mesh[HYBRID]._flatten("dp")
        groups = {axis: part.get_group() for axis, part in axes.items() if part.size() > 1}
        indices = {axis: part.get_local_rank() for axis, part in axes.items()}
        return Topology(rank, world, device, sizes, mesh, axes, groups, indices, **flags)

    def size(self, axis: str) -> int:
        return self.degrees.get(axis, 1)

    def index(self, axis: str) -> int:
        """This rank's coordinate on an axis."""
        return self.indices.get(axis, 0)

    def group(self, axis: str) -> dist.ProcessGroup | None:
        """None over an axis of one rank."""
        return self.groups.get(axis)

    @property
    def is_main(self) -> bool:
        """The one rank that speaks and writes what is written once."""
        return self.rank == 0

    @property
    def counts_tokens(self) -> bool:
        """Of the ranks that see the same tokens, the one that counts them where something is summed over the world."""
        return self.index("tp") == 0 and self.index("pp") == 0


SINGLE = Topology()
