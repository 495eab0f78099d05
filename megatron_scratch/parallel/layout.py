"""The parameter contract: a parameter is a plain `Shard(dim)` of one global tensor, and its values do not depend on the layout.

Model code asks for a parameter by its global shape and gets an `nn.Parameter` on the meta device. Where the axis has more
than one rank it is a DTensor, whose only job is to carry the layout: the forward computes on `local(parameter)` and the
layer's own collectives. `materialize` gives memory and values: each block of `INIT_ROWS` rows of the global tensor is drawn
from its own generator, seeded by (seed, name, block), so that any rank fills any slice alone and alike.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from megatron_scratch.parallel.topology import Topology

INIT_ROWS = 64  # rows that share a generator: small enough that a shard draws little it does not keep


@dataclass(frozen=True)
class Init:
    """How a parameter starts: normal(0, std), or a constant."""

    std: float = 0.0
    constant: float = 0.0


ZEROS, ONES = Init(), Init(constant=1.0)


def normal(std: float) -> Init:
    return Init(std=std)


def shard_param(shape: tuple[int, ...], topo: Topology, axis: str | None = None, dim: int = 0, init: Init = ZEROS) -> nn.Parameter:
    """A parameter of global `shape` on the meta device, cut along `dim` over mesh `axis` (None: whole on every rank).

    Raises:
        AssertionError: `shape[dim]` is not divisible by the axis (configs are checked before).
    """
    n = topo.size(axis) if axis else 1
    assert shape[dim] % n == 0, f"dim {dim} of {shape} over {axis}={n}"
    local_shape = [s // n if d == dim else s for d, s in enumerate(shape)]
    data: torch.Tensor = torch.empty(local_shape, device="meta", dtype=torch.float32)
    if n > 1 and topo.mesh is not None:
        data = DTensor.from_local(data, topo.mesh[axis], [Shard(dim)], run_check=False)
    elif topo.size("tp") > 1 and topo.mesh is not None:  # whole on every tp rank, and says so
        data = DTensor.from_local(data, topo.mesh["tp"], [Replicate()], run_check=False)
    parameter = nn.Parameter(data)
    parameter.init = init  # type: ignore[attr-defined]
    return parameter


def local(parameter: torch.Tensor, partial: bool = False) -> torch.Tensor:
    """This rank's slice, to compute with. `partial`: a replicated parameter read inside a sequence-parallel region, where
    each rank sees only its tokens, so that its gradient is a partial sum that the layout adds up."""
    if isinstance(parameter, DTensor):
        return parameter.to_local(grad_placements=[Partial()] if partial else None)
    return parameter


def _seed(seed: int, name: str, block: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{name}/{block}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & (2**63 - 1)


def init_rows(name: str, shape: tuple[int, ...], init: Init, seed: int, rows: range) -> torch.Tensor:
    """Rows `rows` (along dim 0) of the global parameter's initial value, fp32 on the CPU; the same whoever asks."""
    if init.std == 0.0:
        return torch.full((len(rows), *shape[1:]), init.constant)
    pieces = []
    for block in range(rows.start // INIT_ROWS, -(-rows.stop // INIT_ROWS)):
        first = block * INIT_ROWS
        height = min(INIT_ROWS, shape[0] - first)
        generator = torch.Generator().manual_seed(_seed(seed, name, block))
        piece = torch.empty((height, *shape[1:])).normal_(0.0, init.std, generator=generator)
        pieces.append(piece[max(rows.start - first, 0) : rows.stop - first])
    return torch.cat(pieces)


def global_slice(tensor: torch.Tensor) -> tuple[slice, ...]:
    """Which part of the global tensor this rank holds (all of it, for a plain tensor)."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, s) for s in tensor.shape)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))


@torch.no_grad()
def materialize(model: nn.Module, seed: int, device: torch.device) -> None:
    """Give a meta-device model memory on `device` and its initial values. Buffers are filled by `reset_buffers` of their owner."""
    inits = {name: parameter.init for name, parameter in model.named_parameters()}  # to_empty makes new parameters
    model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        part = global_slice(parameter)
        rows = range(part[0].start, part[0].stop)
        value = init_rows(name, tuple(parameter.shape), inits[name], seed, rows)
        local_value = value[(slice(None), *part[1:])] if len(part) > 1 else value
        target = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        target.copy_(local_value)
    for module in model.modules():
        if hasattr(module, "reset_buffers"):
            module.reset_buffers()
