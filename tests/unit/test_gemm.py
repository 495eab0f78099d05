"""oneDNN's products against torch's own, values and gradients; and the choice between the two."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_scratch.models import gemm


@pytest.fixture(params=[True, False], ids=["onednn", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch was built without oneDNN")
    monkeypatch.setattr(gemm, "onednn_is_faster", lambda: request.param)
    return request.param


def _relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.detach().double() - want).norm() / want.norm())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 5, 24), (7, 24), (1, 1, 24)])
def test_values_and_gradients(way: bool, bias: bool, shape: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(0)
    x, w, b, dy = (torch.randn(s, generator=g) for s in (shape, (16, 24), (16,), (*shape[:-1], 16)))
    wide = [t.double().requires_grad_() for t in (x, w, b)]
    F.linear(wide[0], wide[1], wide[2] if bias else None).backward(dy.double())
    narrow = [t.requires_grad_() for t in (x, w, b)]
    y = gemm.linear(narrow[0], narrow[1], narrow[2] if bias else None)
    y.backward(dy)
    # fp32 rounds each of 24 products and sums to 2^-24: a relative error of a few 1e-7
    assert _relative(y, F.linear(wide[0], wide[1], wide[2] if bias else None).detach()) < 1e-6
    for got, want in zip(narrow[: 3 if bias else 2], wide, strict=False):
        assert got.grad is not None and want.grad is not None and _relative(got.grad, want.grad) < 1e-6
    assert bias or narrow[2].grad is None


def test_products_of_transposed_views(way: bool) -> None:
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(12, 7, generator=g), torch.randn(12, 9, generator=g)
    torch.testing.assert_close(gemm.product(a.t(), b.t()), a.t() @ b, rtol=1e-5, atol=1e-5)


def test_only_what_needs_a_gradient_gets_one(way: bool) -> None:
    x, w = torch.ones(2, 4), torch.ones(3, 4, requires_grad=True)
    gemm.linear(x, w).sum().backward()
    assert x.grad is None and torch.equal(w.grad, torch.full((3, 4), 2.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_torchs(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "onednn_is_faster", lambda: True)
    x, w = torch.randn(2, 4).to(dtype), torch.randn(3, 4).to(dtype)
    assert torch.equal(gemm.linear(x, w), F.linear(x, w))


@pytest.mark.full
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_blocks_give_the_same_loss(precision: str) -> None:
    from megatron_scratch.config import compose
    from megatron_scratch.parallel import SINGLE
    from megatron_scratch.train import build

    losses = []
    for compiled in (False, True):
        cfg = compose.load(["model=llama_tiny", "model.vocab_size=64", f"precision={precision}", f"train.compile={compiled}"])
        _, engine = build.build_engine(cfg, SINGLE)
        ids = torch.randint(0, 64, (2, 33), generator=torch.Generator().manual_seed(0))
        loss = engine.forward(ids[:, :-1], ids[:, 1:].contiguous(), None, None) / 64
        engine.backward(loss)
        losses.append((loss.item(), engine.norm().item()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5 if precision == "fp32" else 1e-2)
