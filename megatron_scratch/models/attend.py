"""softmax(q k^T / sqrt(K)) v under a mask: one function type, several ways to compute it.

    (q_BSHK, k_BTGK, v_BTGK, mask, dropout_p) -> out_BSHK

`reference` is the yardstick: written as on a blackboard, fp32 inside. Every other backend is tested against it, forward and
backward. A new one is one function and one registry entry of kind `attention`.

Legend: B batch, S queries, T keys (the queries are the last S of them), H query heads, G key/value heads, R = H/G, K features
of a head, N = B x G.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from megatron_scratch.util.errors import UserError

BLOCK = 128  # queries per block in `matmul`: keys after a block are never computed, 25 % less work at S = 256, 44 % at 1024
MATMUL_KEYS = {torch.bfloat16: 2048}  # `auto` on a CPU: keys up to which `matmul` beats `sdpa` by far, figures there


@dataclass(frozen=True)
class AttendMask:
    """Who sees whom. Keys after a query are never seen; `window` and `documents` take away more.

    `allowed_BST` (B or 1, S, T) bool says it in full; it is None where plain causality says it all, so that a backend
    can take its fast path. Kernels with their own masks read the other fields.
    """

    queries: int
    keys: int
    window: int | None = None
    documents_BT: torch.Tensor | None = None
    allowed_BST: torch.Tensor | None = None

    @property
    def causal(self) -> bool:
        """Square and lower triangular, nothing else."""
        return self.allowed_BST is None and self.queries == self.keys


def make_mask(queries: int, keys: int, window: int | None, documents_BT: torch.Tensor | None, device: torch.device) -> AttendMask:
    """The mask of the last `queries` of `keys` tokens. Built once per forward, not once per layer.

    Args:
        window: a token sees itself and the window - 1 tokens before it; None: all before it.
        documents_BT: a number per token; a token sees only tokens with its own number.
    """
    window = window if window is not None and window < keys else None
    if window is None and documents_BT is None and queries in (1, keys):
        return AttendMask(queries, keys)
    q_S1 = torch.arange(keys - queries, keys, device=device).unsqueeze(1)
    k_T = torch.arange(keys, device=device)
    allowed = (k_T <= q_S1).unsqueeze(0)
    if window is not None:
        allowed = allowed & (k_T > q_S1 - window)
    if documents_BT is not None:
        allowed = allowed & (documents_BT[:, -queries:, None] == documents_BT[:, None, :])
    return AttendMask(queries, keys, window, documents_BT, allowed)


def reference(
    q_BSHK: torch.Tensor, k_BTGK: torch.Tensor, v_BTGK: torch.Tensor, mask: AttendMask, dropout_p: float = 0.0
) -> torch.Tensor:
    """The definition. Memory B x H x S x T in fp32."""
    ratio = q_BSHK.shape[2] // k_BTGK.shape[2]
    q, k, v = q_BSHK.float(), k_BTGK.float().repeat_interleave(ratio, 2), v_BTGK.float().repeat_interleave(ratio, 2)
    scores_BHST = torch.einsum("bshk,bthk->bhst", q, k) / math.sqrt(q.shape[-1])
    allowed_BST = mask.allowed_BST
    if allowed_BST is None:
        allowed_BST = torch.ones(1, mask.queries, mask.keys, dtype=torch.bool, device=q.device).tril(mask.keys - mask.queries)
    scores_BHST = scores_BHST.masked_fill(~allowed_BST.unsqueeze(1), -math.inf)
    probs_BHST = F.dropout(torch.softmax(scores_BHST, dim=-1), dropout_p)
    return torch.einsum("bhst,bthk->bshk", probs_BHST, v).to(q_BSHK.dtype)


def sdpa(
    q_BSHK: torch.Tensor, k_BTGK: torch.Tensor, v_BTGK: torch.Tensor, mask: AttendMask, dropout_p: float = 0.0
) -> torch.Tensor:
    """torch's fused attention: flash or memory-efficient kernels, memory linear in T where the mask is plain causal."""
    q, k, v = (x.transpose(1, 2) for x in (q_BSHK, k_BTGK, v_BTGK))
    allowed = None if mask.allowed_BST is None else mask.allowed_BST.unsqueeze(1)
    out_BHSK = F.scaled_dot_product_attention(
        q, k, v, attn_mask=allowed, dropout_p=dropout_p, is_causal=mask.causal and mask.keys > 1,
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return out_BHSK.transpose(1, 2)


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
    if dropout_p > 0.0:
        raise UserError(f"model.attention=matmul knows no dropout, got model.dropout={dropout_p}; use model.attention=auto")
    return _Matmul.apply(q_BSHK, k_BTGK, v_BTGK, mask)  # type: ignore[no-any-return]


def auto(
    q_BSHK: torch.Tensor, k_BTGK: torch.Tensor, v_BTGK: torch.Tensor, mask: AttendMask, dropout_p: float = 0.0
) -> torch.Tensor:
    """On a CPU in bf16 `matmul` for sequences up to MATMUL_KEYS, else `sdpa`.

    Forward + backward in ms of 4096 tokens, 6 heads of 64, two cores, torch 2.13 (sdpa / matmul; benchmarks/cpu_kernels.md):
        keys      256          512          1024         2048
        fp32   38 / 29      75 / 44     102 / 78     168 / 144
        bf16   39 / 13      65 / 20      75 / 35     120 / 63
    torch's CPU kernel gains little from bf16; oneDNN's batched products do. A whole bf16 step of a 6-layer model of width 384 runs
    at 0.71 of its speed with `sdpa`; an fp32 step is the same with either, and `sdpa` keeps no probabilities. One query (decoding)
    is left to `sdpa`: there `matmul` would copy the whole cache.
    """
    short = q_BSHK.device.type == "cpu" and 1 < mask.queries and mask.keys <= MATMUL_KEYS.get(q_BSHK.dtype, 0)
    return (matmul if short and dropout_p == 0.0 else sdpa)(q_BSHK, k_BTGK, v_BTGK, mask, dropout_p)
