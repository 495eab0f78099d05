"""flash-attn by a stand-in: the signatures of generations 2, 3 and 4, in plain torch, with each one's idea of a window."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from shapes import shapes

from megatron_scratch.config import attention
from megatron_scratch.config.attention import FLASH
from megatron_scratch.models import attend, attend_check, attend_flash
from megatron_scratch.models.attend import make_mask, sdpa
from megatron_scratch.models.attend_check import ALLOWED, Case, worst
from megatron_scratch.util.errors import UserError

CPU = torch.device("cpu")
SHAPES = shapes((1, 7, 129), (16,))


def _kernel(q, k, v, causal, window, cu, p=0.0):  # type: ignore[no-untyped-def]
    """One sequence after the other, as github.com/Dao-AILab/flash-attention documents it: keys from i - left to i + right."""
    assert causal and q.dtype in (torch.bfloat16, torch.float16)
    if cu is None:
        return torch.stack([_one(*qkv, window, p) for qkv in zip(q, k, v, strict=True)])
    (cu_q, longest_q), (cu_k, longest_k) = cu
    assert cu_q.dtype == cu_k.dtype == torch.int32 and longest_q == int(cu_q.diff().max()) and longest_k == int(cu_k.diff().max())
    assert q.dim() == 3 and int(cu_q[-1]) == len(q) and int(cu_q[0]) == 0
    spans = [(slice(*a), slice(*b)) for a, b in zip(cu_q.unfold(0, 2, 1).tolist(), cu_k.unfold(0, 2, 1).tolist(), strict=True)]
    return torch.cat([_one(q[a], k[b], v[b], window, p) for a, b in spans])


def _one(q, k, v, window, p):  # type: ignore[no-untyped-def]
    left, right = window
    at, key = torch.arange(len(k) - len(q), len(k)).unsqueeze(1), torch.arange(len(k))
    seen = (key <= at) & (key >= at - (len(k) if left is None or left < 0 else left))
    seen &= key <= at + (len(k) if right is None or right < 0 else right)
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    scaled = torch.nn.functional.scaled_dot_product_attention
    return scaled(q, k, v, attn_mask=seen, dropout_p=p, enable_gqa=True).transpose(0, 1)


def package_2() -> dict[str, Callable[..., object]]:
    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                        alibi_slopes=None, deterministic=False, return_attn_probs=False):  # fmt: skip
        return _kernel(q, k, v, causal, window_size, None, dropout_p)

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                               softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
                               deterministic=False, return_attn_probs=False, block_table=None):  # fmt: skip
        cu = (cu_seqlens_q, max_seqlen_q), (cu_seqlens_k, max_seqlen_k)
        return _kernel(q, k, v, causal, window_size, cu, dropout_p)

    return {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func}


def package_3() -> dict[str, Callable[..., object]]:
    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
                        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None,
                        deterministic=False, sm_margin=0, return_attn_probs=False):  # fmt: skip
        return _kernel(q, k, v, causal, window_size, None)

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
                               softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
                               window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None,
                               deterministic=False, sm_margin=0, return_attn_probs=False):  # fmt: skip
        return _kernel(q, k, v, causal, window_size, ((cu_seqlens_q, max_seqlen_q), (cu_seqlens_k, max_seqlen_k)))

    return {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func}


def package_4() -> dict[str, Callable[..., object]]:
    def flash_attn_func(q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None),
                        learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, score_mod=None,
                        score_mod_bwd=None, mask_mod=None, return_lse=False):  # fmt: skip
        return _kernel(q, k, v, causal, window_size, None), None

    def flash_attn_varlen_func(q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
                               min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None,
                               softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0,
                               num_splits=1, pack_gqa=None, deterministic=False, return_lse=False):  # fmt: skip
        return _kernel(q, k, v, causal, window_size, ((cu_seqlens_q, max_seqlen_q), (cu_seqlens_k, max_seqlen_k))), None

    return {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func}


@pytest.fixture(params=["2", "3", "4"])
def generation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """This generation is installed, and the CPU passes for a Hopper GPU."""
    module = ModuleType(FLASH[request.param].module)
    vars(module).update({"2": package_2, "3": package_3, "4": package_4}[request.param]())
    if request.param == "4":
        monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(attention, "flash_versions", lambda: (request.param,))
    monkeypatch.setattr(attend_flash, "architecture", lambda device: 9)
    return request.param


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_flash_attn(generation: str, dtype: torch.dtype) -> None:
    assert not {case: error for case in SHAPES if (error := worst(attend_flash.flash_attn, case, dtype, CPU)) > ALLOWED}


def test_flash_attn_knows_dropout_in_generation_2_only(generation: str) -> None:
    q, k, v, _ = Case(24, 24).tensors(torch.bfloat16, CPU)
    mask = make_mask(24, 24, None, None, CPU)
    if generation == "2":
        torch.manual_seed(0)
        assert float(attend_flash.flash_attn(q, k, torch.ones_like(v), mask, 0.5).std()) > 0.1
    else:
        with pytest.raises(UserError, match=f"of flash-attn {generation} none is for compute capability 9.x and dropout"):
            attend_flash.flash_attn(q, k, v, mask, 0.5)


def test_the_generation_is_chosen_by_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "flash_versions", lambda: ("3", "4", "2"))
    for major, want in ((8, "2"), (9, "3"), (10, "4"), (7, "")):
        monkeypatch.setattr(attend_flash, "architecture", lambda device, major=major: major)
        assert attend_flash.choose(CPU, torch.bfloat16)[0] == want
    monkeypatch.setattr(attend_flash, "architecture", lambda device: 9)
    assert attend_flash.choose(CPU, torch.bfloat16, dropout_p=0.1) == ("2", "")


def test_flash_attn_refuses_what_it_cannot_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = make_mask(7, 7, None, None, CPU)
    for dtype, versions, want in ((torch.float32, ("4",), "bf16 or fp16"), (torch.bfloat16, (), "not installed"),
                                  (torch.bfloat16, ("4",), "GPUs only, and this process has cpu")):  # fmt: skip
        monkeypatch.setattr(attention, "flash_versions", lambda versions=versions: versions)
        with pytest.raises(UserError, match=f"model.attention=flash_attn: .*{want}.*; use model.attention=auto"):
            attend_flash.flash_attn(*Case(7, 7).tensors(dtype, CPU)[:3], mask)


def test_document_starts() -> None:
    starts, longest = attend_flash.document_starts(torch.tensor([[0, 0, 1, 1, 1], [0, 1, 2, 2, 2]]))
    assert starts.tolist() == [0, 2, 5, 6, 7, 10] and starts.dtype == torch.int32 and longest == 3
    with pytest.raises(AssertionError, match="rise along a row"):
        attend_flash.document_starts(torch.tensor([[0, 1, 0]]))


def test_auto_takes_flash_attn_on_a_gpu_where_it_is_right(generation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, gpu, mask = [], torch.device("cuda", 0), make_mask(24, 24, None, None, CPU)
    for right, dtype, head, want in ((True, torch.bfloat16, 64, attend.flash_attn), (False, torch.bfloat16, 64, sdpa),
                                     (True, torch.float32, 64, sdpa), (True, torch.bfloat16, 20, sdpa)):  # fmt: skip
        monkeypatch.setattr(attend_check, "trusted", lambda *args, right=right: asked.append(args) or right)
        assert attend.chosen(gpu, dtype, head, mask) is want
    assert asked == [("flash_attn", gpu, torch.bfloat16, 64)] * 2, "only where it could be taken"
