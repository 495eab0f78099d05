"""How long documents are: every length with its count, in memory that does not grow with the number of documents."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from megatron_scratch.data.indexed import IndexedDataset

BLOCK = 1 << 20  # documents at once


def document_lengths(indexed: IndexedDataset) -> Counter[int]:
    """Tokens -> documents of that many. N tokens have at most sqrt(2 N) different lengths."""
    counts: Counter[int] = Counter()
    for first in range(0, indexed.num_documents, BLOCK):
        edges = indexed.document_indices[first : first + BLOCK + 1]
        sizes = indexed.sizes[int(edges[0]) : int(edges[-1])]
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])
        values, some = np.unique(np.diff(starts[edges - edges[0]]), return_counts=True)
        counts.update(dict(zip(values.tolist(), some.tolist(), strict=True)))
    return counts


def described(counts: Counter[int]) -> dict[str, Any]:
    """documents, median, mean, longest; bins: [from, to, documents] per power of two, from the shortest on."""
    if not counts:
        return {"documents": 0, "median": 0, "mean": 0.0, "longest": 0, "bins": []}
    lengths = np.array(sorted(counts), np.int64)
    some = np.array([counts[int(n)] for n in lengths], np.int64)
    total = int(some.sum())
    below = np.cumsum(some)
    middle = [int(lengths[int(np.searchsorted(below, at, side="right"))]) for at in ((total - 1) // 2, total // 2)]
    bits: Counter[int] = Counter()
    for n, count in zip(lengths.tolist(), some.tolist(), strict=True):
        bits[n.bit_length()] += count
    return {"documents": total, "median": sum(middle) // 2, "mean": float((lengths * some).sum() / total),
            "longest": int(lengths[-1]), "bins": by_powers(bits)}  # fmt: skip


def by_powers(bits: Counter[int]) -> list[list[int]]:
    """[from, to, documents] for each number of binary digits, without gaps."""
    return [[1 << b >> 1, (1 << b) - 1, bits[b]] for b in range(min(bits), max(bits) + 1)] if bits else []
