"""The `model` section: a decoder described by the names of its parts and its sizes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from megatron_scratch import registry
from megatron_scratch.config.optim import use_apex
from megatron_scratch.util.errors import UserError, choice

VOCAB_MULTIPLE = 128  # vocabularies are padded to this, whatever the layout: a checkpoint's shapes never depend on tp


@dataclass
class RopeConfig:
    """Rotary embedding (Su et al. 2021, arXiv 2104.09864) and how it is stretched beyond its training length."""

    theta: float = 10000.0
    scaling: str = "none"  # none | linear (arXiv 2306.15595) | llama3 | yarn (arXiv 2309.00071)
    factor: float = 1.0  # new length / original length
    original_max_seq_len: int = 8192
    low_freq_factor: float = 1.0  # llama3: wavelengths beyond original/low are fully stretched
    high_freq_factor: float = 4.0  # llama3: wavelengths under original/high are left alone
    beta_fast: float = 32.0  # yarn: rotations over the original length above which a dimension is left alone
    beta_slow: float = 1.0  # yarn: rotations below which it is fully stretched
    attention_factor: Optional[float] = None  # yarn: scale of cos and sin; default 0.1 ln(factor) + 1


@dataclass
class ModelConfig:
    """Sizes in tokens, layers, heads and features. `None` means the value derived from the others, as noted."""

    vocab_size: Optional[int] = None  # None: the tokenizer's
    num_layers: int = 6
    hidden_size: int = 384
    num_heads: int = 6
    num_kv_heads: Optional[int] = None  # None: num_heads (multi-head); 1: multi-query; between: grouped-query
    head_dim: Optional[int] = None  # None: hidden_size / num_heads
    ffn_size: Optional[int] = None  # None: 4 x hidden_size
    max_seq_len: int = 1024
    position: str = "rope"
    rope: RopeConfig = field(default_factory=RopeConfig)
    norm: str = "rmsnorm"
    norm_eps: float = 1e-5
    norm_kernel: str = "torch"  # torch | apex | auto: apex where it is installed and there is a GPU, else torch
    norm_place: str = "pre"  # pre: x + f(norm(x)); post: norm(x + f(x)), the original Transformer
    mlp: str = "swiglu"
    bias: bool = False  # on linears and LayerNorm
    qkv_bias: Optional[bool] = None  # None: same as bias (Qwen2 has it on the QKV projection alone)
    fused_qkv: bool = True  # one weight, rows grouped per KV head; False: separate q, k, v
    qk_norm: bool = False  # RMSNorm over head_dim on queries and keys (Qwen3)
    sliding_window: Optional[int] = None  # a token sees itself and the window-1 tokens before it
    attention: str = "auto"  # auto | reference | sdpa | matmul | flex | flash_attn: docs/kernels.md says which can do what
    tie_embeddings: bool = False
    dropout: float = 0.0
    init_std: float = 0.02
    scale_residual_init: bool = True  # std / sqrt(2 num_layers) on the projections that write to the residual (GPT-2)

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def ffn(self) -> int:
        return self.ffn_size or 4 * self.hidden_size

    @property
    def padded_vocab(self) -> int:
        assert self.vocab_size is not None, "model.vocab_size is resolved from the data before the model is built"
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def check_model(m: ModelConfig) -> None:
    """Refuse what no model can be built from; each message says what, got, allowed."""
    for key in ("num_layers", "hidden_size", "num_heads", "max_seq_len"):
        if getattr(m, key) < 1:
            raise UserError(f"model.{key}={getattr(m, key)} must be at least 1")
    for key in ("vocab_size", "num_kv_heads", "head_dim", "ffn_size", "sliding_window"):
        if getattr(m, key) is not None and getattr(m, key) < 1:
            raise UserError(f"model.{key}={getattr(m, key)} must be at least 1, or null for its default")
    for key, kind in (("position", "position"), ("norm", "norm"), ("mlp", "mlp"), ("attention", "attention")):
        choice(f"model.{key}", getattr(m, key), registry.names(kind))
    choice("model.rope.scaling", m.rope.scaling, registry.names("rope_scaling"))
    choice("model.norm_place", m.norm_place, ("pre", "post"))
    use_apex("model.norm_kernel", m.norm_kernel)
    if m.head_dim is None and m.hidden_size % m.num_heads:
        raise UserError(f"model.hidden_size={m.hidden_size} is not divisible by model.num_heads={m.num_heads}; "
                        f"change one, or give model.head_dim")  # fmt: skip
    if m.num_heads % m.kv_heads:
        raise UserError(f"model.num_heads={m.num_heads} is not divisible by model.num_kv_heads={m.num_kv_heads}; "
                        f"allowed: {[k for k in range(1, m.num_heads + 1) if m.num_heads % k == 0]}")  # fmt: skip
    if m.position == "rope" and m.head_size % 2:
        raise UserError(f"model.head_dim={m.head_size} must be even with model.position=rope: features rotate in pairs")
    if not 0.0 <= m.dropout < 1.0:
        raise UserError(f"model.dropout={m.dropout} must be in [0, 1)")
    _refuse_idle_rope(m)


_ROPE_FIELDS = {
    "none": {"theta"},
    "linear": {"theta", "factor"},
    "llama3": {"theta", "factor", "original_max_seq_len", "low_freq_factor", "high_freq_factor"},
    "yarn": {"theta", "factor", "original_max_seq_len", "beta_fast", "beta_slow", "attention_factor"},
}


def _refuse_idle_rope(m: ModelConfig) -> None:
    """A rope setting that nothing reads is a mistake: the user believes in a longer context than the model has."""
    read = {"scaling"} | _ROPE_FIELDS.get(m.rope.scaling, set(vars(m.rope)))  # a plugin's scaling may read anything
    for key, default in vars(RopeConfig()).items():
        value = getattr(m.rope, key)
        if value != default and m.position != "rope":
            raise UserError(f"model.rope.{key}={value} has no effect with model.position={m.position}; use model.position=rope")
        if value != default and key not in read:
            raise UserError(f"model.rope.{key}={value} has no effect with model.rope.scaling={m.rope.scaling}; "
                            "choose a scaling that reads it")  # fmt: skip
