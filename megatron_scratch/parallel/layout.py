"""The parameter contract: a parameter is a plain `Shard(dim)` of one global tensor, and its values do not depend on the layout.

Model code asks for a parameter by its global shape and gets an `nn.Parameter` on the meta device, which carries its `Layout`.
Where tp has more than one rank it is a DTensor, whose only job is to carry the layout to those who shard further and save:
the forward computes on `local(parameter)` and the layer's own collectives. `materialize` gives memory and values: each block
of `INIT_ROWS` rows of the global tensor is drawn from its own generator, seeded by (seed, name, block), so that any rank
fills any slice alone and alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from megatron_scratch.parallel.pieces import Pieces
from megatron_scratch.parallel.topology import Topology
from megatron_scratch.util.seeds import seed_from

INIT_ROWS = 64  # rows that share a generator: small enough that a shard draws little it does not keep


@dataclass(frozen=True)
class Init:
    """How a parameter starts: normal(0, std), or a constant."""

    std: float = 0.0
    constant: float = 0.0


ZEROS, ONES = Init(), Init(constant=1.0)


def normal(std: float) -> Init:
    return Init(std=std)


@dataclass(frozen=True)
class Layout:
    """Where one parameter lies over tp, before any engine shards it over dp, and how it starts."""

    shape: tuple[int, ...]  # of the global tensor
    mesh: DeviceMesh | None  # the tp axis; None where it has one rank
    placements: tuple[Placement, ...]
    init: Init
    # Each tp rank's gradient is only a part of the sum (a norm that saw some of the tokens, a head norm that saw some of the
    # heads). The engine adds the parts up, in one message for all such parameters: `collectives.sum_over`.
    partial: bool = False

    def wrap(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's local tensor of the parameter's shape as a part of the global one."""
        if self.mesh is None:
            return tensor
        return DTensor.from_local(tensor, self.mesh, self.placements, run_check=False)

    def offset(self) -> tuple[int, ...]:
        """Where this rank's part begins in the global tensor."""
        if self.mesh is None:
            return (0,) * len(self.shape)
        return tuple(compute_local_shape_and_global_offset(self.shape, self.mesh, self.placements)[1])


def shard_param(
    shape: tuple[int, ...], topo: Topology, axis: str | None = None, dim: int = 0, init: Init = ZEROS, partial: bool = False
) -> nn.Parameter:
    """A parameter of global `shape` on the meta device, cut along `dim` over mesh `axis` (None: whole on every rank).

    Args:
        partial: with axis None and tp > 1, whether a tp rank's gradient is a part of the sum over tp (see `Layout`).

    Raises:
        AssertionError: `shape[dim]` is not divisible by the axis (configs are checked before).
    """
    n = topo.size(axis) if axis else 1
    assert axis in (None, "tp") and shape[dim] % n == 0, f"dim {dim} of {shape} over {axis}={n}"
    assert not (axis and partial), "a part of a cut parameter has its whole gradient"
    mesh = topo.axes["tp"] if topo.size("tp") > 1 else None
    placements = () if mesh is None else (Shard(dim),) if n > 1 else (Replicate(),)
    layout = Layout(tuple(shape), mesh, placements, init, partial and mesh is not None)
    local_shape = [s // n if d == dim else s for d, s in enumerate(shape)]
    parameter = nn.Parameter(layout.wrap(torch.empty(local_shape, device="meta")))
    parameter.tp_layout = layout  # type: ignore[attr-defined]
    return parameter


def local(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's slice, to compute with."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


@dataclass
class Copy:
    """A parameter's copy in the dtype to compute in, for all microbatches of a step: what in `in_dtype` is `parameter.kept`."""

    key: tuple[int, torch.dtype, bool] | None = None
    tensor: torch.Tensor | None = None


def in_dtype(parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """This rank's slice in the dtype to compute in; its gradient comes back in the parameter's own.

    Backward needs what forward multiplied with. In a pipeline a stage has several microbatches between the two, each with a copy of
    the weights of its own, 2 bytes a parameter in bf16, if nobody keeps one for all: see `keep_copies`.
    """
    plain, kept = local(parameter), getattr(parameter, "kept", None)
    if plain.dtype == dtype or kept is None or torch.compiler.is_compiling():
        return plain.to(dtype)
    key = (parameter._version, dtype, torch.is_grad_enabled())
    if kept.key != key:
        kept.key, kept.tensor = key, plain.to(dtype)
    return kept.tensor  # type: ignore[no-any-return]


def keep_copies(parameters: Iterable[torch.Tensor]) -> None:
    """Let `in_dtype` keep a copy of each until this is called again: when weights have changed in a way that their version does not
    show."""
    for parameter in parameters:
        parameter.kept = Copy()  # type: ignore[attr-defined]


def layouts(model: nn.Module) -> dict[str, Layout]:
    """Name -> layout. To be read before an engine or `materialize` makes new parameter objects."""
    return {name: parameter.tp_layout for name, parameter in model.named_parameters()}


def localize(model: nn.Module) -> dict[str, Layout]:
    """Make every DTensor parameter a plain local one, for engines that cannot take DTensors; returns the layouts."""
    table = layouts(model)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            plain = nn.Parameter(local(parameter.data))
            plain.tp_layout = parameter.tp_layout
            setattr(module, name, plain)
    return table


def init_rows(name: str, shape: tuple[int, ...], init: Init, seed: int, rows: range) -> torch.Tensor:
    """Rows `rows` (along dim 0) of the global parameter's initial value, fp32 on the CPU; the same whoever asks."""
    if init.std == 0.0:
        return torch.full((len(rows), *shape[1:]), init.constant, dtype=torch.float32)
    pieces = [torch.empty(0, *shape[1:], dtype=torch.float32)]
    for block in range(rows.start // INIT_ROWS, -(-rows.stop // INIT_ROWS)):
        first = block * INIT_ROWS
        height = min(INIT_ROWS, shape[0] - first)
        generator = torch.Generator().manual_seed(seed_from(seed, name, block))
        piece = torch.empty((height, *shape[1:]), dtype=torch.float32).normal_(0.0, init.std, generator=generator)
        pieces.append(piece[max(rows.start - first, 0) : rows.stop - first])
    return torch.cat(pieces)


def global_slice(tensor: torch.Tensor, layout: Layout) -> tuple[slice, ...]:
    """Which part of the global tensor this rank holds: a DTensor knows, a plain tensor lies as its layout says."""
    if isinstance(tensor, DTensor):
        shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    else:
        shape, offset = tensor.shape, layout.offset()
    return tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))


@torch.no_grad()
def materialize(model: nn.Module, seed: int, device: torch.device, table: Mapping[str, Layout] | None = None) -> None:
    """Give a meta-device model memory on `device` and its initial values. Buffers are filled by `reset_buffers` of their owner.

    `table`: the layouts, where an engine has made new parameters since the model was built.
    """
    table = layouts(model) if table is None else table
    model.to_empty(device=device)  # makes new parameters
    for name, parameter in model.named_parameters():
        part = global_slice(parameter, table[name])
        value = init_rows(name, table[name].shape, table[name].init, seed, range(part[0].start, part[0].stop))
        local(parameter).copy_(value[(slice(None), *part[1:])] if len(part) > 1 else value)
    for module in model.modules():
        if hasattr(module, "reset_buffers"):
            module.reset_buffers()


def full(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in full on every rank; collective."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    return tensor.full() if isinstance(tensor, Pieces) else tensor
