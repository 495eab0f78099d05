"""Attention as batched matrix products over blocks of queries: the fast one on CPUs in bf16 (figures at `attend.auto`).

Legend: B batch, S queries, T keys (the queries are the last S of them), H query heads, G key/value heads, R = H/G, K features
of a head, N = B x G.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from megatron_scratch.config.attention import check_dropout

if TYPE_CHECKING:
    from megatron_scratch.models.attend import AttendMask

BLOCK = 128  # queries per block: keys after a block are never computed, 25 % less work at S = 256, 44 % at 1024


class _Matmul(torch.autograd.Function):
    """Attention as batched matrix products over blocks of queries, with the backward written out.

    With q' = q / sqrt(K), P = softmax(q' k^T) is kept, in the dtype of q; its row statistics are fp32 (torch's softmax). Then
        dv = P^T do,   dP = do v^T,   dS = P (dP - sum(dP P)),   dq = dS k / sqrt(K),   dk = dS^T q'.
    The R query heads of a group are rows of one product, so keys and values are never repeated.
    """

    @staticmethod
    def forward(ctx: Any, q_BSHK: torch.Tensor, k_BTGK: torch.Tensor, v_BTGK: torch.Tensor, mask: AttendMask) -> torch.Tensor:
        groups, scale = k_BTGK.shape[2], 1.0 / math.sqrt(q_BSHK.shape[-1])
        k_NTK, v_NTK = _fold(k_BTGK, groups), _fold(v_BTGK, groups)
        out_BSHK = torch.empty(q_BSHK.shape, dtype=q_BSHK.dtype, device=q_BSHK.device)
        saved = []
        for rows, seen in _blocks(mask):
            q = _fold(q_BSHK[:, rows] * scale, groups)
            p = _probabilities(torch.bmm(q, k_NTK[:, :seen].transpose(1, 2)), mask, rows, groups)
            _unfold(torch.bmm(p, v_NTK[:, :seen]), out_BSHK[:, rows], groups)
            saved += [q, p]
        ctx.save_for_backward(k_NTK, v_NTK, *saved)
        ctx.mask, ctx.groups, ctx.scale = mask, groups, scale
        return out_BSHK

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        k_NTK, v_NTK, *saved = ctx.saved_tensors
        blocks, groups, d_out = _blocks(ctx.mask), ctx.groups, grads[0]
        d_q = torch.empty_like(d_out, memory_format=torch.contiguous_format)
        d_k, d_v = torch.zeros_like(k_NTK, dtype=torch.float32), torch.zeros_like(v_NTK, dtype=torch.float32)
        for (rows, seen), q, p in zip(blocks, saved[::2], saved[1::2], strict=True):
            d_o = _fold(d_out[:, rows], groups)
            d_v[:, :seen] += torch.bmm(p.transpose(1, 2), d_o)
            d_p = torch.bmm(d_o, v_NTK[:, :seen].transpose(1, 2))
            d_s = torch._softmax_backward_data(d_p, p, -1, p.dtype)
            _unfold(torch.bmm(d_s, k_NTK[:, :seen]).mul_(ctx.scale), d_q[:, rows], groups)
            d_k[:, :seen] += torch.bmm(d_s.transpose(1, 2), q)
        batch, keys, size = d_out.shape[0], k_NTK.shape[1], k_NTK.shape[2]
        d_k, d_v = (d.view(batch, groups, keys, size).transpose(1, 2).to(d_out.dtype) for d in (d_k, d_v))
        return d_q, d_k, d_v, None


def _blocks(mask: AttendMask) -> list[tuple[slice, int]]:
    """Slices of queries, each with the number of keys up to its last query."""
    before = mask.keys - mask.queries
    stops = [min(i + BLOCK, mask.queries) for i in range(0, mask.queries, BLOCK)]
    return [(slice(stop - 1 - (stop - 1) % BLOCK, stop), before + stop) for stop in stops]


def _fold(x_BSHK: torch.Tensor, groups: int) -> torch.Tensor:
    """(B, S, G R, K) -> (B G, R S, K), contiguous: what a batched product wants."""
    batch, seq, heads, size = x_BSHK.shape
    return x_BSHK.reshape(batch, seq, groups, heads // groups, size).permute(0, 2, 3, 1, 4).reshape(batch * groups, -1, size)


def _unfold(x: torch.Tensor, into_BSHK: torch.Tensor, groups: int) -> None:
    """The inverse of `_fold`, written into a slice."""
    batch, seq, heads, size = into_BSHK.shape
    x = x.view(batch, groups, heads // groups, seq, size).permute(0, 3, 1, 2, 4)
    into_BSHK.unflatten(2, (groups, -1)).copy_(x)


def _probabilities(scores: torch.Tensor, mask: AttendMask, rows: slice, groups: int) -> torch.Tensor:
    """Mask and softmax, both in place, of a block of scores (B G, R s, t). Adding -inf to what is masked takes a quarter of
    `masked_fill_`'s time on a CPU, and under a plain causal mask only the last s columns of a block need it."""
    height, seen = rows.stop - rows.start, scores.shape[-1]
    if mask.allowed_BST is None:
        part = scores.view(scores.shape[0], -1, height, seen)[..., seen - height :]
        part += torch.full((height, height), -math.inf, dtype=scores.dtype, device=scores.device).triu_(1)
    else:
        allowed = mask.allowed_BST[:, None, None, rows, :seen]
        part = scores.view(-1, groups, scores.shape[1] // height, height, seen)
        part += torch.zeros(allowed.shape, dtype=scores.dtype, device=scores.device).masked_fill_(~allowed, -math.inf)
    return torch.softmax(scores, -1, out=scores)


def matmul(
    q_BSHK: torch.Tensor, k_BTGK: torch.Tensor, v_BTGK: torch.Tensor, mask: AttendMask, dropout_p: float = 0.0
) -> torch.Tensor:
    """Batched matrix products; keeps about H S T / 2 probabilities per sequence and layer, so it is for short sequences.

    Raises:
        UserError: dropout, which would need the probabilities twice, before it and after.
    """
    check_dropout("matmul", dropout_p)
    return _Matmul.apply(q_BSHK, k_BTGK, v_BTGK, mask)  # type: ignore[no-any-return]
