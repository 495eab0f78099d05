"""To and from Hugging Face checkpoints: names, layouts of the same matrices, and config.json. Plain dictionaries; no transformers.

A family is one entry of kind `hf`: its names, the config values it can express, and two functions for config.json. Between
the two worlds stands our own state with separate q, k and v; `split_qkv` and `fuse_qkv` do the grouping by key/value head.

Legend: O features out, I features in, G key/value heads, R query heads per key/value head, K features of a head.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_scratch import registry
from megatron_scratch.config.model import ModelConfig, RopeConfig
from megatron_scratch.util.errors import UserError, choice

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Family:
    """One architecture of transformers.

    Args:
        requires: field of ModelConfig -> values that the architecture can express; another value cannot be exported.
        prefix: of a layer, before its number.
        names: our module -> theirs, inside a layer and outside.
        packed: their name, beside q, k and v, for the three in one weight [q; k; v]; None where they are separate.
        transposed: their modules that keep a weight as (I, O) (GPT-2's Conv1D).
        skip: buffers in old checkpoints that are no parameters.
    """

    model_type: str
    architecture: str
    requires: Mapping[str, tuple[Any, ...]]
    read_config: Callable[[Mapping[str, Any]], ModelConfig]
    write_config: Callable[[ModelConfig], dict[str, Any]]
    prefix: str
    names: Mapping[str, str]
    packed: str | None = None
    transposed: tuple[str, ...] = ()
    skip: str = field(default=r"rotary_emb\.inv_freq$")


def family_of(cfg: ModelConfig) -> Family:
    """The first family that can express a config, or a `UserError` that says what stands in the way of each."""
    reasons = []
    for name in registry.names("hf"):
        family: Family = registry.get("hf", name)  # type: ignore[assignment]
        wrong = [f"{key}={getattr(cfg, key)!r}" for key, allowed in family.requires.items() if getattr(cfg, key) not in allowed]
        if not wrong:
            return family
        reasons.append(f"{name} cannot have {', '.join(wrong)}")
    raise UserError(f"no Hugging Face architecture has this model: {'; '.join(reasons)}")


def to_hf(state: Mapping[str, torch.Tensor], cfg: ModelConfig) -> State:
    """Our state (global names, whole tensors) as their state_dict; the vocabulary's padding rows are dropped."""
    family, out = family_of(cfg), {}
    separate = split_qkv(state, cfg) if cfg.fused_qkv else dict(state)
    for name, tensor in separate.items():
        if name in ("embed.weight", "head.weight"):
            tensor = tensor[: cfg.vocab_size]
        out[_rename(name, family)] = tensor
    if cfg.tie_embeddings:
        out[_rename("head.weight", family)] = out[_rename("embed.weight", family)]
    return _pack(out, family)


def from_hf(state: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> tuple[ModelConfig, State]:
    """Their state_dict and config.json as our config and state, fp32, vocabulary padded with rows of zeros.

    Raises:
        UserError: an architecture, an option or a tensor that has no place here.
    """
    choice("config.json: model_type", config.get("model_type"), registry.names("hf"))
    family: Family = registry.get("hf", str(config["model_type"]))  # type: ignore[assignment]
    cfg = family.read_config(config)
    back = {theirs: ours for ours, theirs in family.names.items()}
    out: State = {}
    for name, tensor in _unpack(state, family).items():
        if re.search(family.skip, name) or (cfg.tie_embeddings and name == _rename("head.weight", family)):
            continue
        ours = _rename_back(name, family, back)
        tensor = tensor.float()
        if ours in ("embed.weight", "head.weight"):
            tensor = torch.cat((tensor, tensor.new_zeros(cfg.padded_vocab - tensor.shape[0], tensor.shape[1])))
        out[ours] = tensor
    return cfg, fuse_qkv(out, cfg) if cfg.fused_qkv else out


def hf_config(cfg: ModelConfig) -> dict[str, Any]:
    """The contents of config.json."""
    family = family_of(cfg)
    common = {"model_type": family.model_type, "architectures": [family.architecture], "vocab_size": cfg.vocab_size,
              "tie_word_embeddings": cfg.tie_embeddings, "initializer_range": cfg.init_std}  # fmt: skip
    return {**common, **family.write_config(cfg)}


def fuse_qkv(state: Mapping[str, torch.Tensor], cfg: ModelConfig) -> State:
    """`attention.{q,k,v}` -> `attention.qkv`, rows grouped per key/value head: (G, R + 1 + 1, K, ...) flattened."""
    out = {name: tensor for name, tensor in state.items() if not re.search(r"attention\.[qkv]\.", name)}
    for name, q in state.items():
        if ".attention.q." in name:
            parts = [state[name.replace(".q.", f".{letter}.")] for letter in "qkv"]
            grouped = [part.unflatten(0, (cfg.kv_heads, -1, cfg.head_size)) for part in parts]
            out[name.replace(".q.", ".qkv.")] = torch.cat(grouped, dim=1).reshape(-1, *q.shape[1:])
    return out


def split_qkv(state: Mapping[str, torch.Tensor], cfg: ModelConfig) -> State:
    """The inverse of `fuse_qkv`."""
    out = {name: tensor for name, tensor in state.items() if ".attention.qkv." not in name}
    ratio = cfg.num_heads // cfg.kv_heads
    for name, fused in state.items():
        if ".attention.qkv." in name:
            groups = fused.unflatten(0, (cfg.kv_heads, ratio + 2, cfg.head_size))
            for letter, part in zip("qkv", groups.split((ratio, 1, 1), dim=1), strict=True):
                out[name.replace(".qkv.", f".{letter}.")] = part.reshape(-1, *fused.shape[1:])
    return out


def _rename(name: str, family: Family) -> str:
    module, _, kind = name.rpartition(".")
    if found := re.fullmatch(r"layers\.(\d+)\.(.+)", module):
        return f"{family.prefix}{found.group(1)}.{family.names[found.group(2)]}.{kind}"
    return f"{family.names[module]}.{kind}"


def _rename_back(name: str, family: Family, back: Mapping[str, str]) -> str:
    module, _, kind = name.rpartition(".")
    layer, inner = "", module
    if found := re.fullmatch(re.escape(family.prefix) + r"(\d+)\.(.+)", module):
        layer, inner = f"layers.{found.group(1)}.", found.group(2)
    if inner not in back:
        raise UserError(f"the checkpoint's tensor {name!r} has no place in a {family.model_type} model here")
    return f"{layer}{back[inner]}.{kind}"


def _pack(state: State, family: Family) -> State:
    """Join q, k and v, and transpose, where the family wants it."""
    if family.packed is None:
        return state
    out = {name: tensor for name, tensor in state.items() if not re.search(r"\.[qkv]\.(weight|bias)$", name)}
    for name in state:
        if found := re.search(r"^(.*\.)q\.(weight|bias)$", name):
            parts = [state[f"{found.group(1)}{letter}.{found.group(2)}"] for letter in "qkv"]
            out[f"{found.group(1)}{family.packed}.{found.group(2)}"] = torch.cat(parts)
    return {name: _transpose(name, tensor, family) for name, tensor in out.items()}


def _unpack(state: Mapping[str, torch.Tensor], family: Family) -> State:
    """The inverse of `_pack`; GPT-2's own files lack the prefix `transformer.`."""
    if family.packed is None:
        return dict(state)
    out: State = {}
    for name, tensor in state.items():
        name = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
        tensor = _transpose(name, tensor, family)
        module, _, kind = name.rpartition(".")
        if module.endswith(f".{family.packed}"):
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                out[f"{module.removesuffix(family.packed)}{letter}.{kind}"] = part
        else:
            out[name] = tensor
    return out


def _transpose(name: str, tensor: torch.Tensor, family: Family) -> torch.Tensor:
    module, _, kind = name.rpartition(".")
    return tensor.t().contiguous() if kind == "weight" and module.endswith(family.transposed) else tensor


_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "silu": "silu", "swish": "silu"}


def _read_gpt2(c: Mapping[str, Any]) -> ModelConfig:
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


def _write_gpt2(m: ModelConfig) -> dict[str, Any]:
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
    return RopeConfig(scaling=scaling, **values)


_SCALING_KEYS = {"none": (), "linear": ("factor",),
                 "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
                 "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor")}  # fmt: skip


