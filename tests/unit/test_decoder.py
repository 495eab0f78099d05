"""The assembled model: cache, documents, windows, init, dtype, names, and the parameter and FLOP counts."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_scratch.config.model import ModelConfig
from megatron_scratch.models import Decoder, KVCache, count_parameters, cross_entropy_sum, flops_per_token
from megatron_scratch.parallel import SINGLE, materialize
from megatron_scratch.parallel.layout import init_rows, normal
from megatron_scratch.train.objective import LanguageModel
from megatron_scratch.util.errors import UserError

CPU = torch.device("cpu")
SIZES = {"vocab_size": 100, "num_layers": 2, "hidden_size": 32, "num_heads": 4, "max_seq_len": 32}
VARIANTS = {
    "llama": {"num_kv_heads": 2},
    "scratch": {"position": "learned", "mlp": "silu"},
    "gpt2": {"position": "learned", "norm": "layernorm", "mlp": "gelu_tanh", "bias": True, "tie_embeddings": True},
    "qwen3": {"num_kv_heads": 1, "head_dim": 16, "qk_norm": True, "fused_qkv": False, "tie_embeddings": True},
    "post": {"norm_place": "post", "position": "sinusoidal", "norm": "layernorm", "mlp": "relu2", "qkv_bias": True},
    "window": {"sliding_window": 5, "position": "none", "mlp": "geglu"},
}


def model(**changes: object) -> Decoder:
    decoder = Decoder(ModelConfig(**{**SIZES, **changes}), SINGLE)
    materialize(decoder, 7, CPU)
    return decoder.eval()


def tokens(batch: int = 2, seq: int = 20) -> torch.Tensor:
    return torch.randint(0, 100, (batch, seq), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_cache_gives_the_logits_of_the_full_forward(name: str) -> None:
    decoder, ids = model(**VARIANTS[name]), tokens()
    full = decoder.logits(decoder(ids))
    cache = KVCache(decoder.cfg, 2, 20, CPU, torch.float32)
    pieces = [decoder(part, cache=cache) for part in ids.split([9, 6, 1, 1, 3], dim=1)]
    torch.testing.assert_close(decoder.logits(torch.cat(pieces, 1)), full, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="room for 20 tokens, 20 are taken and 1 more"):
        decoder(ids[:, :1], cache=cache)


@pytest.mark.parametrize("name", VARIANTS)
def test_counts_are_those_of_the_built_model(name: str) -> None:
    decoder = model(**VARIANTS[name])
    padding = (decoder.cfg.padded_vocab - 100) * 32 * (1 if decoder.cfg.tie_embeddings else 2)
    assert count_parameters(decoder.cfg).total == sum(p.numel() for p in decoder.parameters()) - padding


@pytest.mark.parametrize("name", ["llama", "scratch", "qwen3"])
@torch.no_grad()
def test_documents_are_separate_sequences(name: str) -> None:
    decoder, ids = model(**VARIANTS[name]), tokens(1)
    documents = torch.tensor([[0] * 6 + [1] * 9 + [2] * 5])
    positions = torch.cat([torch.arange(n) for n in (6, 9, 5)]).unsqueeze(0)
    packed = decoder(ids, positions, documents)
    alone = torch.cat([decoder(part) for part in ids.split([6, 9, 5], dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_window_hides_what_is_before_it() -> None:
    decoder, ids = model(sliding_window=4, num_layers=1), tokens(1)
    changed = ids.clone()
    changed[0, 3] = (changed[0, 3] + 1) % 100
    same = (decoder(ids) == decoder(changed)).all(-1)[0]
    assert [i for i, equal in enumerate(same.tolist()) if not equal] == [3, 4, 5, 6]


@pytest.mark.parametrize("backend", ["reference", "sdpa", "matmul"])
def test_backends_give_the_same_loss_and_gradients(backend: str) -> None:
    def run(attention: str) -> list[torch.Tensor]:
        decoder, ids = model(attention=attention, num_kv_heads=2), tokens()
        loss, _ = decoder.loss_sum(decoder(ids), ids)
        return [loss, *torch.autograd.grad(loss, list(decoder.parameters()))]

    for got, want in zip(run(backend), run("auto"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_loss_is_that_of_the_logits_and_padding_is_never_likely() -> None:
    decoder, ids = model(), tokens()
    logits = decoder.logits(decoder(ids))
    assert logits.shape == (2, 20, 128) and bool((logits[..., 100:] == -math.inf).all())
    want, count = cross_entropy_sum(logits, ids, 1e-3)
    got, same = decoder.loss_sum(decoder(ids), ids, 1e-3)
    assert int(count) == int(same) == 40
    torch.testing.assert_close(got, want)
    got.backward()
    assert bool((decoder.head.weight.grad[100:] == 0).all())


def test_bf16_compute_keeps_fp32_weights_and_gradients() -> None:
    decoder, ids = model(), tokens()
    exact, _ = decoder.loss_sum(decoder(ids), ids)
    decoder.compute_dtype = torch.bfloat16
    hidden = decoder(ids)
    loss, _ = decoder.loss_sum(hidden, ids)
    loss.backward()
    assert hidden.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in decoder.parameters())
    assert loss.item() == pytest.approx(exact.item(), rel=5e-3)


def test_init_has_the_stated_sizes_and_any_slice_can_be_drawn_alone() -> None:
    decoder = model(hidden_size=128, num_layers=8)
    weights = {name: p.detach() for name, p in decoder.named_parameters()}
    assert float(weights["layers.7.mlp.up.weight"].std()) == pytest.approx(0.02, rel=0.05)
    assert float(weights["layers.7.mlp.down.weight"].std()) == pytest.approx(0.02 / 4, rel=0.05)
    assert float(weights["layers.0.attention.out.weight"].std()) == pytest.approx(0.02 / 4, rel=0.05)
    assert bool((weights["norm.weight"] == 1).all())
    name = "layers.3.attention.qkv.weight"
    part = init_rows(name, tuple(weights[name].shape), normal(0.02), 7, range(70, 200))
    assert torch.equal(part, weights[name][70:200])


def test_names_are_the_contract() -> None:
    names = {name for name, _ in model().named_parameters()}
    parts = ("attention_norm", "attention.qkv", "attention.out", "mlp_norm", "mlp.gate", "mlp.up", "mlp.down")
    layer = {f"layers.1.{part}.weight" for part in parts}
    assert layer | {"embed.weight", "norm.weight", "head.weight"} <= names and len(names) == 2 * len(layer) + 3
    assert "head.weight" not in {name for name, _ in model(tie_embeddings=True).named_parameters()}


def test_dropout_acts_in_training_only() -> None:
    decoder, ids = model(dropout=0.2), tokens()
    assert torch.equal(decoder(ids), decoder(ids)), "no seed, no dropout"
    assert torch.equal(decoder(ids, seed=1), decoder(ids, seed=1)) and not torch.equal(decoder(ids, seed=1), decoder(ids, seed=2))
    whole = LanguageModel(decoder, 0.0)
    losses = {mode: [whole.train(mode)(ids, ids, seed=seed).item() for seed in (1, 2)] for mode in (True, False)}
    assert losses[True][0] != losses[True][1] and losses[False][0] == losses[False][1]


def test_generation_beyond_a_learned_table_is_refused() -> None:
    decoder = model(position="learned")
    with pytest.raises(UserError, match="beyond the learned table"):
        decoder(tokens(1, 33))


def test_flops_by_hand() -> None:
    cfg = ModelConfig(**{**SIZES, "ffn_size": 64, "tie_embeddings": True, "position": "learned"})
    n = 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32 + 100 * 32
    assert flops_per_token(cfg, 10, causal=False) == 6 * n + 12 * 2 * 32 * 10
    assert flops_per_token(cfg, 10, causal=True) == 6 * n + 6 * 2 * 32 * 10
    cfg.sliding_window = 10
    assert flops_per_token(cfg, 10, causal=True) == 6 * n + 6 * 2 * 32 * 10
    assert flops_per_token(cfg, 1000, causal=False) == 6 * n + 12 * 2 * 32 * 10
