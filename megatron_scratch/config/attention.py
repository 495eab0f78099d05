"""What each attention backend can do, in one table, and the refusals that follow from it before anything starts. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_scratch.util.errors import UserError
from megatron_scratch.util.machine import local_gpus

if TYPE_CHECKING:
    from megatron_scratch.config.model import ModelConfig


@dataclass(frozen=True)
class Capability:
    """What a backend of `model.attention` can do. docs/kernels.md shows this table, and a test compares the two."""

    window: bool = True  # model.sliding_window
    documents: bool = True  # data.mask_documents
    gqa: bool = True  # fewer key/value heads than query heads
    dropout: bool = True
    cpu: bool = True  # forward
    cpu_backward: bool = True
    dense: bool = True  # reads windows and documents from a mask of S x T bits; others have masks of their own, memory linear in T
    dtypes: tuple[str, ...] = ("fp32", "bf16", "fp16", "fp64")
    heads: tuple[int, int, int] = (1, 2**16, 1)  # head sizes: lowest, highest, and what they are multiples of


CAPABLE = {
    "reference": Capability(),
    "sdpa": Capability(),
    "matmul": Capability(dropout=False),
    # torch/nn/attention/flex_attention.py (2.13): no backward on a CPU, no dropout, no fp64; on GPUs no heads below 16
    "flex": Capability(dropout=False, cpu_backward=False, dense=False, dtypes=("fp32", "bf16", "fp16"), heads=(16, 2**16, 1)),
    "flash_attn": Capability(cpu=False, cpu_backward=False, dense=False, dtypes=("bf16", "fp16"), heads=(8, 256, 8)),
    "auto": Capability(),
}


@dataclass(frozen=True)
class Flash:
    """A generation of the flash-attn package (github.com/Dao-AILab/flash-attention)."""

    module: str
    architectures: tuple[int, ...]  # major compute capabilities on which it trains
    dropout: bool
    all_keys: int | None  # how it says that a window has no end


FLASH = {  # in order of preference
    "3": Flash("flash_attn_interface", (9,), False, -1),
    "4": Flash("flash_attn.cute", (9, 10, 11, 12), False, None),  # also runs on 8, but forward only
    "2": Flash("flash_attn", (8, 9, 10, 12), True, -1),
}
GET_FLASH = "pip install 'megatron-scratch[flash-attn]' (4.x: Hopper, Blackwell) or flash-attn (2.x: Ampere and later)"
INSTEAD = "use model.attention=auto"


@cache
def flash_versions() -> tuple[str, ...]:
    """Generations of flash-attn that are installed, the preferred one first. Nothing is imported: each would bring torch."""
    spec = find_spec("flash_attn")
    folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
    there = {
        "2": find_spec("flash_attn_2_cuda") and any((folder / "flash_attn_interface.py").is_file() for folder in folders),
        "3": find_spec("flash_attn_interface"),
        "4": find_spec("cutlass") and any((folder / "cute" / "interface.py").is_file() for folder in folders),
    }
    return tuple(version for version in FLASH if there[version])


def check_attention(m: ModelConfig, precision: str, documents: bool, here: bool) -> None:
    """Refuse a backend that cannot compute this model, or, if `here`, cannot train on this machine. A plugin's is not judged.

    Args:
        precision: name of the section's entry.
        documents: data.mask_documents.
        here: the ranks run on this machine. A cluster's are not judged from here; there the kernels refuse by themselves.

    Raises:
        UserError: one line: what, got, allowed.
    """
    if m.attention not in CAPABLE:
        return
    for problem in _problems(m, precision, documents):
        raise UserError(f"model.attention={m.attention} {problem}")
    if here:
        check_machine(m.attention, m.dropout)


def _problems(m: ModelConfig, precision: str, documents: bool) -> Iterator[str]:
    able = CAPABLE[m.attention]
    low, high, step = able.heads
    if not able.window and m.sliding_window is not None:
        yield f"knows no sliding window, got model.sliding_window={m.sliding_window}; {INSTEAD}"
    if not able.documents and documents:
        yield f"knows no documents, got data.mask_documents=true; {INSTEAD}"
    if not able.gqa and m.kv_heads < m.num_heads:
        yield f"knows no grouped heads, got model.num_kv_heads={m.num_kv_heads}; {INSTEAD}"
    if not able.dropout and m.dropout > 0:
        yield _no_dropout(m.dropout)
    if ("bf16" if precision == "fp8" else precision) not in able.dtypes:  # fp8 is for the matrices of layers
        yield f"computes in {' or '.join(able.dtypes)}, got precision={precision}; give precision=bf16, or {INSTEAD}"
    if not low <= m.head_size <= high or m.head_size % step:
        allowed = f"{low} or more" if high == Capability.heads[1] else f"multiples of {step} from {low} to {high}"
        yield f"wants other heads, got head_dim={m.head_size}; allowed: {allowed}; or {INSTEAD}"


def _no_dropout(dropout_p: float) -> str:
    return f"knows no dropout, got model.dropout={dropout_p}; {INSTEAD}"


def check_dropout(name: str, dropout_p: float) -> None:
    """For a backend itself: the same refusal, in the same words."""
    if dropout_p > 0.0 and not CAPABLE[name].dropout:
        raise UserError(f"model.attention={name} {_no_dropout(dropout_p)}")


def check_machine(name: str, dropout: float = 0.0) -> None:
    """Refuse a backend that cannot train here: a package is missing, or a GPU."""
    able = CAPABLE[name]
    if name == "flash_attn" and not flash_versions():
        raise UserError(f"model.attention=flash_attn: flash-attn is not installed; {GET_FLASH}, or {INSTEAD}")
    if name == "flash_attn" and dropout > 0 and not any(FLASH[version].dropout for version in flash_versions()):
        raise UserError(f"model.attention=flash_attn: of flash-attn only 2.x knows dropout, got model.dropout={dropout} and "
                        f"{' and '.join(flash_versions())}.x; pip install flash-attn, or {INSTEAD}")  # fmt: skip
    if not able.cpu_backward and local_gpus() == 0:
        lacks = "has no backward on a CPU" if able.cpu else "computes on GPUs only"
        raise UserError(f"model.attention={name} {lacks}, and nvidia-smi lists no GPU here; {INSTEAD}")


def wants_dense(name: str) -> bool:
    """Whether a backend reads the written-out mask; a plugin's may."""
    return name not in CAPABLE or CAPABLE[name].dense


def portable(name: str) -> str:
    """The backend itself where a CPU can train with it, else `auto`: for a run that is looked at on another machine."""
    return name if name not in CAPABLE or CAPABLE[name].cpu_backward else "auto"
