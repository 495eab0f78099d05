"""Who writes which part of a state: every number once, the work shared out, known to all ranks before a byte is written.

A rank's part of a tensor is a few boxes: one of a DTensor, any number of `Pieces`, all of a plain tensor. The ranks tell each
other theirs once, as JSON; from then on each computes the same plan by itself, as long as nobody's boxes change.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from megatron_scratch.checkpoint.manifest import Chunk, Saved, itemsize
from megatron_scratch.checkpoint.shard import Slot, header
from megatron_scratch.parallel.collectives import all_reduce_world, gather_json
from megatron_scratch.parallel.pieces import Pieces
from megatron_scratch.parallel.topology import Topology

FILE_BYTES = 512 << 20  # a reader has to hash a whole file to use a part of it
State = dict[str, torch.Tensor]
Offset = tuple[int, ...]


def boxes(tensor: torch.Tensor) -> list[tuple[Offset, torch.Tensor]]:
    """(where it begins in the global tensor, live memory) of each box of it that this rank holds."""
    if isinstance(tensor, Pieces):
        return [(tuple(offset), view) for offset, view in tensor.views.items() if view.numel()]
    if isinstance(tensor, DTensor):
        offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[1]
        part = tensor.detach().to_local()
        return [(tuple(offset), part)] if part.numel() else []
    return [((0,) * tensor.ndim, tensor.detach())]


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers as a flat tensor of bytes, where it is."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@dataclass(frozen=True)
class Plan:
    """`files`: what this rank writes, by name. `tensors`: the whole checkpoint. `bytes`: of all ranks' tensors."""

    files: dict[str, list[Slot]]
    tensors: dict[str, Saved]
    bytes: int


class Planner:
    """Plans, and remembers the last one: its making costs a message of all ranks, its use none that grows with the model."""

    def __init__(self, topo: Topology) -> None:
        self.topo = topo
        self.known: dict[str, Any] | None = None
        self.last: Plan | None = None

    def plan(self, state: State) -> Plan:
        """Collective."""
        mine = _listing(state)
        same = all_reduce_world(torch.tensor(int(mine == self.known)), self.topo, "min")
        if self.last is None or not int(same):
            self.last = make_plan(gather_json(mine, self.topo), self.topo.rank)
            self.known = mine
        return self.last


def _listing(state: State) -> dict[str, Any]:
    """Name -> [dtype, global shape, [offset, shape] of each box], as JSON would give it back."""
    return {
        name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape),
               [[list(offset), list(part.shape)] for offset, part in boxes(tensor)]]
        for name, tensor in state.items()
    }  # fmt: skip


def make_plan(listings: list[dict[str, Any]], rank: int) -> Plan:
    """The same on every rank: a box that several hold is written by the one with the least to write so far."""
    holders: dict[Slot, list[int]] = defaultdict(list)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for number, listing in enumerate(listings):
        for name, (dtype, shape, parts) in listing.items():
            assert shapes.setdefault(name, (dtype, tuple(shape))) == (dtype, tuple(shape)), f"{name}: ranks differ"
            for offset, part in parts:
                holders[Slot(name, dtype, tuple(offset), tuple(part))].append(number)
    written: list[list[Slot]] = [[] for _ in listings]
    load = [0] * len(listings)
    for slot in sorted(holders, key=lambda s: (len(holders[s]), -s.bytes, s.key)):
        writer = min(holders[slot], key=lambda r: (load[r], r))
        written[writer].append(slot)
        load[writer] += slot.bytes
    chunks: dict[str, list[Chunk]] = defaultdict(list)
    mine: dict[str, list[Slot]] = {}
    for number, slots in enumerate(written):
        files = _files(number, slots)
        mine = files if number == rank else mine
        for file, inside in files.items():
            for slot, at in zip(inside, header(inside)[1], strict=True):
                chunks[slot.name].append(Chunk(slot.offset, slot.shape, file, at))
    tensors = {name: Saved(dtype, shape, tuple(sorted(chunks[name], key=lambda c: c.offset)))
               for name, (dtype, shape) in sorted(shapes.items())}  # fmt: skip
    for name, saved in tensors.items():
        assert sum(math.prod(c.shape) for c in saved.chunks) == math.prod(saved.shape), f"{name}: held by nobody, or twice"
    return Plan(mine, tensors, sum(load))


def _files(rank: int, slots: list[Slot]) -> dict[str, list[Slot]]:
    """Cut a rank's chunks into files: wide numbers first, so that each is aligned; the same state gives the same files."""
    out: list[list[Slot]] = []
    size = FILE_BYTES
    for slot in sorted(slots, key=lambda s: (-itemsize(s.dtype), s.key)):
        if size + slot.bytes > FILE_BYTES:
            out.append([])
            size = 0
        out[-1].append(slot)
        size += slot.bytes
    return {f"rank_{rank:05d}_{number:03d}.safetensors": inside for number, inside in enumerate(out)}
