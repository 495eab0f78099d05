"""The same weights give the same logits here and in transformers, and conversion there and back changes nothing."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig, Qwen3Config

from megatron_scratch.config.model import ModelConfig
from megatron_scratch.models import Decoder, KVCache
from megatron_scratch.models.hf import from_hf, fuse_qkv, hf_config, split_qkv, to_hf
from megatron_scratch.parallel import SINGLE, materialize
from megatron_scratch.util.errors import UserError

SMALL = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
         "max_position_embeddings": 64, "attn_implementation": "eager", "initializer_range": 0.2}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
MODELS: dict[str, PretrainedConfig] = {
    "gpt2": GPT2Config(vocab_size=99, n_embd=32, n_layer=3, n_head=4, n_positions=64, attn_implementation="eager",
                       initializer_range=0.2),
    "llama_mha": LlamaConfig(**SMALL, num_key_value_heads=4),
    "llama_gqa_tied": LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=True),
    "llama_bias": LlamaConfig(**SMALL, num_key_value_heads=1, attention_bias=True, mlp_bias=True),
    "llama3_rope": LlamaConfig(**SMALL, num_key_value_heads=2, rope_parameters=LLAMA3),
    "llama_linear": LlamaConfig(**SMALL, num_key_value_heads=2, rope_parameters=LINEAR),
    "llama_yarn": LlamaConfig(**SMALL, num_key_value_heads=2, rope_parameters=YARN),
    "qwen3": Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=16),
    "qwen3_tied": Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True),
}  # fmt: skip


def theirs(config: PretrainedConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():  # biases and norms away from 0 and 1, or a mix-up would not show
        if name.endswith("bias") or "norm" in name or "ln_" in name:
            torch.nn.init.normal_(parameter, float("weight" in name), 0.2)
    return model


def ours(cfg: ModelConfig, state: dict[str, torch.Tensor]) -> Decoder:
    decoder = Decoder(cfg, SINGLE)
    materialize(decoder, 0, torch.device("cpu"))
    decoder.load_state_dict(state)
    return decoder.eval()


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "separate"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_and_round_trip(name: str, fused: bool) -> None:
    model = theirs(MODELS[name])
    cfg, state = from_hf(model.state_dict(), model.config.to_dict())
    if not fused:
        cfg.fused_qkv, state = False, split_qkv(state, cfg)
    decoder = ours(cfg, state)
    tokens = torch.randint(0, 99, (2, 40))
    want = model(tokens).logits
    torch.testing.assert_close(decoder.logits(decoder(tokens))[..., :99], want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    cache = KVCache(cfg, 2, 40, "cpu", torch.float32)
    last = [decoder(part, cache=cache) for part in tokens.split([39, 1], dim=1)][-1]
    torch.testing.assert_close(decoder.logits(last)[..., :99], want[:, -1:], rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    back = to_hf(decoder.state_dict(), cfg)
    assert set(back) == set(model.state_dict())
    assert all(torch.equal(back[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_config_round_trip(name: str) -> None:
    config = MODELS[name].to_dict()
    model, _ = from_hf({}, config)
    written = hf_config(model)
    again, _ = from_hf({}, type(MODELS[name])(**written).to_dict())
    assert again == model


def test_old_style_names_and_rope_keys_are_read() -> None:
    model = theirs(MODELS["gpt2"])
    bare = {name.removeprefix("transformer."): tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    _, state = from_hf(bare, model.config.to_dict())
    _, same = from_hf(model.state_dict(), model.config.to_dict())
    assert state.keys() == same.keys() and all(torch.equal(state[k], same[k]) for k in same)
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    old = {**SMALL, "model_type": "llama", "rope_theta": 5e5, "rope_scaling": scaling}
    rope = from_hf({}, old)[0].rope
    assert (rope.theta, rope.scaling, rope.factor, rope.original_max_seq_len) == (5e5, "llama3", 8.0, 16)


def test_fused_rows_are_grouped_per_kv_head() -> None:
    cfg = ModelConfig(vocab_size=8, hidden_size=8, num_heads=4, num_kv_heads=2, head_dim=1)
    rows = {"q": [0, 1, 2, 3], "k": [10, 11], "v": [20, 21]}
    parts = {f"layers.0.attention.{letter}.weight": torch.tensor(values).unsqueeze(1) for letter, values in rows.items()}
    fused = fuse_qkv(parts, cfg)["layers.0.attention.qkv.weight"]
    assert fused.flatten().tolist() == [0, 1, 10, 20, 2, 3, 11, 21]


@pytest.mark.parametrize(("changes", "message"), [
    ({"norm_place": "post"}, "no Hugging Face architecture has this model: gpt2 cannot .*; llama cannot have norm_place='post'"),
    ({"mlp": "relu2"}, "llama cannot have mlp='relu2'"),
])  # fmt: skip
def test_what_no_family_has_is_refused(changes: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        hf_config(ModelConfig(vocab_size=8, **changes))


def test_what_has_no_place_here_is_refused() -> None:
    with pytest.raises(UserError, match=r"model_type='mamba' is not known; allowed: gpt2, llama, qwen3"):
        from_hf({}, {"model_type": "mamba"})
    with pytest.raises(UserError, match="'model.layers.0.extra.weight' has no place"):
        from_hf({"model.layers.0.extra.weight": torch.ones(1)}, MODELS["llama_mha"].to_dict())
    with pytest.raises(UserError, match="rope_type='dynamic' is not known"):
        from_hf({}, {**SMALL, "model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}})