def _write_rope(r: RopeConfig) -> dict[str, Any]:
    kind = {"rope_type": "default" if r.scaling == "none" else r.scaling}
    values = {theirs: getattr(r, _ROPE_KEYS[theirs]) for theirs in _SCALING_KEYS[r.scaling]}
    return {"rope_theta": r.theta, **kind, **{k: v for k, v in values.items() if v is not None}}


def _read_llama(c: Mapping[str, Any]) -> ModelConfig:
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


def _write_llama(m: ModelConfig) -> dict[str, Any]:
    return {"num_hidden_layers": m.num_layers, "hidden_size": m.hidden_size, "num_attention_heads": m.num_heads,
            "num_key_value_heads": m.kv_heads, "head_dim": m.head_size, "intermediate_size": m.ffn,
            "max_position_embeddings": m.max_seq_len, "rope_parameters": _write_rope(m.rope), "rms_norm_eps": m.norm_eps,
            "hidden_act": "silu", "attention_bias": m.bias, "mlp_bias": m.bias}  # fmt: skip


_OUTSIDE_LLAMA = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
_LLAMA_NAMES = {"attention_norm": "input_layernorm", "attention.q": "self_attn.q_proj", "attention.k": "self_attn.k_proj",
                "attention.v": "self_attn.v_proj", "attention.out": "self_attn.o_proj", "mlp_norm": "post_attention_layernorm",
                "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj", **_OUTSIDE_LLAMA}  # fmt: skip
