"""The messages of tensor parallelism (Shoeybi et al., arXiv 1909.08053) and of sequence parallelism (Korthikanti et al.,
arXiv 2205.05198), as pairs that are each other's derivative.

A tensor-parallel region is a part of the network in which every tp rank sees all tokens and some of the features. `enter` leads
into one, `leave` out of it. Outside, each rank sees all tokens and computes the same (plain), or its own part of the tokens
(sequence parallel):

                 outside        enter: forward / backward          leave: forward / backward
    plain        x_ND on all    nothing / all-reduce               all-reduce / nothing
    sequence p.  x_nD, a part   all-gather / reduce-scatter        reduce-scatter / all-gather

An all-reduce is a reduce-scatter and an all-gather: both move the same bytes, but sequence parallelism keeps 1/tp of the
activations between the layers. Over tp = 1 all of these are the identity.

Legend: N tokens (batch x sequence, flat), n = N / tp tokens of this rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_scratch.parallel.collectives import all_gather_rows, reduce_scatter_rows
from megatron_scratch.parallel.topology import Topology


def enter(x: torch.Tensor, topo: Topology) -> torch.Tensor:
    """Into a tensor-parallel region: (n or N, ...) outside -> (N, ...), the same on every tp rank."""
    if topo.size("tp") == 1:
        return x
    return _send(_Gather if topo.sequence_parallel else _Copy, x, topo)


def leave(x: torch.Tensor, topo: Topology) -> torch.Tensor:
    """Out of a tensor-parallel region: (N, ...), each rank's a part of the sum over tp -> (n or N, ...)."""
    if topo.size("tp") == 1:
        return x
    return _send(_Scatter if topo.sequence_parallel else _Reduce, x, topo)


@torch.compiler.disable  # compiled code ends where a message begins, and goes on after it
def _send(function: type[torch.autograd.Function], x: torch.Tensor, topo: Topology) -> torch.Tensor:
    return function.apply(x, topo.group("tp"))  # type: ignore[no-any-return]


def token_part(tokens: int, topo: Topology) -> slice:
    """Which of `tokens` flat tokens this rank holds outside of the tensor-parallel regions."""
    if not topo.sequence_parallel:
        return slice(0, tokens)
    n = tokens // topo.size("tp")
    return slice(topo.index("tp") * n, (topo.index("tp") + 1) * n)


def gather(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    out = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
    all_gather_rows(out, x.contiguous(), group=group)
    return out


def _scatter(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    assert x.shape[0] % group.size() == 0, f"{x.shape[0]} tokens over tp={group.size()}"
    out = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    reduce_scatter_rows(out, x.contiguous(), group=group)
    return out


def _reduce(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x


class _Copy(torch.autograd.Function):
    """Megatron's f: y = x; dx = sum over ranks of dy, each rank's dy being the part that its features account for."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _reduce(grads[0], ctx.group), None


class _Reduce(torch.autograd.Function):
    """Megatron's g: y = sum over ranks of x; dx = dy, which is the same on every rank."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        return _reduce(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None


class _Gather(torch.autograd.Function):
    """y = the ranks' tokens, one after the other; dx = this rank's tokens of the sum over ranks of dy."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return gather(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _scatter(grads[0], ctx.group), None


class _Scatter(torch.autograd.Function):
    """y = this rank's tokens of the sum over ranks of x; dx = the ranks' dy, one after the other."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _scatter(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gather(grads[0], ctx.group), None
