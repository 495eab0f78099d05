"""Norms, MLPs, positions and the objective, each against torch, transformers or its formula."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from megatron_scratch import registry
from megatron_scratch.config.model import ModelConfig, RopeConfig
from megatron_scratch.models import cross_entropy_sum, linear_cross_entropy_sum
from megatron_scratch.models.positions import rotate
from megatron_scratch.parallel import SINGLE, materialize
from megatron_scratch.util.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def built(kind: str, name: str, *args: object) -> torch.nn.Module:
    module = registry.get(kind, name)(*args)
    materialize(module, 1, CPU)
    return module


def config(**changes: object) -> ModelConfig:
    return ModelConfig(**{"vocab_size": 100, "num_layers": 2, "hidden_size": 32, "num_heads": 4, "max_seq_len": 16, **changes})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rmsnorm_and_its_gradients(dtype: torch.dtype) -> None:
    norm = built("norm", "rmsnorm", 32, 1e-5, False, SINGLE)
    x = torch.randn(3, 5, 32).mul_(4).to(dtype).requires_grad_()
    torch.nn.init.normal_(norm.weight, 1.0, 0.3)
    grad = torch.randn(3, 5, 32).to(dtype)
    got = [norm(x), *torch.autograd.grad(norm(x), (x, norm.weight), grad)]
    xd, wd = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    y = F.rms_norm(xd, (32,), wd, 1e-5)
    want = [y, *torch.autograd.grad(y, (xd, wd), grad.double())]
    plain = F.rms_norm(x, (32,), norm.weight.to(dtype), 1e-5)
    plain = [plain, *torch.autograd.grad(plain, (x, norm.weight), grad)]
    for ours, exact, torchs in zip(got, want, plain, strict=True):
        twice = 2 * (torchs.double() - exact).norm() + 1e-6 * exact.norm()
        assert bool((ours.double() - exact).norm() <= twice)
    assert got[0].dtype == dtype and got[2].dtype == torch.float32


def test_layernorm_bias_on_request() -> None:
    x = torch.randn(2, 3, 32)
    for bias in (True, False):
        norm = built("norm", "layernorm", 32, 1e-5, bias, SINGLE)
        assert (norm.bias is not None) == bias
        torch.testing.assert_close(norm(x), F.layer_norm(x, (32,)))


MLPS = {
    "gelu": lambda g, u: F.gelu(u), "gelu_tanh": lambda g, u: F.gelu(u, approximate="tanh"),
    "silu": lambda g, u: u * torch.sigmoid(u), "relu2": lambda g, u: u.clamp(min=0) ** 2,
    "swiglu": lambda g, u: F.silu(g) * u, "geglu": lambda g, u: F.gelu(g) * u,
}  # fmt: skip


@pytest.mark.parametrize("name", registry.names("mlp"))
def test_mlp_is_its_formula(name: str) -> None:
    mlp = built("mlp", name, config(bias=True, ffn_size=48), SINGLE)
    x = torch.randn(2, 3, 32)
    gate = mlp.gate(x) if hasattr(mlp, "gate") else None
    torch.testing.assert_close(mlp(x), mlp.down(MLPS[name](gate, mlp.up(x))))


SCALINGS = {
    "none": ({"rope_type": "default"}, {}),
    "linear": ({"rope_type": "linear", "factor": 4.0}, {"factor": 4.0}),
    "llama3": ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64}, {"factor": 8.0, "original_max_seq_len": 64}),
    "yarn": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0, "beta_slow": 2.0},
             {"factor": 4.0, "original_max_seq_len": 64, "beta_fast": 16.0, "beta_slow": 2.0}),
}  # fmt: skip


@pytest.mark.parametrize("scaling", registry.names("rope_scaling"))
def test_rope_tables_equal_transformers(scaling: str) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    theirs, ours = SCALINGS[scaling]
    rope_parameters = {"rope_theta": 1e4, **theirs}
    hf = LlamaConfig(hidden_size=256, num_attention_heads=4, max_position_embeddings=256, rope_parameters=rope_parameters)
    positions = torch.arange(256).unsqueeze(0)
    cos, sin = LlamaRotaryEmbedding(hf)(torch.zeros(1), positions)
    rope = built("position", "rope", config(hidden_size=256, rope=RopeConfig(scaling=scaling, **ours)), SINGLE)
    got_cos, got_sin = rope.rotation(positions, torch.float32)
    torch.testing.assert_close(got_cos[:, :, 0], cos[..., :32], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got_sin[:, :, 0], sin[..., :32], rtol=1e-6, atol=1e-6)


def test_yarn_attention_factor_can_be_given() -> None:
    _, factor = registry.get("rope_scaling", "yarn")(RopeConfig(factor=4.0), 64)
    assert factor == pytest.approx(0.1 * math.log(4.0) + 1.0)
    assert registry.get("rope_scaling", "yarn")(RopeConfig(factor=4.0, attention_factor=1.5), 64)[1] == 1.5


def test_rotation_depends_on_distance_only() -> None:
    rope = built("position", "rope", config(), SINGLE)
    q, k = torch.randn(2, 1, 1, 1, 8)
    at = [rope.rotation(torch.tensor([[p]]), torch.float32) for p in (3, 7, 10, 14)]
    near = [(rotate(q, at[i + 1]) * rotate(k, at[i])).sum() for i in (0, 2)]
    torch.testing.assert_close(*near)


def test_sinusoidal_is_the_papers() -> None:
    sinusoidal = built("position", "sinusoidal", config(), SINGLE)
    wave = sinusoidal.add(torch.zeros(1, 16, 32), torch.arange(16).unsqueeze(0))[0]
    for p, i in ((0, 0), (5, 3), (15, 15)):
        angle = p / 10000 ** (2 * i / 32)
        assert wave[p, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-5)
        assert wave[p, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-5)


def test_learned_table_has_an_end_and_the_others_have_none() -> None:
    with pytest.raises(UserError, match="position 16 is beyond the learned table of model.max_seq_len=16"):
        built("position", "learned", config(), SINGLE).check(16)
    for name in ("rope", "sinusoidal", "none"):
        built("position", name, config(), SINGLE).check(10**6)


LABELS = torch.tensor([[3, -100, 49, 0, 7], [-100, -100, 1, 2, 12]])


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("chunk", [1, 3, 10, None])
def test_chunked_cross_entropy_equals_the_plain_one(chunk: int | None, z_loss: float) -> None:
    hidden = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 8, dtype=torch.float64, requires_grad=True)
    plain, count = cross_entropy_sum(hidden @ weight.t(), LABELS, z_loss)
    fast, fast_count = linear_cross_entropy_sum(hidden, weight, LABELS, z_loss, chunk)
    assert int(count) == int(fast_count) == 7
    want = [plain, *torch.autograd.grad(plain / 7, (hidden, weight))]
    got = [fast, *torch.autograd.grad(fast / 7, (hidden, weight))]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_chunked_cross_entropy_in_bf16_is_as_good_as_the_plain_one() -> None:
    hidden, weight = torch.randn(64, 32), torch.randn(300, 32) * 0.2
    labels = torch.randint(0, 300, (64,))

    def run(loss, h: torch.Tensor) -> list[torch.Tensor]:
        h, w = h.detach().requires_grad_(), weight.detach().requires_grad_()
        total = loss(h, w)
        return [total, *torch.autograd.grad(total, (h, w))]

    exact = run(lambda h, w: cross_entropy_sum(h @ w.t(), labels)[0], hidden)
    plain = run(lambda h, w: cross_entropy_sum(h @ w.to(h.dtype).t(), labels)[0], hidden.bfloat16())
    fast = run(lambda h, w: linear_cross_entropy_sum(h, w, labels, chunk=20)[0], hidden.bfloat16())
    for got, twin, want in zip(fast, plain, exact, strict=True):
        assert bool((got - want).norm() <= 2 * (twin - want).norm() + 1e-6 * want.norm())


def test_all_labels_ignored_is_a_zero_loss() -> None:
    loss, count = linear_cross_entropy_sum(torch.randn(1, 2, 8), torch.randn(50, 8), torch.full((1, 2), -100))
    assert float(loss) == 0.0 and int(count) == 0
