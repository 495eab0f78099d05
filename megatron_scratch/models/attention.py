"""Multi-head self-attention (Vaswani et al., arXiv 1706.03762) with grouped key/value heads (Ainslie et al., arXiv 2305.13245).

Legend: B batch, S new tokens, T tokens seen (cache included), D hidden, H query heads, G key/value heads, R = H/G query heads per
key/value head, K features of a head.
"""

from __future__ import annotations

import torch
from torch import nn

from megatron_scratch import registry
from megatron_scratch.config.model import ModelConfig
from megatron_scratch.models.attend import AttendMask
from megatron_scratch.models.cache import LayerCache
from megatron_scratch.models.linear import Linear
from megatron_scratch.models.mlp import residual_std
from megatron_scratch.models.norms import RMSNorm
from megatron_scratch.models.positions import Rotation, rotate
from megatron_scratch.parallel.topology import Topology

QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Attention(nn.Module):
    """out(attend(q, k, v)).

    Fused, one weight `qkv` (G (R+2) K, D) has its rows grouped per key/value head as [R queries, key, value], so that any tp
    that divides G cuts it into whole groups. Separate: `q` (H K, D), `k` and `v` (G K, D). `out` is (D, H K).
    """

    def __init__(self, cfg: ModelConfig, topo: Topology):
        super().__init__()
        self.head, self.groups, self.ratio = cfg.head_size, cfg.kv_heads, cfg.num_heads // cfg.kv_heads
        self.dropout, self.fused = cfg.dropout, cfg.fused_qkv
        self.attend = registry.get("attention", cfg.attention)
        bias = cfg.bias if cfg.qkv_bias is None else cfg.qkv_bias
        separate = {"q": cfg.num_heads, "k": cfg.kv_heads, "v": cfg.kv_heads}
        for name, count in ({"qkv": sum(separate.values())} if cfg.fused_qkv else separate).items():
            self.add_module(name, Linear(cfg.hidden_size, count * self.head, topo, cfg.init_std, bias, cut="out"))
        self.out = Linear(cfg.num_heads * self.head, cfg.hidden_size, topo, residual_std(cfg), cfg.bias, cut="in")
        self.q_norm = RMSNorm(self.head, cfg.norm_eps, False, topo) if cfg.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head, cfg.norm_eps, False, topo) if cfg.qk_norm else nn.Identity()

    def _fused(self, x_BSD: torch.Tensor) -> QKV:
        # split, not three slices: its backward is one concatenation, theirs three tensors of zeros and two sums
        qkv = self.qkv(x_BSD).unflatten(-1, (-1, self.ratio + 2, self.head))
        q, k, v = qkv.split((self.ratio, 1, 1), dim=3)
        return q.flatten(2, 3), k.squeeze(3), v.squeeze(3)

    def _separate(self, x_BSD: torch.Tensor) -> QKV:
        q, k, v = (linear(x_BSD).unflatten(-1, (-1, self.head)) for linear in (self.q, self.k, self.v))
        return q, k, v

    def forward(
        self, x_BSD: torch.Tensor, rotation: Rotation | None, mask: AttendMask, cache: LayerCache | None = None
    ) -> torch.Tensor:
        """(B, S, D) -> (B, S, D)."""
        q_BSHK, k_BSGK, v_BSGK = self._fused(x_BSD) if self.fused else self._separate(x_BSD)
        q_BSHK, k_BSGK = rotate(self.q_norm(q_BSHK), rotation), rotate(self.k_norm(k_BSGK), rotation)
        k_BTGK, v_BTGK = (k_BSGK, v_BSGK) if cache is None else cache.append(k_BSGK, v_BSGK)
        out_BSHK = self.attend(q_BSHK, k_BTGK, v_BTGK, mask, self.dropout if self.training else 0.0)
        return self.out(out_BSHK.flatten(2, 3))
