"""What a tokenizer is like on the corpus: small numbers for the manifest.

    bytes_per_token   of text, UTF-8, without EOD; more is better: it is how much text a context holds
    tokens_per_word   tokens for each run of letters, digits and underscores (`\\w+`); 1.3 is usual for English
    unused_ids        ids that stand for text and are in no document; the embedding of each is memory that learns nothing
    longest           the longest tokens of the vocabulary, which show what should have been cleaned away

All are taken from the datasets as they were written, so they are the same for any sharding.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_scratch.data.indexed import IndexedDataset
from megatron_scratch.data.tokenizer import Tokenizer

WORD = re.compile(r"\w+")
DOCUMENTS, TOKENS = 1000, 500_000  # of the sample of each side
LONGEST = 10  # tokens that are named
SHOWN = 80  # characters of each


def report(tokenizer: Tokenizer, samples: dict[str, Iterable[np.ndarray]], used: np.ndarray | None = None) -> dict[str, Any]:
    """`tokenizer.report` of the manifest.

    Args:
        samples: side -> documents as ids.
        used: (vocab_size,) bool, what was encoded anywhere; None: what is in the samples.
    """
    seen = np.zeros(tokenizer.vocab_size, bool)
    sides = {side: _side(tokenizer, documents, seen) for side, documents in samples.items()}
    idle = (tokenizer.bytes_per_id > 0) & ~(seen if used is None else used)
    return {**sides, "unused_ids": int(idle.sum()), "longest": longest(tokenizer)}


def _side(tokenizer: Tokenizer, documents: Iterable[np.ndarray], seen: np.ndarray) -> dict[str, Any]:
    count = tokens = size = words = 0
    for ids in documents:
        ids = ids[tokenizer.bytes_per_id[ids] > 0]  # without EOD
        seen[ids] = True
        text = b"".join([tokenizer.pieces[i] for i in ids.tolist()]).decode("utf-8", "replace")
        count, tokens, size = count + 1, tokens + len(ids), size + int(tokenizer.bytes_per_id[ids].sum())
        words += sum(1 for _ in WORD.finditer(text))
    return {"documents": count, "bytes_per_token": _ratio(size, tokens), "tokens_per_word": _ratio(tokens, words)}


def _ratio(a: int, b: int) -> float | None:
    return round(a / b, 4) if b else None


def longest(tokenizer: Tokenizer) -> list[str]:
    """The longest tokens, by bytes, as Python would print them; a very long one is cut."""
    order = np.argsort(-tokenizer.bytes_per_id, kind="stable")[:LONGEST]
    return [_shown(tokenizer.pieces[i]) for i in order.tolist() if tokenizer.pieces[i]]


def _shown(piece: bytes) -> str:
    text = piece.decode("utf-8", "backslashreplace")
    return repr(text) if len(text) <= SHOWN else f"{text[:SHOWN]!r} and {len(text) - SHOWN} characters more"


def written(prefix: str | Path) -> Iterator[np.ndarray]:
    """Up to 1,000 documents of a dataset and about 500,000 of its tokens, spread evenly: their ids."""
    data = IndexedDataset(prefix)
    keep = min(DOCUMENTS, data.num_documents, max(1, TOKENS * data.num_documents // max(1, data.num_tokens)))
    yield from (data.document(k * data.num_documents // keep)[:TOKENS] for k in range(keep))


def encoded(tokenizer: Tokenizer, texts: Iterable[bytes]) -> Iterator[np.ndarray]:
    """The ids of some texts by the tokenizer's own library."""
    for raw in texts:
        yield np.array(tokenizer.encode(raw.decode("utf-8")), np.int64)


def union(paths: Sequence[str]) -> np.ndarray:
    """(vocab_size,) bool of the files in which the tasks that encode say what they used."""
    used = np.load(paths[0])
    for path in paths[1:]:
        used |= np.load(path)
    return used
