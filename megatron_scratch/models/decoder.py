"""The model: embed tokens, pass them through the layers, normalise; logits on request.

Inside, the stream of activations is flat, (N, D), or this rank's tokens of it, (n, D), under sequence parallelism: only attention
asks which token stands in which sequence.

Legend: B batch, S new tokens, T tokens seen (cache included), N = B S, n = N / tp, D hidden, V padded vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from megatron_scratch import registry
from megatron_scratch.config.attention import wants_dense
from megatron_scratch.config.model import ModelConfig
from megatron_scratch.models.attend import AttendMask, make_mask
from megatron_scratch.models.attention import Attention
from megatron_scratch.models.cache import KVCache, LayerCache
from megatron_scratch.models.dropout import dropout
from megatron_scratch.models.gemm import linear
from megatron_scratch.models.linear import ColumnParallelLinear, VocabParallelEmbedding, cast, check_ids
from megatron_scratch.models.norms import norm_of
from megatron_scratch.models.objective import IGNORE, chunk_tokens, linear_cross_entropy_sum
from megatron_scratch.models.positions import Rotation
from megatron_scratch.parallel.collectives import all_gather
from megatron_scratch.parallel.layout import local
from megatron_scratch.parallel.tensor import enter, token_part
from megatron_scratch.parallel.topology import Topology


class PreNormBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): the residual stream is never normalised (GPT-2, Llama)."""

    final_norm = True  # so the decoder normalises it once, at the end

    def __init__(self, cfg: ModelConfig, topo: Topology, index: int):
        super().__init__()
        norm = norm_of(cfg)
        self.topo, self.dropout, self.name = topo, cfg.dropout, f"layers.{index}"
        self.attention_norm = norm(cfg.hidden_size, cfg.norm_eps, cfg.bias, topo)
        self.attention = Attention(cfg, topo)
        self.mlp_norm = norm(cfg.hidden_size, cfg.norm_eps, cfg.bias, topo)
        self.mlp = registry.get("mlp", cfg.mlp)(cfg, topo)

    def forward(
        self, x_ND: torch.Tensor, rotation: Rotation | None, mask: AttendMask, seed: torch.Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """(n or N, D) -> the same. `seed` of the microbatch's dropout; None: no dropout."""
        x_ND = x_ND + self._attend(self.attention_norm(x_ND), rotation, mask, seed, cache)
        return x_ND + self._feed(self.mlp_norm(x_ND), seed)

    def _attend(
        self, x_ND: torch.Tensor, rotation: Rotation | None, mask: AttendMask, seed: torch.Tensor | None, cache: LayerCache | None
    ) -> torch.Tensor:
        y_ND = self.attention(x_ND, rotation, mask, seed, f"{self.name}.attention", cache)
        return dropout(y_ND, self.dropout, seed, f"{self.name}.attention", self.topo)

    def _feed(self, x_ND: torch.Tensor, seed: torch.Tensor | None) -> torch.Tensor:
        return dropout(self.mlp(x_ND), self.dropout, seed, f"{self.name}.mlp", self.topo)


class PostNormBlock(PreNormBlock):
    """norm(x + attention(x)), then norm(x + mlp(x)): the original Transformer (arXiv 1706.03762)."""

    final_norm = False

    def forward(
        self, x_ND: torch.Tensor, rotation: Rotation | None, mask: AttendMask, seed: torch.Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """(n or N, D) -> the same."""
        x_ND = self.attention_norm(x_ND + self._attend(x_ND, rotation, mask, seed, cache))
        return self.mlp_norm(x_ND + self._feed(x_ND, seed))


class Decoder(nn.Module):
    """A decoder-only Transformer on the meta device; `parallel.layout.materialize` gives it memory and values.

    Children: `embed`, `position`, `layers` (keyed by the global layer index), `norm`, `head`. With tied embeddings there is
    no `head`: the embedding's weight is used. `compute_dtype` is set by the builder; parameters stay fp32.

    A stage of a pipeline is a decoder with some of the `layers`, under their global names; `embed` and learned positions are the
    first stage's, `norm` and `head` the last one's. Tied, both ends hold an `embed`.
    """

    def __init__(self, cfg: ModelConfig, topo: Topology, layers: range | None = None):
        """`layers`: of this stage; default: all."""
        super().__init__()
        self.cfg, self.topo = cfg, topo
        self.compute_dtype, self.dense_mask = torch.float32, wants_dense(cfg.attention)
        self.tap: Callable[[str, torch.Tensor], None] | None = None  # is shown the stream after each module, by its name
        layers = range(cfg.num_layers) if layers is None else layers
        self.first, self.last = layers.start == 0, layers.stop == cfg.num_layers
        block, norm = registry.get("block", cfg.norm_place), norm_of(cfg)
        if self.first or (self.last and cfg.tie_embeddings):
            self.embed = VocabParallelEmbedding(cfg.padded_vocab, cfg.hidden_size, topo, cfg.init_std)
        self.position = registry.get("position", cfg.position)(cfg, topo)
        if not self.first:
            self.position._parameters.clear()  # tables are added to the embedding; rotations are everybody's
        self.layers = nn.ModuleDict({str(i): block(cfg, topo, i) for i in layers})
        normalised = self.last and block.final_norm
        self.norm = norm(cfg.hidden_size, cfg.norm_eps, cfg.bias, topo) if normalised else nn.Identity()
        has_head = self.last and not cfg.tie_embeddings
        self.head = ColumnParallelLinear(cfg.hidden_size, cfg.padded_vocab, topo, cfg.init_std) if has_head else None

    def forward(
        self, tokens_BS: torch.Tensor, positions_BS: torch.Tensor | None = None, documents_BS: torch.Tensor | None = None,
        seed: int | torch.Tensor | None = None, cache: KVCache | None = None, x_ND: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """The hidden state after the final norm, whole on every tp rank; from a stage that is not the last, the stream so far.

        Args:
            tokens_BS: int64, below vocab_size; every stage takes them, as only the stream is flat.
            positions_BS: of each token, (B or 1, S); default: counting on from what the cache holds.
            documents_BS: a number per token; a token sees only its own document. Not together with a cache.
            seed: of this microbatch's dropout; None: no dropout.
            cache: filled with the keys and values of these tokens. Not with tp > 1.
            x_ND: the stream from the stage before, (n or N, D); None in the first.

        Returns:
            (B, S, D) in `compute_dtype`; from a stage that is not the last, (n or N, D).

        Raises:
            UserError: an id outside the vocabulary, positions beyond a learned table, more tokens than the cache has room for.
        """
        assert cache is None or (documents_BS is None and self.topo.size("tp") == 1), "one document per sequence, on one rank"
        check_ids(tokens_BS, self.cfg.vocab_size, "token id")
        seq, start = tokens_BS.shape[1], 0
        if cache is not None:
            cache.check(seq)
            start = cache.length
        if positions_BS is None:
            self.position.check(start + seq - 1)
            positions_BS = torch.arange(start, start + seq, device=tokens_BS.device).unsqueeze(0)
        mask = make_mask(seq, start + seq, self.cfg.sliding_window, documents_BS, tokens_BS.device, self.dense_mask)
        rotation = self.position.rotation(positions_BS, self.compute_dtype)
        key = None if seed is None else torch.tensor(int(seed))  # a number, or a row of the batch's seeds
        if self.first:
            x_ND = self._embed(tokens_BS, positions_BS, key)
            self._show("embed", x_ND)
        assert x_ND is not None, "the stream from the stage before"
        for index, layer in self.layers.items():
            x_ND = layer(x_ND, rotation, mask, key, None if cache is None else cache.layers[index])
            self._show(f"layers.{index}", x_ND)
        if not self.last:
            return x_ND
        x_ND = self.norm(x_ND)
        self._show("norm", x_ND)
        return enter(x_ND, self.topo).view(*tokens_BS.shape, -1)

    def _show(self, name: str, x_ND: torch.Tensor) -> None:
        if self.tap is not None:
            self.tap(name, x_ND)

    def _embed(self, tokens_BS: torch.Tensor, positions_BS: torch.Tensor, seed: torch.Tensor | None) -> torch.Tensor:
        """(B, S) -> (n or N, D)."""
        positions_N = positions_BS.expand_as(tokens_BS).flatten()[token_part(tokens_BS.numel(), self.topo)]
        x_ND = self.position.add(self.embed(tokens_BS.flatten()), positions_N).to(self.compute_dtype)
        return dropout(x_ND, self.cfg.dropout, seed, "embed", self.topo)

    @property
    def head_weight(self) -> torch.Tensor:
        """(V, D) master, in the last stage: the head's, or the embedding's where they are tied."""
        return self.embed.weight if self.head is None else self.head.weight

    def logits(self, hidden_BSD: torch.Tensor) -> torch.Tensor:
        """(B, S, D) -> (B, S, V), whole on every tp rank, without gradients over tp. Columns beyond vocab_size are -inf: nobody can
        sample a token that does not exist."""
        logits_BSV = linear(hidden_BSD, cast(self.head_weight, hidden_BSD.dtype))
        if self.topo.size("tp") > 1:
            logits_BSV = all_gather(logits_BSV.detach(), self.topo, "tp").movedim(0, -2).flatten(-2)
        logits_BSV[..., self.cfg.vocab_size :] = -math.inf
        return logits_BSV

    def loss_sum(self, hidden_BSD: torch.Tensor, labels_BS: torch.Tensor, z_loss: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross entropy summed over labels != -100, and their number: on the device, the same on every tp rank; see `objective`.

        The head is cut to the true vocabulary (a view), so the padding costs nothing and gets a gradient of zero.
        """
        check_ids(labels_BS, self.cfg.vocab_size, "label", IGNORE)
        weight_VD = local(self.head_weight)
        rows = weight_VD.shape[0]
        first = self.topo.index("tp") * rows
        weight_VD = weight_VD[: max(0, self.cfg.vocab_size - first)]
        return linear_cross_entropy_sum(hidden_BSD, weight_VD, labels_BS, z_loss, chunk_tokens(rows), self.topo, first)
