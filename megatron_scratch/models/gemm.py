"""Matrix products of the layers. One function, two ways: torch's own, and oneDNN's fp32 kernels where they are twice as fast.

On AMD CPUs with AVX-512 torch sends fp32 products to MKL, which runs its AVX2 kernels there: 190-210 GFLOP/s on two cores (Zen 5)
against 430-455 by oneDNN (benchmarks/cpu_kernels.md), which comes with torch and computes every bf16 product anyway. Which one is
taken depends on the machine alone, never on a timing: a resumed run must take the same one.

Legend: N rows (tokens), I features in, O features out.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megatron_scratch.parallel.deferred import WeightGradients
from megatron_scratch.util.machine import cpu_vendor


@torch.compiler.assume_constant_result
def onednn_is_faster() -> bool:
    """Whether fp32 products of this CPU go to oneDNN."""
    return _onednn_is_faster()


@cache
def _onednn_is_faster() -> bool:
    built = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return built and torch.backends.cpu.get_cpu_capability() == "AVX512" and cpu_vendor() == "AuthenticAMD"


def _wants_onednn(a: torch.Tensor) -> bool:
    return a.device.type == "cpu" and a.dtype == torch.float32 and onednn_is_faster()


def product(a_NI: torch.Tensor, b_OI: torch.Tensor) -> torch.Tensor:
    """a b^T, (N, O), without autograd; either may be a transposed view."""
    empty = a_NI.numel() == 0 or b_OI.numel() == 0  # a tp rank whose vocabulary is all padding; oneDNN refuses it
    return _onednn(a_NI, b_OI) if _wants_onednn(a_NI) and not empty else a_NI @ b_OI.t()


def linear(x_I: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """(..., I) -> (..., O): x weight^T + bias, with gradients."""
    if not _wants_onednn(x_I):
        return F.linear(x_I, weight_OI, bias_O)
    y_NO = _Linear.apply(x_I.reshape(-1, x_I.shape[-1]), weight_OI, bias_O)
    return y_NO.view(*x_I.shape[:-1], -1)  # type: ignore[no-any-return, union-attr]


def deferred_linear(
    x_NI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None, later: WeightGradients
) -> torch.Tensor:
    """`linear`, whose backward leaves the weight gradient for later: the same product of the same numbers."""
    edge = get_gradient_edge(weight_OI)
    return _Deferred.apply(x_NI, weight_OI.detach(), bias_O, later, edge)  # type: ignore[no-any-return]


class _Deferred(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_NI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None, later: WeightGradients,
        edge: GradientEdge,
    ) -> torch.Tensor:  # fmt: skip
        ctx.save_for_backward(x_NI, weight_OI)
        ctx.later, ctx.edge = later, edge
        y_NO = product(x_NI, weight_OI)
        return y_NO if bias_O is None else y_NO + bias_O

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x_NI, weight_OI), dy_NO = ctx.saved_tensors, grads[0]
        ctx.later.put(ctx.edge, lambda: product(dy_NO.t(), x_NI.t()))
        d_x = product(dy_NO, weight_OI.t()) if ctx.needs_input_grad[0] else None
        return d_x, None, dy_NO.sum(0) if ctx.needs_input_grad[2] else None, None, None


@torch.library.custom_op("megatron_scratch::onednn", mutates_args=())
def _onednn(a_NI: torch.Tensor, b_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """a b^T + bias by the op that torch.compile uses for constant weights. Opaque to it here: our weights change."""
    return torch.ops.mkldnn._linear_pointwise(a_NI, b_OI, bias_O, "none", [], "")  # type: ignore[no-any-return]


@_onednn.register_fake
def _(a_NI: torch.Tensor, b_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    return a_NI.new_empty(a_NI.shape[0], b_OI.shape[0])


class _Linear(torch.autograd.Function):
    """dx = dy weight,  dweight = dy^T x,  dbias = sum over rows of dy."""

    @staticmethod
    def forward(ctx: Any, x_NI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x_NI, weight_OI)
        return _onednn(x_NI, weight_OI, bias_O)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x_NI, weight_OI), dy_NO = ctx.saved_tensors, grads[0]
        need_x, need_weight, need_bias = ctx.needs_input_grad
        d_x = _onednn(dy_NO, weight_OI.t()) if need_x else None
        d_weight = _onednn(dy_NO.t(), x_NI.t()) if need_weight else None
        return d_x, d_weight, dy_NO.sum(0) if need_bias else None
