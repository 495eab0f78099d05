"""Linears at the entrance of a tensor-parallel region, with the messages of backward hidden behind its matrix products.

Legend: N tokens, n = N / tp tokens of this rank, I features in, O features out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_scratch.models.gemm import linear, product
from megatron_scratch.parallel.collectives import all_gather_rows, reduce_scatter_rows
from megatron_scratch.parallel.tensor import gather
from megatron_scratch.parallel.topology import Topology


@torch.compiler.disable
def overlapped_linears(
    x_nI: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None], topo: Topology
) -> tuple[torch.Tensor, ...]:
    """`enter(x)` times each weight (O, I), plus its bias: (N, O) each.

    The same products of the same numbers as `enter` and plain linears, in the same order, so the same bits. Under sequence
    parallelism only this rank's tokens are kept for backward, which gathers them again: one all-gather more, tp times less memory,
    as in Megatron-LM.
    """
    return _Overlapped.apply(x_nI, topo, len(weights), *weights, *biases)  # type: ignore[no-any-return]


class _Overlapped(torch.autograd.Function):
    """dx = sum over weights and ranks of dy W, which travels while dW = dy^T x are computed; x travels while dy W is."""

    @staticmethod
    def forward(
        ctx: Any, x_nI: torch.Tensor, topo: Topology, count: int, *parameters: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        weights, biases, group = parameters[:count], parameters[count:], topo.group("tp")
        assert group is not None
        ctx.group, ctx.sequence, ctx.count = group, topo.sequence_parallel, count
        ctx.save_for_backward(x_nI, *weights)
        x_NI = gather(x_nI, group) if ctx.sequence else x_nI
        return tuple(linear(x_NI, weight, bias) for weight, bias in zip(weights, biases, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x_nI, *weights), group = ctx.saved_tensors, ctx.group
        x_NI, gathering = x_nI, None
        if ctx.sequence:
            x_NI = x_nI.new_empty(x_nI.shape[0] * group.size(), x_nI.shape[1])
            gathering = all_gather_rows(x_NI, x_nI.contiguous(), group=group, async_op=True)
        parts = [product(dy, weight.t()) for dy, weight in zip(grads, weights, strict=True)]
        d_NI = parts.pop()
        for part in reversed(parts):  # autograd adds them up in this order
            d_NI += part
        if ctx.sequence:
            d_nI = torch.empty_like(x_nI, memory_format=torch.contiguous_format)
            reducing = reduce_scatter_rows(d_nI, d_NI, group=group, async_op=True)
        else:
            d_nI = d_NI
            reducing = dist.all_reduce(d_nI, group=group, async_op=True)
        if gathering is not None:
            gathering.wait()
        need = ctx.needs_input_grad[3:]
        d_weights = [product(dy.t(), x_NI.t()) if n else None for dy, n in zip(grads, need[: ctx.count], strict=True)]
        d_biases = [dy.sum(0) if n else None for dy, n in zip(grads, need[ctx.count :], strict=True)]
        reducing.wait()
        return d_nI, None, None, *d_weights, *d_biases
