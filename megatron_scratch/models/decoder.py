"""The model: embed tokens, pass them through the layers, normalise; logits on request.

Legend: B batch, S new tokens, T tokens seen (cache included), D hidden, V padded vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from megatron_scratch import registry
from megatron_scratch.config.model import ModelConfig
from megatron_scratch.models.attend import AttendMask, make_mask
from megatron_scratch.models.attention import Attention
from megatron_scratch.models.cache import KVCache, LayerCache
from megatron_scratch.models.gemm import linear
from megatron_scratch.models.linear import Embedding, Linear, cast
from megatron_scratch.models.objective import linear_cross_entropy_sum
from megatron_scratch.models.positions import Rotation
from megatron_scratch.parallel.layout import local
from megatron_scratch.parallel.topology import Topology


class PreNormBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): the residual stream is never normalised (GPT-2, Llama)."""

    final_norm = True  # so the decoder normalises it once, at the end

    def __init__(self, cfg: ModelConfig, topo: Topology):
        super().__init__()
        norm = registry.get("norm", cfg.norm)
        self.dropout = cfg.dropout
        self.attention_norm = norm(cfg.hidden_size, cfg.norm_eps, cfg.bias, topo)
        self.attention = Attention(cfg, topo)
        self.mlp_norm = norm(cfg.hidden_size, cfg.norm_eps, cfg.bias, topo)
        self.mlp = registry.get("mlp", cfg.mlp)(cfg, topo)

    def forward(
        self, x_BSD: torch.Tensor, rotation: Rotation | None, mask: AttendMask, cache: LayerCache | None = None
    ) -> torch.Tensor:
        """(B, S, D) -> (B, S, D)."""
        x_BSD = x_BSD + self._drop(self.attention(self.attention_norm(x_BSD), rotation, mask, cache))
        return x_BSD + self._drop(self.mlp(self.mlp_norm(x_BSD)))

    def _drop(self, x_BSD: torch.Tensor) -> torch.Tensor:
        return F.dropout(x_BSD, self.dropout, self.training)


class PostNormBlock(PreNormBlock):
    """norm(x + attention(x)), then norm(x + mlp(x)): the original Transformer (arXiv 1706.03762)."""

    final_norm = False

    def forward(
        self, x_BSD: torch.Tensor, rotation: Rotation | None, mask: AttendMask, cache: LayerCache | None = None
    ) -> torch.Tensor:
        """(B, S, D) -> (B, S, D)."""
        x_BSD = self.attention_norm(x_BSD + self._drop(self.attention(x_BSD, rotation, mask, cache)))
        return self.mlp_norm(x_BSD + self._drop(self.mlp(x_BSD)))


class Decoder(nn.Module):
    """A decoder-only Transformer on the meta device; `parallel.layout.materialize` gives it memory and values.

    Children: `embed`, `position`, `layers` (keyed by the global layer index), `norm`, `head`. With tied embeddings there is
    no `head`: the embedding's weight is used. `compute_dtype` is set by the builder; parameters stay fp32.
    """

    def __init__(self, cfg: ModelConfig, topo: Topology):
        super().__init__()
        assert topo.size("tp") == 1, "the layers carry their tp layout already, their collectives come with tensor parallelism"
        self.cfg = cfg
        self.compute_dtype = torch.float32
        block = registry.get("block", cfg.norm_place)
        self.embed = Embedding(cfg.padded_vocab, cfg.hidden_size, topo, cfg.init_std)
        self.position = registry.get("position", cfg.position)(cfg, topo)
        self.layers = nn.ModuleDict({str(i): block(cfg, topo) for i in range(cfg.num_layers)})
        norm = registry.get("norm", cfg.norm)
        self.norm = norm(cfg.hidden_size, cfg.norm_eps, cfg.bias, topo) if block.final_norm else nn.Identity()
        self.head = None if cfg.tie_embeddings else Linear(cfg.hidden_size, cfg.padded_vocab, topo, cfg.init_std, cut="out")

    def forward(
        self,
        tokens_BS: torch.Tensor,
        positions_BS: torch.Tensor | None = None,
        documents_BS: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """The hidden state after the final norm.

        Args:
            tokens_BS: int64, below vocab_size.
            positions_BS: of each token, (B or 1, S); default: counting on from what the cache holds.
            documents_BS: a number per token; a token sees only its own document. Not together with a cache.
            cache: filled with the keys and values of these tokens.

        Returns:
            (B, S, D) in `compute_dtype`.

        Raises:
            UserError: positions beyond a learned table, or more tokens than the cache has room for.
        """
        assert cache is None or documents_BS is None, "a cache holds one document per sequence"
        seq, start = tokens_BS.shape[1], 0
        if cache is not None:
            cache.check(seq)
            start = cache.length
        if positions_BS is None:
            self.position.check(start + seq - 1)
            positions_BS = torch.arange(start, start + seq, device=tokens_BS.device).unsqueeze(0)
        mask = make_mask(seq, start + seq, self.cfg.sliding_window, documents_BS, tokens_BS.device)
        rotation = self.position.rotation(positions_BS, self.compute_dtype)
        x_BSD = self.position.add(self.embed(tokens_BS), positions_BS).to(self.compute_dtype)
        x_BSD = F.dropout(x_BSD, self.cfg.dropout, self.training)
        for index, layer in self.layers.items():
            x_BSD = layer(x_BSD, rotation, mask, None if cache is None else cache.layers[index])
        return self.norm(x_BSD)

    @property
    def head_weight(self) -> torch.Tensor:
        """(V, D) fp32: the head's, or the embedding's where they are tied."""
        return self.embed.weight if self.head is None else self.head.weight

    def logits(self, hidden_BSD: torch.Tensor) -> torch.Tensor:
        """(B, S, D) -> (B, S, V). Columns beyond vocab_size are -inf: nobody can sample a token that does not exist."""
        logits_BSV = linear(hidden_BSD, cast(self.head_weight, hidden_BSD.dtype))
        logits_BSV[..., self.cfg.vocab_size :] = -math.inf
        return logits_BSV

    def loss_sum(self, hidden_BSD: torch.Tensor, labels_BS: torch.Tensor, z_loss: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross entropy summed over labels != -100, and their number, both on the device; see `objective`.

        The head is cut to vocab_size rows (a view), so the padding costs nothing and gets a gradient of zero.
        """
        weight_VD = local(self.head_weight)[: self.cfg.vocab_size]
        return linear_cross_entropy_sum(hidden_BSD, weight_VD, labels_BS, z_loss)
