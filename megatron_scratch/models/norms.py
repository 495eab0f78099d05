"""Normalisation over the last dimension, with fp32 statistics whatever the dtype of the activations.

Legend: ... any leading sizes, D normalised features.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from megatron_scratch import registry
from megatron_scratch.config.model import ModelConfig
from megatron_scratch.config.optim import use_apex
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


def rms_norm(x_D: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """(..., D) -> (..., D), in the dtype of x."""
    if x_D.device.type == "cpu" and x_D.dtype != torch.float64:
        return _RMSNormCPU.apply(x_D, weight_D, eps)  # type: ignore[no-any-return]
    return F.rms_norm(x_D, x_D.shape[-1:], weight_D.to(x_D.dtype), eps)


def layer_norm(x_D: torch.Tensor, weight_D: torch.Tensor, bias_D: torch.Tensor | None, eps: float) -> torch.Tensor:
    """(..., D) -> (..., D), in the dtype of x."""
    return F.layer_norm(x_D, x_D.shape[-1:], weight_D.to(x_D.dtype), None if bias_D is None else bias_D.to(x_D.dtype), eps)


# The twins by apex (apex/normalization/fused_layer_norm.py). Weights come in the dtype of x here too: its functions for mixed
# dtypes are for fp32 activations alone; with others the kernels want weights in the activations' dtype (csrc/type_shim.h).
def apex_rms_norm(x_D: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """As `rms_norm`."""
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine  # optional

    return fused_rms_norm_affine(x_D, weight_D.to(x_D.dtype), x_D.shape[-1:], eps)  # type: ignore[no-any-return]


def apex_layer_norm(x_D: torch.Tensor, weight_D: torch.Tensor, bias_D: torch.Tensor | None, eps: float) -> torch.Tensor:
    """As `layer_norm`. apex has no kernel for a weight without a bias: that one gets zeros."""
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine  # optional

    weight_D = weight_D.to(x_D.dtype)
    bias_D = torch.zeros_like(weight_D) if bias_D is None else bias_D.to(x_D.dtype)
    return fused_layer_norm_affine(x_D, weight_D, bias_D, x_D.shape[-1:], eps)  # type: ignore[no-any-return]


def _uses_apex(kernel: str, weight_D: torch.Tensor) -> bool:
    """By the machine's device, not a topology's: a model is also built to be counted, or to be loaded and then moved."""
    return use_apex("model.norm_kernel", kernel, "cuda" if torch.cuda.is_available() else "cpu", str(weight_D.dtype))


def norm_of(cfg: ModelConfig) -> Callable[..., nn.Module]:
    """What makes the norms of a model: (size, eps, bias, topo) -> module. A plugin's need not know of kernels."""
    norm = registry.get("norm", cfg.norm)
    return norm if cfg.norm_kernel == "torch" else partial(norm, kernel=cfg.norm_kernel)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich, arXiv 1910.07467). It has no bias."""

    def __init__(self, size: int, eps: float, bias: bool, topo: Topology, of_heads: bool = False, kernel: str = "torch"):
        """`of_heads`: it normalises heads, of which each tp rank has some; else tokens, of which it has some or all."""
        super().__init__()
        self.eps = eps
        self.weight = shard_param((size,), topo, init=ONES, partial=of_heads or topo.sequence_parallel)
        self.compute = apex_rms_norm if _uses_apex(kernel, self.weight) else rms_norm

    def forward(self, x_D: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D)."""
        return self.compute(x_D, local(self.weight), self.eps)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * weight + bias (Ba et al., arXiv 1607.06450); the bias on request."""

    def __init__(self, size: int, eps: float, bias: bool, topo: Topology, kernel: str = "torch"):
        super().__init__()
        self.eps = eps
        self.weight = shard_param((size,), topo, init=ONES, partial=topo.sequence_parallel)
        self.bias = shard_param((size,), topo, init=ZEROS, partial=topo.sequence_parallel) if bias else None
        self.compute = apex_layer_norm if _uses_apex(kernel, self.weight) else layer_norm

    def forward(self, x_D: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D)."""
        return self.compute(x_D, local(self.weight), None if self.bias is None else local(self.bias), self.eps)
