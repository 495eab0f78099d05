"""What fused kernels have in common: the shapes and the memory of one, for a dry run that computes nothing.

Legend: B batch, S queries, T keys, H query heads, G key/value heads, K features of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor


def is_fake(x: torch.Tensor) -> bool:
    """Whether a tensor has a shape and no values."""
    return x.device.type == "meta" or isinstance(x, FakeTensor)


class _Shapes(torch.autograd.Function):
    """Keeps for backward what every fused kernel keeps: q, k, v, the output, and an fp32 number per query and head."""

    @staticmethod
    def forward(ctx: Any, q_BSHK: torch.Tensor, k_BTGK: torch.Tensor, v_BTGK: torch.Tensor) -> torch.Tensor:
        out_BSHK = torch.empty(q_BSHK.shape, dtype=q_BSHK.dtype, device=q_BSHK.device)
        ctx.save_for_backward(q_BSHK, k_BTGK, v_BTGK, out_BSHK, torch.empty_like(q_BSHK[..., 0], dtype=torch.float32))
        return out_BSHK

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q_BSHK, k_BTGK, v_BTGK, _, _ = ctx.saved_tensors
        return torch.empty_like(q_BSHK), torch.empty_like(k_BTGK), torch.empty_like(v_BTGK)


def shapes_of_fused(q_BSHK: torch.Tensor, k_BTGK: torch.Tensor, v_BTGK: torch.Tensor) -> torch.Tensor:
    """The output of any fused kernel, (B, S, H, K), without its values; backward gives gradients likewise."""
    return _Shapes.apply(q_BSHK, k_BTGK, v_BTGK)  # type: ignore[no-any-return]
