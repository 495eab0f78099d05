"""softmax(q k^T / sqrt(K)) v under a mask: one function type, several ways to compute it.

    (q_BSHK, k_BTGK, v_BTGK, mask, dropout_p) -> out_BSHK

`reference` is the yardstick: written as on a blackboard, fp32 inside. Every other backend is tested against it, forward and
backward. A new one is one function, one registry entry of kind `attention` and one row in config/attention.py.

Legend: B batch, S queries, T keys (the queries are the last S of them), H query heads, G key/value heads, K features of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from megatron_scratch.config.attention import CAPABLE
from megatron_scratch.models.attend_flash import choose, flash_attn
from megatron_scratch.models.attend_fused import is_fake
from megatron_scratch.models.attend_matmul import matmul

MATMUL_KEYS = {torch.bfloat16: 2048}  # `auto` on a CPU: keys up to which `matmul` beats `sdpa` by far, figures there


Backend = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class AttendMask:
    """Who sees whom. Keys after a query are never seen; `window` and `documents` take away more.

    Kernels with their own masks read these, and keep in `made` what they build from them; others read `allowed_BST`.
    """

    queries: int
    keys: int
    window: int | None = None
    documents_BT: torch.Tensor | None = None
    dense_BST: torch.Tensor | None = None
    made: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def allowed_BST(self) -> torch.Tensor | None:
        """(B or 1, S, T) bool, all of it; None where plain causality says it all, so that a backend can take its fast path."""
        plain = self.window is None and self.documents_BT is None and self.queries in (1, self.keys)
        assert plain or self.dense_BST is not None, "made with dense=False, for a kernel that has masks of its own"
        return self.dense_BST

    @property
    def causal(self) -> bool:
        """Square and lower triangular, nothing else."""
        return self.allowed_BST is None and self.queries == self.keys

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What a kernel derives from the mask, made at its first call of a forward and kept for the other layers."""
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]


def make_mask(
    queries: int, keys: int, window: int | None, documents_BT: torch.Tensor | None, device: torch.device, dense: bool = True
) -> AttendMask:
    """The mask of the last `queries` of `keys` tokens. Built once per forward, not once per layer.

    Args:
        window: a token sees itself and the window - 1 tokens before it; None: all before it.
        documents_BT: a number per token, rising along a row; a token sees only tokens with its own number.
        dense: write the mask out, B x S x T bits, where it is more than causal; `config.attention.wants_dense` says who reads it.
            For one query it always is.
    """
    window = window if window is not None and window < keys else None
    if (not dense and queries > 1) or (window is None and documents_BT is None and queries in (1, keys)):
        return AttendMask(queries, keys, window, documents_BT)
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
    """The definition. Memory B x H x S x T in fp32, or in fp64 where it is given that."""
    ratio = q_BSHK.shape[2] // k_BTGK.shape[2]
    q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q_BSHK, k_BTGK, v_BTGK))
    k, v = k.repeat_interleave(ratio, 2), v.repeat_interleave(ratio, 2)
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


def auto(
    q_BSHK: torch.Tensor, k_BTGK: torch.Tensor, v_BTGK: torch.Tensor, mask: AttendMask, dropout_p: float = 0.0
) -> torch.Tensor:
    """The fastest that is right here; `megatron-scratch doctor` shows which.

    On a GPU in bf16 or fp16 `flash_attn`, where one is installed that passes `attend_check` on this GPU; else `sdpa`.
    On a CPU in bf16 `matmul` for sequences up to MATMUL_KEYS, else `sdpa`.

    Forward + backward in ms of 4096 tokens, 6 heads of 64, two cores, torch 2.13 (sdpa / matmul; benchmarks/cpu_kernels.md):
        keys      256          512          1024         2048
        fp32   38 / 29      75 / 44     102 / 78     168 / 144
        bf16   39 / 13      65 / 20      75 / 35     120 / 63
    torch's CPU kernel gains little from bf16; oneDNN's batched products do. A whole bf16 step of a 6-layer model of width 384 runs
    at 0.71 of its speed with `sdpa`; an fp32 step is the same with either, and `sdpa` keeps no probabilities. One query (decoding)
    is left to `sdpa`: there `matmul` would copy the whole cache.
    """
    device = torch.device("meta") if is_fake(q_BSHK) and q_BSHK.device.type == "cuda" else q_BSHK.device
    backend = chosen(device, q_BSHK.dtype, q_BSHK.shape[-1], mask, dropout_p)
    return backend(q_BSHK, k_BTGK, v_BTGK, mask, dropout_p)


def chosen(device: torch.device, dtype: torch.dtype, head: int, mask: AttendMask, dropout_p: float = 0.0) -> Backend:
    """What `auto` takes."""
    if device.type == "cuda":
        return flash_attn if _flash(device, dtype, head, dropout_p) else sdpa
    short = device.type == "cpu" and 1 < mask.queries and mask.keys <= MATMUL_KEYS.get(dtype, 0)
    return matmul if short and dropout_p == 0.0 else sdpa


@torch.compiler.assume_constant_result
def _flash(device: torch.device, dtype: torch.dtype, head: int, dropout_p: float) -> bool:
    """Whether `auto` may take flash-attn: there is one for this GPU, it knows such heads, and it has been found right here."""
    from megatron_scratch.models.attend_check import trusted  # which checks what is above

    low, high, step = CAPABLE["flash_attn"].heads
    version, _ = choose(device, dtype, dropout_p)
    return bool(version) and low <= head <= high and head % step == 0 and trusted("flash_attn", device, dtype, head)
