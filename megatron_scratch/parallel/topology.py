"""Who am I on each axis of the layout. Passed to whoever needs it; nothing here is global."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

AXES = ("pp", "dp", "cp", "tp")  # outermost first: tp neighbours are neighbours in rank, hence on one node


@dataclass(frozen=True)
class Topology:
    """Degrees of the layout and this rank's place in it. An axis of size 1 has no group: collectives over it are identity."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")
    degrees: Mapping[str, int] = field(default_factory=dict)  # axis -> size; missing: 1
    mesh: DeviceMesh | None = None

    @staticmethod
    def build(degrees: Mapping[str, int], rank: int, world: int, device: torch.device) -> Topology:
        """Make the mesh; with more than one rank the default process group must exist.

        Args:
            degrees: sizes of pp, cp, tp; dp is what is left of `world`.
        """
        sizes = {axis: degrees.get(axis, 1) for axis in AXES}
        sizes["dp"] = world // math.prod(sizes[a] for a in AXES if a != "dp")
        assert math.prod(sizes.values()) == world, (sizes, world)
        mesh = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=AXES) if world > 1 else None
        return Topology(rank, world, device, sizes, mesh)

    def size(self, axis: str) -> int:
        return self.degrees.get(axis, 1)

    def index(self, axis: str) -> int:
        """This rank's coordinate on an axis."""
        return self.mesh.get_local_rank(axis) if self.mesh is not None else 0

    def group(self, axis: str) -> dist.ProcessGroup | None:
        return self.mesh.get_group(axis) if self.size(axis) > 1 and self.mesh is not None else None

    @property
    def is_main(self) -> bool:
        """The one rank that speaks and writes what is written once."""
        return self.rank == 0


SINGLE = Topology()
