"""How many parameters a config has and how much arithmetic a token costs. Nothing gets memory: 405B take a moment."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from megatron_scratch.config.model import ModelConfig
from megatron_scratch.config.pipeline import balance
from megatron_scratch.models.decoder import Decoder
from megatron_scratch.parallel.topology import SINGLE


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by place, with the true vocabulary (the padding rows of the tables are not counted)."""

    embed: int  # input table
    position: int  # learned positions
    layers: int
    norm: int  # the final one
    head: int  # 0 where it is the input table

    @property
    def total(self) -> int:
        return self.embed + self.position + self.layers + self.norm + self.head

    @property
    def without_embeddings(self) -> int:
        """Layers and final norm: the N of the scaling-law papers (Kaplan et al., arXiv 2001.08361)."""
        return self.layers + self.norm

    def multiplied(self, vocab_matrix: int) -> int:
        """Layers, final norm and head, tied or not: what every token is multiplied with. Look-up tables are not."""
        return self.layers + self.norm + vocab_matrix


def count_parameters(cfg: ModelConfig) -> ParameterCount:
    """Counted on the model itself, built without memory, so that a plugin's parts count as they are."""
    assert cfg.vocab_size is not None
    counts: Counter[str] = Counter()
    for name, parameter in Decoder(cfg, SINGLE).named_parameters():
        padding = (cfg.padded_vocab - cfg.vocab_size) * cfg.hidden_size if name in ("embed.weight", "head.weight") else 0
        counts[name.partition(".")[0]] += parameter.numel() - padding
    return ParameterCount(**{part: counts[part] for part in ("embed", "position", "layers", "norm", "head")})


EMBED_FLOPS = 18 * 300  # per feature: 18 bytes of rows and their gradients in fp32, at some 300 FLOP a byte of an H100's memory


def layers_of_stages(cfg: ModelConfig, seq_len: int, stages: int) -> tuple[int, ...]:
    """Layers of each pipeline stage, balanced by what a token costs there: the head of a large vocabulary weighs several layers."""
    if stages == 1:
        return (cfg.num_layers,)
    layer = flops_per_token(replace(cfg, num_layers=1), seq_len, causal=True)
    head = 6.0 * (cfg.vocab_size or 0) * cfg.hidden_size
    return balance(cfg.num_layers, stages, layer - head, EMBED_FLOPS * cfg.hidden_size, head)


def flops_per_token(cfg: ModelConfig, seq_len: int, causal: bool) -> float:
    """Floating-point operations of one token, forward + backward: 6 N + 12 L h s (full) or 6 N + 6 L h s (causal).

    N is what a token is multiplied with: layers, final norm and the head (once, tied or not), without the look-up tables of
    tokens and positions. h is heads x head size. Full attention (PaLM, nanoGPT, torchtitan) counts s keys per query though
    the mask hides half; causal (Megatron) counts s/2. A sliding window w < s sees w keys, or w - w^2/2s. Recomputation is not
    counted.
    """
    assert cfg.vocab_size is not None
    window = min(cfg.sliding_window or seq_len, seq_len)
    keys = window - window * window / (2 * seq_len) if causal else window
    n = count_parameters(cfg).multiplied(cfg.vocab_size * cfg.hidden_size)
    return 6.0 * n + 12.0 * cfg.num_layers * cfg.num_heads * cfg.head_size * keys