_LLAMA_NEEDS = {"position": ("rope",), "norm": ("rmsnorm",), "norm_place": ("pre",), "mlp": ("swiglu",), "sliding_window": (None,),
                "qkv_bias": (None,)}  # fmt: skip

GPT2 = Family(
    "gpt2", "GPT2LMHeadModel",
    {"position": ("learned",), "norm": ("layernorm",), "norm_place": ("pre",), "mlp": ("gelu_tanh", "gelu", "silu"),
     "bias": (True,), "qkv_bias": (None, True), "qk_norm": (False,),
     "sliding_window": (None,), "num_kv_heads": (None,), "head_dim": (None,)},
    _read_gpt2, _write_gpt2, "transformer.h.",
    {"attention_norm": "ln_1", "attention.q": "attn.q", "attention.k": "attn.k", "attention.v": "attn.v",
     "attention.out": "attn.c_proj", "mlp_norm": "ln_2", "mlp.up": "mlp.c_fc",
     "mlp.down": "mlp.c_proj", "embed": "transformer.wte", "position": "transformer.wpe",
     "norm": "transformer.ln_f", "head": "lm_head"},
    packed="c_attn", transposed=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"), skip=r"attn\.(masked_)?bias$",
)  # fmt: skip
LLAMA = Family(
    "llama", "LlamaForCausalLM", {**_LLAMA_NEEDS, "qk_norm": (False,)}, _read_llama, _write_llama, "model.layers.", _LLAMA_NAMES
)
QWEN3 = Family(
    "qwen3", "Qwen3ForCausalLM", {**_LLAMA_NEEDS, "qk_norm": (True,), "bias": (False,)}, _read_llama, _write_llama, "model.layers.",
    {**_LLAMA_NAMES, "attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm"},
)  # fmt: skip
