"""Every attention backend against `reference`, forward and backward, under every mask; the cache against the full forward."""

from __future__ import annotations

import pytest
import torch

from megatron_scratch import registry
from megatron_scratch.models import attend
from megatron_scratch.models.attend import make_mask, reference, sdpa
from megatron_scratch.util.errors import UserError

BACKENDS = [name for name in registry.names("attention") if name != "reference"]
HEADS = [(4, 4, 16), (4, 2, 16), (6, 1, 8)]  # H, G, K
MASKS = ["causal", "window", "documents", "window+documents"]
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 14 + [2] * 5, [0] * 24])


def tensors(heads: tuple[int, int, int], dtype: torch.dtype, seq: int = 24) -> list[torch.Tensor]:
    h, g, k = heads
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, seq, n, k, generator=generator).to(dtype) for n in (h, g, g, h)]


def mask_of(kind: str, seq: int = 24) -> attend.AttendMask:
    return make_mask(seq, seq, 7 if "window" in kind else None, DOCUMENTS if "documents" in kind else None, torch.device("cpu"))


def run(backend, inputs: list[torch.Tensor], mask: attend.AttendMask) -> list[torch.Tensor]:
    *qkv, grad = inputs
    qkv = [x.detach().clone().requires_grad_() for x in qkv]
    out = backend(*qkv, mask, 0.0)
    return [out.detach(), *torch.autograd.grad(out, qkv, grad)]


def error(got: list[torch.Tensor], want: list[torch.Tensor]) -> list[float]:
    return [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(got, want, strict=True)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attend, "BLOCK", 10)  # 24 queries in blocks of 10, 10 and 4


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_backend_equals_reference_fp32(name: str, heads: tuple[int, int, int], kind: str) -> None:
    inputs, mask = tensors(heads, torch.float32), mask_of(kind)
    assert max(error(run(registry.get("attention", name), inputs, mask), run(reference, inputs, mask))) < 2e-6


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_bf16_error_is_at_most_twice_that_of_sdpa(name: str, heads: tuple[int, int, int], kind: str) -> None:
    inputs, mask = tensors(heads, torch.bfloat16), mask_of(kind)
    exact = run(reference, [x.float() for x in inputs], mask)
    yardstick = error(run(sdpa, inputs, mask), exact)
    for got, allowed in zip(error(run(registry.get("attention", name), inputs, mask), exact), yardstick, strict=True):
        assert got <= 2.0 * max(allowed, 1.7e-3)  # 1.7e-3: one rounding to bf16


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("name", BACKENDS)
def test_last_queries_of_longer_keys(name: str, queries: int) -> None:
    q, k, v, _ = tensors((4, 2, 16), torch.float32)
    full = reference(q, k, v, mask_of("causal"))
    out = registry.get("attention", name)(q[:, -queries:], k, v, make_mask(queries, 24, None, None, q.device), 0.0)
    torch.testing.assert_close(out, full[:, -queries:], rtol=1e-5, atol=1e-6)


def test_matmul_gradients_in_fp64() -> None:
    q, k, v, _ = (x.requires_grad_() for x in tensors((4, 2, 4), torch.float64, seq=12))
    mask = make_mask(12, 12, 5, None, q.device)
    assert torch.autograd.gradcheck(lambda q, k, v: attend.matmul(q, k, v, mask), (q[:1], k[:1], v[:1]))


def test_mask_says_who_sees_whom() -> None:
    mask = mask_of("window+documents")
    for q in range(24):
        for k in range(24):
            want = k <= q < k + 7 and bool(DOCUMENTS[0, q] == DOCUMENTS[0, k])
            assert bool(mask.allowed_BST[0, q, k]) == want


def test_a_window_as_long_as_the_sequence_is_plain_causal() -> None:
    assert make_mask(24, 24, 24, None, torch.device("cpu")).causal
    assert not make_mask(24, 24, 23, None, torch.device("cpu")).causal


def test_matmul_refuses_dropout() -> None:
    with pytest.raises(UserError, match="attention=matmul knows no dropout, got model.dropout=0.5; use model.attention=auto"):
        attend.matmul(*tensors((4, 4, 16), torch.float32)[:3], mask_of("causal"), 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["auto", "reference", "sdpa"])
def test_dropout_scales_what_it_keeps(name: str, dtype: torch.dtype) -> None:
    q, k, _, _ = tensors((4, 4, 16), dtype)
    torch.manual_seed(0)
    out = registry.get("attention", name)(q, k, torch.ones_like(k), mask_of("causal"), 0.5)
    assert abs(float(out.mean()) - 1.0) < 0.1 and float(out.std()) > 0.1
