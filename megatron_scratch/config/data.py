"""The `data` section: tokens on disk to batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from megatron_scratch import registry
from megatron_scratch.util.errors import UserError, choice


@dataclass
class DataConfig:
    """Where the tokens are. A dataset is a folder from `data prepare`, or a Megatron prefix (`PREFIX.bin`, `PREFIX.idx`)."""

    dir: Optional[str] = None  # folder with train.{bin,idx}, valid.{bin,idx}, tokenizer, manifest.json
    train: Optional[str] = None  # Megatron prefix for training, instead of dir
    valid: Optional[str] = None  # Megatron prefix for evaluation
    blend: list[str] = field(default_factory=list)  # [PATH:WEIGHT, ...] of folders or prefixes, instead of dir
    tokenizer: Optional[str] = None  # a tokenizer file; None: the one in the folder
    order: str = "documents"  # documents: shuffled anew each epoch, then cut; contiguous: windows of the file as it lies
    mask_documents: bool = False  # attention does not cross documents, positions restart
    mask_eod: bool = True  # the first token of a document is not predicted from the end of the one before
    check_ids: bool = True  # refuse a token id beyond the vocabulary, in every batch


def check_data(d: DataConfig) -> None:
    given = [key for key, value in (("dir", d.dir), ("train", d.train), ("blend", d.blend)) if value]
    if len(given) > 1:
        raise UserError(f"data.{' and data.'.join(given)} are both given; give one of data.dir, data.train, data.blend")
    choice("data.order", d.order, registry.names("sample_order"))
    blend_parts(d)


def blend_parts(d: DataConfig) -> list[tuple[str, float]]:
    """`data.blend` as (path, weight) pairs."""
    parts = []
    for item in d.blend:
        path, _, weight = item.rpartition(":")
        try:
            number = float(weight)
        except ValueError:
            number = 0.0
        if not path or not 0 < number < float("inf"):
            raise UserError(f"data.blend has {item!r}; allowed: PATH:WEIGHT with a weight above 0, e.g. data/wiki:0.7")
        parts.append((path, number))
    return parts
