"""Keys and values of the tokens seen so far, preallocated, so that a new token costs one token.

Legend: B batch, S new tokens, T tokens held, G key/value heads, K features of a head.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from megatron_scratch.config.model import ModelConfig
from megatron_scratch.util.errors import UserError


class LayerCache:
    """One layer's share."""

    def __init__(self, k_BTGK: torch.Tensor, v_BTGK: torch.Tensor):
        self.k_BTGK, self.v_BTGK, self.length = k_BTGK, v_BTGK, 0

    def append(self, k_BSGK: torch.Tensor, v_BSGK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new tokens, and give all keys and values up to them, as views (B, T, G, K)."""
        end = self.length + k_BSGK.shape[1]
        self.k_BTGK[:, self.length : end] = k_BSGK
        self.v_BTGK[:, self.length : end] = v_BSGK
        self.length = end
        return self.k_BTGK[:, :end], self.v_BTGK[:, :end]


class KVCache:
    """All layers of a batch whose sequences have the same length.

    Args:
        length: tokens to make room for; memory is 2 x layers x batch x length x kv_heads x head_size elements.
        layers: global layer indices; default all.
    """

    def __init__(self, cfg: ModelConfig, batch: int, length: int, device: torch.device | str, dtype: torch.dtype,
                 layers: Iterable[int] | None = None):  # fmt: skip
        self.room = length
        shape = (batch, length, cfg.kv_heads, cfg.head_size)

        def empty() -> torch.Tensor:
            return torch.zeros(shape, device=device, dtype=dtype)

        self.layers = {str(i): LayerCache(empty(), empty()) for i in (range(cfg.num_layers) if layers is None else layers)}

    @property
    def length(self) -> int:
        """Tokens held."""
        return next(iter(self.layers.values())).length

    def reset(self) -> None:
        """Forget everything, keep the memory."""
        for layer in self.layers.values():
            layer.length = 0

    def check(self, new: int) -> None:
        """Refuse more tokens than there is room for."""
        if self.length + new > self.room:
            raise UserError(f"the KV cache has room for {self.room} tokens, {self.length} are taken and {new} more were given; "
                            "ask for fewer new tokens or a longer cache")  # fmt: skip
