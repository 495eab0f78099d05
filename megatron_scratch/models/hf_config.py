"""config.json of Hugging Face to our `model` section and back, one pair of functions for each family. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_scratch import registry
from megatron_scratch.config.model import ModelConfig, RopeConfig
from megatron_scratch.util.errors import UserError, choice

_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "silu": "silu", "swish": "silu"}


def read_gpt2(c: Mapping[str, Any]) -> ModelConfig:
    choice("config.json: activation_function", c.get("activation_function", "gelu_new"), _ACTIVATIONS)
    for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if c.get(key):
            raise UserError(f"config.json: {key}=true is not known here; allowed: false")
    return ModelConfig(
        vocab_size=c["vocab_size"], num_layers=c["n_layer"], hidden_size=c["n_embd"], num_heads=c["n_head"],
        ffn_size=c.get("n_inner") or 4 * c["n_embd"], max_seq_len=c["n_positions"], position="learned",
        norm="layernorm", norm_eps=c.get("layer_norm_epsilon", 1e-5),
        mlp=_ACTIVATIONS[c.get("activation_function", "gelu_new")], bias=True, tie_embeddings=c.get("tie_word_embeddings", True),
        dropout=c.get("resid_pdrop", 0.1), init_std=c.get("initializer_range", 0.02),
    )  # fmt: skip


def write_gpt2(m: ModelConfig) -> dict[str, Any]:
    activation = next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == m.mlp)
    return {"n_layer": m.num_layers, "n_embd": m.hidden_size, "n_head": m.num_heads, "n_inner": m.ffn, "n_positions": m.max_seq_len,
            "activation_function": activation, "layer_norm_epsilon": m.norm_eps, "resid_pdrop": m.dropout,
            "embd_pdrop": m.dropout, "attn_pdrop": m.dropout}  # fmt: skip


_ROPE_KEYS = {"rope_theta": "theta", "factor": "factor", "original_max_position_embeddings": "original_max_seq_len",
              "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor", "beta_fast": "beta_fast",
              "beta_slow": "beta_slow", "attention_factor": "attention_factor"}  # fmt: skip


def _read_rope(c: Mapping[str, Any]) -> RopeConfig:
    """transformers 5 keeps `rope_parameters`; before, there were `rope_theta` and `rope_scaling`."""
    old = {"rope_theta": c.get("rope_theta", 10000.0), **(c.get("rope_scaling") or {})}
    given = c.get("rope_parameters") or old
    kind = given.get("rope_type", given.get("type", "default"))
    scaling = "none" if kind == "default" else kind
    choice("config.json: rope_type", scaling, registry.names("rope_scaling"))
    values = {ours: given[theirs] for theirs, ours in _ROPE_KEYS.items() if given.get(theirs) is not None}
    if "original_max_position_embeddings" in _SCALING_KEYS.get(scaling, ()):
        values.setdefault("original_max_seq_len", c["max_position_embeddings"])  # as transformers does
    return RopeConfig(scaling=scaling, **values)


_SCALING_KEYS = {"none": (), "linear": ("factor",),
                 "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
                 "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor")}  # fmt: skip


def _write_rope(r: RopeConfig) -> dict[str, Any]:
    kind = {"rope_type": "default" if r.scaling == "none" else r.scaling}
    values = {theirs: getattr(r, _ROPE_KEYS[theirs]) for theirs in _SCALING_KEYS[r.scaling]}
    return {"rope_theta": r.theta, **kind, **{k: v for k, v in values.items() if v is not None}}


def _ropes(r: RopeConfig) -> dict[str, Any]:
    """In the words of transformers 5, and of 4 and those who read it its way."""
    new = _write_rope(r)
    old = {key: value for key, value in new.items() if key != "rope_theta"}
    return {"rope_parameters": new, "rope_theta": r.theta, "rope_scaling": None if r.scaling == "none" else old}


def read_llama(c: Mapping[str, Any]) -> ModelConfig:
    choice("config.json: hidden_act", c.get("hidden_act", "silu"), ("silu", "swish"))
    if bool(c.get("attention_bias")) != bool(c.get("mlp_bias")):
        raise UserError("config.json: attention_bias and mlp_bias differ; allowed here: both or neither")
    if c.get("use_sliding_window"):
        raise UserError("config.json: use_sliding_window=true is per layer there and for all layers here; allowed: false")
    return ModelConfig(
        vocab_size=c["vocab_size"], num_layers=c["num_hidden_layers"], hidden_size=c["hidden_size"],
        num_heads=c["num_attention_heads"], num_kv_heads=c.get("num_key_value_heads"),
        head_dim=c.get("head_dim"), ffn_size=c["intermediate_size"],
        max_seq_len=c["max_position_embeddings"], rope=_read_rope(c), norm_eps=c.get("rms_norm_eps", 1e-6), mlp="swiglu",
        bias=bool(c.get("mlp_bias")), qk_norm=c["model_type"] == "qwen3", tie_embeddings=c.get("tie_word_embeddings", False),
        init_std=c.get("initializer_range", 0.02),
    )  # fmt: skip


def write_llama(m: ModelConfig) -> dict[str, Any]:
    return {"num_hidden_layers": m.num_layers, "hidden_size": m.hidden_size, "num_attention_heads": m.num_heads,
            "num_key_value_heads": m.kv_heads, "head_dim": m.head_size, "intermediate_size": m.ffn,
            "max_position_embeddings": m.max_seq_len, **_ropes(m.rope), "rms_norm_eps": m.norm_eps,
            "hidden_act": "silu", "attention_bias": m.bias, "mlp_bias": m.bias}  # fmt: skip
