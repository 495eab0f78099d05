"""PyTorch's FlexAttention (arXiv 2412.05496): a kernel compiled for the mask, which skips blocks that nobody sees.

Legend: B batch, S queries, T keys (the queries are the last S of them), H query heads, G key/value heads, K features of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from megatron_scratch.config.attention import INSTEAD, check_dropout
from megatron_scratch.models.attend import AttendMask, sdpa
from megatron_scratch.models.attend_fused import is_fake, shapes_of_fused
from megatron_scratch.util.errors import UserError


def flex(
    q_BSHK: torch.Tensor, k_BTGK: torch.Tensor, v_BTGK: torch.Tensor, mask: AttendMask, dropout_p: float = 0.0
) -> torch.Tensor:
    """Memory linear in T, windows and documents included. Compiled at the first call (7 s on a CPU), and again for other lengths;
    so one query (decoding), whose keys grow from call to call, is left to `sdpa`.

    Raises:
        UserError: dropout; a gradient on a CPU, for which PyTorch has none.
    """
    check_dropout("flex", dropout_p)
    if is_fake(q_BSHK):
        return shapes_of_fused(q_BSHK, k_BTGK, v_BTGK)
    if q_BSHK.device.type == "cpu" and torch.is_grad_enabled() and any(x.requires_grad for x in (q_BSHK, k_BTGK, v_BTGK)):
        raise UserError(f"model.attention=flex has no backward on a CPU; {INSTEAD}")
    if mask.queries == 1:
        return sdpa(q_BSHK, k_BTGK, v_BTGK, mask)
    q, k, v = (x.transpose(1, 2) for x in (q_BSHK, k_BTGK, v_BTGK))
    out_BHSK = _kernel()(q, k, v, block_mask=_block_mask(mask, q.device), enable_gqa=q.shape[1] != k.shape[1])
    return out_BHSK.transpose(1, 2)  # type: ignore[no-any-return]


def _kernel() -> Callable[..., Any]:
    """Compiled by itself, unless it is being compiled as a part of its layer."""
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention if torch.compiler.is_compiling() else _compiled()[0]


@cache
def _compiled() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return torch.compile(flex_attention), torch.compile(create_block_mask)


@torch.compiler.disable  # in a compiled layer it would be traced into the layer, and built once per layer
def _block_mask(mask: AttendMask, device: torch.device) -> Any:
    return mask.once("flex", lambda: _make(mask, device))


def _make(mask: AttendMask, device: torch.device) -> Any:
    """The blocks of 128 x 128 that somebody sees, and the rule inside of them."""
    from torch.nn.attention.flex_attention import create_block_mask

    before, window, documents_BT = mask.keys - mask.queries, mask.window, mask.documents_BT

    def seen(b: torch.Tensor, h: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        at = query + before
        allowed = key <= at
        if window is not None:
            allowed = allowed & (key > at - window)
        if documents_BT is not None:
            allowed = allowed & (documents_BT[b, at] == documents_BT[b, key])
        return allowed

    # Not compiled it writes out all S x T bits, in several copies; on a CPU that is cheaper than compiling.
    make = create_block_mask if device.type == "cpu" else _compiled()[1]
    batch = None if documents_BT is None else documents_BT.shape[0]
    return make(seen, batch, None, mask.queries, mask.keys, device=device)
