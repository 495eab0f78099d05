"""The `data` section (tokens on disk to batches) and the `corpus` section (raw text to tokens on disk)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

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


@dataclass
class CorpusConfig:
    """What `data prepare` reads, how it tokenizes, and where it writes."""

    input: Any = "stdlib"  # files, folders, globs (one or a list); stdlib: the text that every Python installation carries
    output: str = "data/stdlib"
    text_key: str = "text"  # the field of a .jsonl line that holds the document
    tokenizer: str = "sentencepiece_bpe"  # an entry to train, or the path of a .model / .json file to use
    vocab_size: int = 8192
    valid_fraction: float = 0.02
    split: str = "document"  # document: by hash of the text; tail: the last part of the text, as nanoGPT does
    dedup: bool = True  # drop exact copies of a document
    min_chars: int = 1  # shorter documents are dropped
    max_bytes: Optional[int] = None  # stop reading after this many bytes of text
    tokenizer_bytes: int = 20_000_000  # text that the tokenizer is trained on, spread evenly over the corpus
    seed: int = 1234  # order of the documents on disk


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


def check_corpus(c: CorpusConfig) -> None:
    choice("corpus.split", c.split, ("document", "tail"))
    if not 0 <= c.valid_fraction < 1:
        raise UserError(f"corpus.valid_fraction={c.valid_fraction} must be in [0, 1)")
    if c.vocab_size < 2:
        raise UserError(f"corpus.vocab_size={c.vocab_size} must be at least 2")
    if not str(c.tokenizer).endswith((".model", ".json")):
        choice("corpus.tokenizer", c.tokenizer, [*registry.names("tokenizer_trainer"), "PATH.model", "PATH.json"])
