"""Normalisation over the last dimension, with fp32 statistics whatever the dtype of the activations.

Legend: ... any leading sizes, D normalised features.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from megatron_scratch.models.linear import cast
from megatron_scratch.parallel.layout import ONES, ZEROS, local, shard_param
from megatron_scratch.parallel.topology import Topology


class _RMSNormCPU(torch.autograd.Function):
    """RMSNorm whose backward is written out.

    With xh = x / rms(x) and g = dy * w:  dx = (g - xh mean(g xh)) / rms(x),  dw = sum over tokens of dy xh.
    On a CPU torch differentiates `F.rms_norm` op by op: 2.1 (fp32) and 2.5 (bf16) ms on two cores, forward + backward of
    4096 x 384, against 1.5 and 1.8 here (benchmarks/cpu_kernels.md); a 6-layer model has 13 of them. On GPUs torch's is fused.
    """

    @staticmethod
    def forward(ctx: Any, x_D: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
        norm = torch.linalg.vector_norm(x_D, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.rsqrt(norm.square() / x_D.shape[-1] + eps)  # 1 / rms, (..., 1)
        ctx.save_for_backward(x_D, weight_D, scale)
        return (x_D * scale).mul_(weight_D).to(x_D.dtype)  # bf16 times fp32 is fp32

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x_D, weight_D, scale = ctx.saved_tensors
        xh = x_D.to(torch.float32, copy=True).mul_(scale)  # in place where it can be: fresh memory costs more than the arithmetic
        dy = grads[0].to(torch.float32, copy=True)
        product = dy * xh
        d_weight = product.flatten(0, -2).sum(0)
        mean = product.mul_(weight_D).mean(-1, keepdim=True)
        d_x = dy.mul_(weight_D).addcmul_(xh, mean, value=-1.0).mul_(scale)
        return d_x.to(x_D.dtype), d_weight, None


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich, arXiv 1910.07467). It has no bias."""

    def __init__(self, size: int, eps: float, bias: bool, topo: Topology, of_heads: bool = False):
        """`of_heads`: it normalises heads, of which each tp rank has some; else tokens, of which it has some or all."""
        super().__init__()
        self.eps = eps
        self.weight = shard_param((size,), topo, init=ONES, partial=of_heads or topo.sequence_parallel)

    def forward(self, x_D: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D)."""
        if x_D.device.type == "cpu" and x_D.dtype != torch.float64:
            return _RMSNormCPU.apply(x_D, local(self.weight), self.eps)  # type: ignore[no-any-return]
        return F.rms_norm(x_D, x_D.shape[-1:], cast(self.weight, x_D.dtype), self.eps)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * weight + bias (Ba et al., arXiv 1607.06450); the bias on request."""

    def __init__(self, size: int, eps: float, bias: bool, topo: Topology):
        super().__init__()
        self.eps = eps
        self.weight = shard_param((size,), topo, init=ONES, partial=topo.sequence_parallel)
        self.bias = shard_param((size,), topo, init=ZEROS, partial=topo.sequence_parallel) if bias else None

    def forward(self, x_D: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D)."""
        bias = None if self.bias is None else cast(self.bias, x_D.dtype)
        return F.layer_norm(x_D, x_D.shape[-1:], cast(self.weight, x_D.dtype), bias, self.eps)
