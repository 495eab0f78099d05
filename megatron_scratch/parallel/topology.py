"""Who am I on each axis of the layout. Passed to whoever needs it; nothing here is global."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

AXES = ("pp", "dp", "cp", "tp")  # outermost first: tp neighbours are neighbours in rank, hence on one node
HYBRID = ("replicate", "shard")  # the two halves of dp under hybrid sharding: copies of the model, and the ranks that share one


@dataclass(frozen=True)
class Topology:
    """Degrees of the layout and this rank's place in it. An axis of size 1 has no group: collectives over it are identity."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")
    degrees: Mapping[str, int] = field(default_factory=dict)  # axis -> size; missing: 1
    mesh: DeviceMesh | None = None
    dp_mesh: DeviceMesh | None = None  # dp as one axis, where `mesh` has its two halves
    sequence_parallel: bool = False  # between tensor-parallel layers each tp rank holds a part of the tokens, not all of them
    overlap: bool = False  # tp messages of the backward pass travel while matrices are multiplied

    @staticmethod
    def build(
        degrees: Mapping[str, int], rank: int, world: int, device: torch.device, sequence_parallel: bool = False,
        overlap: bool = False,
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
        dims = (
            {axis: sizes[axis] for axis in AXES}
            if copies == 1
            else {"pp": sizes["pp"], **halves, "cp": sizes["cp"], "tp": sizes["tp"]}
        )
        mesh = init_device_mesh(device.type, tuple(dims.values()), mesh_dim_names=tuple(dims)) if world > 1 else None
        dp_mesh = mesh[HYBRID]._flatten("dp") if mesh is not None and copies > 1 else None
        tensor = sizes["tp"] > 1
        return Topology(rank, world, device, {**sizes, **halves}, mesh, dp_mesh, sequence_parallel and tensor, overlap and tensor)

    def size(self, axis: str) -> int:
        return self.degrees.get(axis, 1)

    def axis(self, axis: str) -> DeviceMesh | None:
        """The one-dimensional mesh of an axis; None in a world of one."""
        if self.mesh is None:
            return None
        return self.dp_mesh if axis == "dp" and self.dp_mesh is not None else self.mesh[axis]

    def index(self, axis: str) -> int:
        """This rank's coordinate on an axis."""
        mesh = self.axis(axis)
        return 0 if mesh is None else mesh.get_local_rank()

    def group(self, axis: str) -> dist.ProcessGroup | None:
        if self.size(axis) == 1:
            return None
        mesh = self.axis(axis)
        return None if mesh is None else mesh.get_group()

    @property
    def is_main(self) -> bool:
        """The one rank that speaks and writes what is written once."""
        return self.rank == 0

    @property
    def counts_tokens(self) -> bool:
        """Of the ranks that see the same tokens, the one that counts them where something is summed over the world."""
        return self.index("tp") == 0 and self.index("pp") == 0


SINGLE = Topology()
