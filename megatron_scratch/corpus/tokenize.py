"""Documents to ids: who goes to train and who to valid, in what order, and the two indexed datasets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_scratch.data.dataset import key, permutation
from megatron_scratch.data.indexed import IndexedDataset, IndexedWriter, best_dtype
from megatron_scratch.data.tokenizer import Tokenizer

BATCH_CHARS = 4_000_000  # of text encoded at once; bounds memory at about 100 MB
BLOCK = 1 << 16  # bytes of the pieces that the tokenizer's sample is made of

Piece = tuple[str, bool]  # a text, and whether EOD follows it


def document_text(store: IndexedDataset, i: int) -> str:
    return store.document(i).tobytes().decode("utf-8")


def sample_texts(store: IndexedDataset, limit: int) -> Iterator[str]:
    """The documents of a store of UTF-8 bytes, or `limit` bytes of it in 64 KiB pieces spread evenly."""
    total = store.num_tokens
    if limit >= total:
        yield from (document_text(store, i) for i in range(store.num_documents))
        return
    size = min(BLOCK, limit)
    blocks, keep = total // size, limit // size
    for k in range(keep):
        yield store.read(k * blocks // keep * size, size).tobytes().decode("utf-8", "ignore")  # a cut character is left out


def split_by_document(store: IndexedDataset, digests: np.ndarray, fraction: float, seed: int) -> dict[str, Iterable[Piece]]:
    """Documents in a shuffled order. One is in valid if its digest (D,) u64, as a number in [0, 1), is below `fraction`: the same
    text is on the same side whatever the seed and the rest of the corpus. Each side gets at least one. EOD ends every document."""
    rank = np.argsort(digests, kind="stable")
    count = int((digests < fraction * 2.0**64).sum())
    count = min(max(count, int(fraction > 0)), len(digests) - 1)
    is_valid = np.zeros(len(digests), dtype=bool)
    is_valid[rank[:count]] = True
    order = permutation(len(digests), key("documents on disk", seed))
    sides = {"train": order[~is_valid[order]], "valid": order[is_valid[order]]}
    return {name: ((document_text(store, int(i)), True) for i in ids) for name, ids in sides.items()}


def split_tail(store: IndexedDataset, characters: np.ndarray, fraction: float) -> dict[str, Iterable[Piece]]:
    """Documents as they came; the last `fraction` of all characters is valid, cut inside a document where it falls (nanoGPT's
    data/shakespeare_char/prepare.py). EOD stands between documents: not at the cut, and not at the end of either side."""
    ends = np.cumsum(characters)
    cut = int(int(ends[-1]) * (1 - fraction))

    def pieces(low: int, high: int) -> Iterator[Piece]:
        first, last = np.searchsorted(ends, (low, high - 1), side="right")
        for i in range(int(first), int(last) + 1):
            begin = int(ends[i] - characters[i])
            yield document_text(store, i)[max(low - begin, 0) : high - begin], i < int(last)

    return {"train": pieces(0, cut) if cut else (), "valid": pieces(cut, int(ends[-1])) if cut < ends[-1] else ()}


def write_split(pieces: Iterable[Piece], tokenizer: Tokenizer, prefix: Path, report: Callable[[int], Any]) -> dict[str, Any]:
    """Encode and write `PREFIX.{bin,idx}`, one document per piece. Returns the counts; `report` gets the bytes done so far."""
    counts = {"documents": 0, "tokens": 0, "characters": 0, "bytes": 0, "unknown_tokens": 0}
    with IndexedWriter(prefix, best_dtype(tokenizer.vocab_size)) as writer:
        for batch in _batches(pieces):
            for (text, ended), ids in zip(batch, tokenizer.encode_batch([text for text, _ in batch]), strict=True):
                counts["documents"] += 1
                counts["characters"] += len(text)
                counts["bytes"] += len(text.encode("utf-8"))
                if tokenizer.unk_id is not None:
                    counts["unknown_tokens"] += ids.count(tokenizer.unk_id)
                writer.add_document(np.array(ids + [tokenizer.eod_id] * ended, dtype=np.int64))
            report(counts["bytes"])
        counts["tokens"] = writer.tokens
    return counts | {"dtype": writer.dtype.name}


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[0])
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
