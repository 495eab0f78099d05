"""FlashAttention (arXiv 2205.14135, 2307.08691, 2407.08608) by the flash-attn package, generations 2, 3 and 4 behind one function.

All three offer `flash_attn_func(q, k, v, causal=, window_size=)` and `flash_attn_varlen_func` for sequences of different lengths
laid end to end, align causality to the last key, and count a window as (keys before, keys after) the query's own.

Legend: B batch, S queries, T keys (the queries are the last S of them), H query heads, G key/value heads, K features of a head,
N = B S tokens, C documents of the batch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from megatron_scratch.config import attention
from megatron_scratch.config.attention import FLASH, GET_FLASH, INSTEAD
from megatron_scratch.models.attend_fused import is_fake, shapes_of_fused
from megatron_scratch.util.errors import UserError

if TYPE_CHECKING:
    from megatron_scratch.models.attend import AttendMask


def flash_attn(
    q_BSHK: torch.Tensor, k_BTGK: torch.Tensor, v_BTGK: torch.Tensor, mask: AttendMask, dropout_p: float = 0.0
) -> torch.Tensor:
    """Memory linear in T, windows and documents included.

    Raises:
        UserError: no GPU, another dtype than bf16 and fp16, no flash-attn for this GPU (or, with dropout, none that knows it).
    """
    if is_fake(q_BSHK):
        return shapes_of_fused(q_BSHK, k_BTGK, v_BTGK)
    return _flash(q_BSHK, k_BTGK, v_BTGK, mask, dropout_p)


@torch.compiler.disable  # the kernels are not PyTorch's, and generation 4 compiles its own
def _flash(q_BSHK: torch.Tensor, k_BTGK: torch.Tensor, v_BTGK: torch.Tensor, mask: AttendMask, dropout_p: float) -> torch.Tensor:
    version, problem = choose(q_BSHK.device, q_BSHK.dtype, dropout_p)
    if problem:
        raise UserError(f"model.attention=flash_attn: {problem}; {INSTEAD}")
    flash = FLASH[version]
    package, every = import_module(flash.module), flash.all_keys
    options: dict[str, Any] = {"causal": True, "window_size": (every, every) if mask.window is None else (mask.window - 1, 0)}
    if flash.dropout:
        options["dropout_p"] = dropout_p
    if mask.documents_BT is None:
        out = package.flash_attn_func(q_BSHK, k_BTGK, v_BTGK, **options)
    else:
        assert mask.queries == mask.keys, "documents and a cache do not go together"
        starts_C, longest = mask.once("varlen", lambda: document_starts(mask.documents_BT))
        options |= {"cu_seqlens_q": starts_C, "cu_seqlens_k": starts_C, "max_seqlen_q": longest, "max_seqlen_k": longest}
        out = package.flash_attn_varlen_func(*(x.flatten(0, 1) for x in (q_BSHK, k_BTGK, v_BTGK)), **options)
    out = out[0] if isinstance(out, tuple) else out  # generation 4, and old ones of 3: (out, log-sum-exp)
    return out.view(q_BSHK.shape)  # type: ignore[no-any-return]


def choose(device: torch.device, dtype: torch.dtype, dropout_p: float = 0.0) -> tuple[str, str]:
    """(generation, "") of flash-attn to use, or ("", why there is none)."""
    if dtype not in (torch.bfloat16, torch.float16):
        return "", f"it computes in bf16 or fp16, got {dtype}"
    if not attention.flash_versions():
        return "", f"flash-attn is not installed; {GET_FLASH}"
    major = architecture(device)
    if major == 0:
        return "", f"it computes on NVIDIA GPUs only, and this process has {device.type}"
    able = [v for v in attention.flash_versions() if major in FLASH[v].architectures and (FLASH[v].dropout or dropout_p == 0.0)]
    needs = f"compute capability {major}.x" + (" and dropout" if dropout_p else "")
    return (able[0], "") if able else ("", f"of flash-attn {' and '.join(attention.flash_versions())} none is for {needs}")


def architecture(device: torch.device) -> int:
    """Major compute capability of a GPU, 0 for anything else."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def document_starts(documents_BT: torch.Tensor | None) -> tuple[torch.Tensor, int]:
    """Where documents start in the flattened batch, int32 (C + 1,) with N at the end, and the longest one's length.

    A document is a run of one number in a row. Waits for the device twice, once per forward and not once per layer.
    """
    assert documents_BT is not None
    starts_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    starts_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    end = torch.full((1,), documents_BT.numel(), dtype=torch.int32, device=documents_BT.device)
    starts_C = torch.cat([starts_BT.flatten().nonzero().flatten().int(), end])
    longest, falls = torch.stack([starts_C.diff().max(), (documents_BT.diff(dim=1) < 0).any().int()]).tolist()
    assert not falls, "document numbers rise along a row (data/loader.py): a number that comes back would be another document"
    return starts_C, longest
