"""Multi-head self-attention (Vaswani et al., arXiv 1706.03762) with grouped key/value heads (Ainslie et al., arXiv 2305.13245).

Legend: B batch, S new tokens, T tokens seen (cache included), N = B S flat tokens, n the part of them on this rank under sequence
parallelism, D hidden, H query heads of this rank, G its key/value heads, R query heads per key/value head, K features of a head.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from megatron_scratch import registry
from megatron_scratch.config.model import ModelConfig
from megatron_scratch.models.attend import AttendMask
from megatron_scratch.models.cache import LayerCache
from megatron_scratch.models.dropout import seed_global_generator
from megatron_scratch.models.linear import ColumnParallelLinear, RowParallelLinear, column_parallel
from megatron_scratch.models.mlp import residual_std
from megatron_scratch.models.norms import RMSNorm
from megatron_scratch.models.positions import Rotation, rotate
from megatron_scratch.parallel.topology import Topology

QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Attention(nn.Module):
    """out(attend(q, k, v)), whole heads to each tp rank.

    Fused, one weight `qkv` (G (R+2) K, D) has its rows grouped per key/value head as [R queries, key, value], so that any tp
    that divides G cuts it into whole groups. Separate: `q` (H K, D), `k` and `v` (G K, D); with more ranks than key/value heads,
    tp / G ranks in a row hold and compute the same key/value head, each for query heads of its own. `out` is (D, H K).
    """

    def __init__(self, cfg: ModelConfig, topo: Topology):
        super().__init__()
        self.head, self.ratio = cfg.head_size, cfg.num_heads // cfg.kv_heads
        self.first_head = topo.index("tp") * (cfg.num_heads // topo.size("tp"))
        self.dropout, self.fused = cfg.dropout, cfg.fused_qkv
        self.attend = registry.get("attention", cfg.attention)
        bias = cfg.bias if cfg.qkv_bias is None else cfg.qkv_bias
        copies = max(1, topo.size("tp") // cfg.kv_heads)  # of a key/value head
        assert copies == 1 or not cfg.fused_qkv
        separate = {"q": (cfg.num_heads, 1), "k": (cfg.kv_heads, copies), "v": (cfg.kv_heads, copies)}
        fused = {"qkv": (cfg.num_heads + 2 * cfg.kv_heads, 1)}
        for name, (heads, shared) in (fused if cfg.fused_qkv else separate).items():
            layer = ColumnParallelLinear(cfg.hidden_size, heads * self.head, topo, cfg.init_std, bias, shared)
            self.add_module(name, layer)
        self.out = RowParallelLinear(cfg.num_heads * self.head, cfg.hidden_size, topo, residual_std(cfg), cfg.bias)
        head_norm = partial(RMSNorm, self.head, cfg.norm_eps, False, topo, of_heads=True, kernel=cfg.norm_kernel)
        self.q_norm, self.k_norm = (head_norm() if cfg.qk_norm else nn.Identity() for _ in range(2))

    def _fused(self, x_ND: torch.Tensor, seq: int) -> QKV:
        # split, not three slices: its backward is one concatenation, theirs three tensors of zeros and two sums
        (qkv,) = column_parallel(x_ND, self.qkv)
        q, k, v = qkv.view(-1, seq, qkv.shape[-1]).unflatten(-1, (-1, self.ratio + 2, self.head)).split((self.ratio, 1, 1), dim=3)
        return q.flatten(2, 3), k.squeeze(3), v.squeeze(3)

    def _separate(self, x_ND: torch.Tensor, seq: int) -> QKV:
        q, k, v = (y.view(-1, seq, y.shape[-1] // self.head, self.head) for y in column_parallel(x_ND, self.q, self.k, self.v))
        return q, k, v

    def forward(
        self, x_ND: torch.Tensor, rotation: Rotation | None, mask: AttendMask, seed: torch.Tensor | None = None, site: str = "",
        cache: LayerCache | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """(n or N, D) -> the same. `seed` and `site` name the dropout; no seed, no dropout."""
        q_BSHK, k_BSGK, v_BSGK = (self._fused if self.fused else self._separate)(x_ND, mask.queries)
        q_BSHK, k_BSGK = rotate(self.q_norm(q_BSHK), rotation), rotate(self.k_norm(k_BSGK), rotation)
        k_BTGK, v_BTGK = (k_BSGK, v_BSGK) if cache is None else cache.append(k_BSGK, v_BSGK)
        out_BSHK = self.core(q_BSHK, k_BTGK, v_BTGK, mask, seed, site)
        return self.out(out_BSHK.flatten(0, 1).flatten(1))

    def core(
        self, q_BSHK: torch.Tensor, k_BTGK: torch.Tensor, v_BTGK: torch.Tensor, mask: AttendMask, seed: torch.Tensor | None,
        site: str,
    ) -> torch.Tensor:  # fmt: skip
        """What lies between the projections, and is computed again in backward with parallel.recompute=selective."""
        if self.dropout == 0.0 or seed is None:
            return self.attend(q_BSHK, k_BTGK, v_BTGK, mask, 0.0)  # type: ignore[no-any-return]
        return self._attend_with_dropout(q_BSHK, k_BTGK, v_BTGK, mask, seed, site)

    @torch.compiler.disable  # compiled, random numbers would come from another generator
    def _attend_with_dropout(
        self, q_BSHK: torch.Tensor, k_BTGK: torch.Tensor, v_BTGK: torch.Tensor, mask: AttendMask, seed: torch.Tensor, site: str
    ) -> torch.Tensor:
        """One query head after the other, each under a seed of its own: a head's mask then does not depend on which rank has it.
        It costs a kernel per head, only where attention has dropout."""
        ratio, outs = q_BSHK.shape[2] // k_BTGK.shape[2], []
        for head in range(q_BSHK.shape[2]):
            group = slice(head // ratio, head // ratio + 1)
            seed_global_generator(seed, f"{site}.head.{self.first_head + head}")
            outs.append(self.attend(q_BSHK[:, :, head : head + 1], k_BTGK[:, :, group], v_BTGK[:, :, group], mask, self.dropout))
        return torch.cat(outs, dim=2)
