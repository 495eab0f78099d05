"""The `data` section: tokens on disk to batches."""

from __future__ import annotations

import re
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
    valid_sets: dict[str, str] = field(default_factory=dict)  # NAME -> folder (its valid split) or prefix: more to evaluate on
    blend: list[str] = field(default_factory=list)  # [PATH:WEIGHT, ...] of folders or prefixes, instead of dir
    tokenizer: Optional[str] = None  # a tokenizer file; None: the one in the folder
    order: str = "documents"  # documents: shuffled anew each epoch, then cut; contiguous: windows as they lie; megatron: its own
    megatron_samples: Optional[int] = None  # order=megatron: samples of the whole run, consumed ones too; they decide the order
    megatron_split: Optional[str] = None  # order=megatron: its --split, "969,30,1": train on the first part of each file
    consumed: int = 0  # samples that were taken before step 0, by the run that this one goes on from
    mask_documents: bool = False  # attention does not cross documents, positions restart
    mask_eod: bool = True  # the first token of a document is not predicted from the end of the one before
    check_ids: bool = True  # refuse a token id beyond the vocabulary, in every batch


def check_data(d: DataConfig) -> None:
    given = [key for key, value in (("dir", d.dir), ("train", d.train), ("blend", d.blend)) if value]
    if len(given) > 1:
        raise UserError(f"data.{' and data.'.join(given)} are both given; give one of data.dir, data.train, data.blend")
    choice("data.order", d.order, registry.names("sample_order"))
    for key in ("megatron_samples", "megatron_split"):
        if getattr(d, key) is not None and d.order != "megatron":
            raise UserError(f"data.{key}={getattr(d, key)} is given and data.order={d.order} does not read it; leave it out, or "
                            "give data.order=megatron")  # fmt: skip
    if d.consumed < 0 or (d.megatron_samples is not None and d.megatron_samples <= d.consumed):
        raise UserError(f"data.consumed={d.consumed} must be at least 0 and below data.megatron_samples={d.megatron_samples}")
    split_fraction(d.megatron_split)
    blend_parts(d)
    check_valid_sets(d)


def check_valid_sets(d: DataConfig) -> None:
    """A name becomes a part of the names of its metrics: `val_loss/NAME`."""
    for name, path in d.valid_sets.items():
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
            raise UserError(f"data.valid_sets has the name {name!r}; allowed: letters, digits and . _ - alone, e.g. "
                            "data.valid_sets.wiki=PREFIX")  # fmt: skip
        if not path:
            raise UserError(f"data.valid_sets.{name} is empty; give a dataset folder or a Megatron prefix, or leave it out")


def fill_samples(d: DataConfig, run: int) -> None:
    """Where data.order=megatron is not told data.megatron_samples: those that are consumed and the `run` samples of this run."""
    if d.order != "megatron":
        return
    need = d.consumed + run
    d.megatron_samples = need if d.megatron_samples is None else d.megatron_samples
    if d.megatron_samples < need:
        raise UserError(f"data.megatron_samples={d.megatron_samples} are fewer than data.consumed={d.consumed} and the {run} "
                        f"of this run; allowed: {need} or more; another number may reshuffle it from its beginning")  # fmt: skip


def split_fraction(split: str | None) -> float:
    """The training part of Megatron's --split: "969,30,1" -> 0.969. None is the whole."""
    if split is None:
        return 1.0
    try:
        parts = [float(part) for part in split.split(",")]
    except ValueError:
        parts = []
    if not 1 <= len(parts) <= 3 or not all(0 <= part < float("inf") for part in parts) or not parts[0] > 0:
        raise UserError(f"data.megatron_split={split!r}; allowed: up to three numbers, the first above 0, as Megatron's --split: "
                        '"969,30,1"')  # fmt: skip
    parts += [0.0] * (3 - len(parts))  # numpy's sum of three adds them in this order
    return parts[0] / (parts[0] + parts[1] + parts[2])


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
