"""To and from Hugging Face checkpoints: names, layouts of the same matrices, and config.json. Plain dictionaries; no transformers.

A family is one entry of kind `hf`: its names, the config values it can express, and two functions for config.json. Between
the two worlds stands our own state with separate q, k and v; `split_qkv` and `fuse_qkv` do the grouping by key/value head.
A whole state is converted at once, or group by group (`groups`), so that a model of any size needs the memory of a few tensors.

Legend: O features out, I features in, G key/value heads, R query heads per key/value head, K features of a head.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_scratch import registry
from megatron_scratch.config.model import ModelConfig
from megatron_scratch.models.hf_config import read_gpt2, read_llama, write_gpt2, write_llama
from megatron_scratch.util.errors import UserError, choice

State = dict[str, torch.Tensor]
Shape = tuple[int, ...]


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


@dataclass(frozen=True)
class Group:
    """The same numbers under our names and under theirs, as name -> shape: what can be converted without the rest."""

    ours: Mapping[str, Shape]
    theirs: Mapping[str, Shape]


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
    if cfg.tie_embeddings and "embed.weight" in separate:
        out[_rename("head.weight", family)] = out[_rename("embed.weight", family)]
    return _pack(out, family)


def from_hf(state: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> tuple[ModelConfig, State]:
    """Their state_dict and config.json as our config and state, fp32, vocabulary padded with rows of zeros.

    Raises:
        UserError: an architecture, an option or a tensor that has no place here.
    """
    cfg = read_config(config)
    return cfg, to_ours(state, cfg)


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """Their config.json as our `model` section."""
    choice("config.json: model_type", config.get("model_type"), registry.names("hf"))
    family: Family = registry.get("hf", str(config["model_type"]))  # type: ignore[assignment]
    return family.read_config(config)


def to_ours(state: Mapping[str, torch.Tensor], cfg: ModelConfig) -> State:
    """Their state_dict, or that of some whole groups, as ours."""
    family, out = family_of(cfg), dict[str, torch.Tensor]()
    back = {theirs: ours for ours, theirs in family.names.items()}
    for name, tensor in _unpack(state, family, cfg).items():
        if is_surplus(name, cfg):
            continue
        ours = _rename_back(name, family, back)
        tensor = tensor.float()
        if ours in ("embed.weight", "head.weight"):
            tensor = torch.cat((tensor, tensor.new_zeros(cfg.padded_vocab - tensor.shape[0], tensor.shape[1])))
        out[ours] = tensor
    return fuse_qkv(out, cfg) if cfg.fused_qkv else out


def groups(shapes: Mapping[str, Shape], cfg: ModelConfig) -> list[Group]:
    """A model's parameters (our names), cut into the smallest parts that can be converted alone, in their order.

    q, k and v of a layer go together, as either side may hold them in one tensor. A tied head is not among theirs.
    """
    parts: dict[str, State] = {}
    for name, shape in shapes.items():
        key = re.sub(r"\.attention\.(q|k|v|qkv)\.", ".attention.*.", name)
        parts.setdefault(key, {})[name] = torch.empty(shape, device="meta")
    return [Group(_shapes(part), {n: s for n, s in _shapes(to_hf(part, cfg)).items() if not is_surplus(n, cfg)})
            for part in parts.values()]  # fmt: skip


def _shapes(state: State) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def full_name(name: str, cfg: ModelConfig) -> str:
    """A tensor's name as `state_dict` has it: GPT-2's own files lack the prefix `transformer.`."""
    family = family_of(cfg)
    root = family.prefix.partition(".")[0]
    return name if family.packed is None or name.startswith((f"{root}.", "lm_head.")) else f"{root}.{name}"


def is_surplus(name: str, cfg: ModelConfig) -> bool:
    """Whether a tensor of theirs says nothing: buffers of old checkpoints, the head where it is the embedding."""
    family = family_of(cfg)
    return bool(re.search(family.skip, name)) or (cfg.tie_embeddings and name == _rename("head.weight", family))


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


def _unpack(state: Mapping[str, torch.Tensor], family: Family, cfg: ModelConfig) -> State:
    """The inverse of `_pack`."""
    if family.packed is None:
        return dict(state)
    out: State = {}
    for name, tensor in state.items():
        name = full_name(name, cfg)
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
    read_gpt2, write_gpt2, "transformer.h.",
    {"attention_norm": "ln_1", "attention.q": "attn.q", "attention.k": "attn.k", "attention.v": "attn.v",
     "attention.out": "attn.c_proj", "mlp_norm": "ln_2", "mlp.up": "mlp.c_fc",
     "mlp.down": "mlp.c_proj", "embed": "transformer.wte", "position": "transformer.wpe",
     "norm": "transformer.ln_f", "head": "lm_head"},
    packed="c_attn", transposed=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"), skip=r"\.attn\.(masked_)?bias$",
)  # fmt: skip
LLAMA = Family(
    "llama", "LlamaForCausalLM", {**_LLAMA_NEEDS, "qk_norm": (False,)}, read_llama, write_llama, "model.layers.", _LLAMA_NAMES
)
QWEN3 = Family(
    "qwen3", "Qwen3ForCausalLM", {**_LLAMA_NEEDS, "qk_norm": (True,), "bias": (False,)}, read_llama, write_llama, "model.layers.",
    {**_LLAMA_NAMES, "attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm"},
)  # fmt: skip
