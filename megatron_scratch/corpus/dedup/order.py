"""Who stays when documents are alike: a total order of documents, as one u64 each. The lower stays.

The upper half is what the keep rule says (corpus.keep), the lower half the document's number, so that ties go to the first.
"""

from __future__ import annotations

import numpy as np

from megatron_scratch.corpus.dedup.words import U64
from megatron_scratch.corpus.store import Store

MOST = 1 << 32  # documents in one deduplication
LOW, HALF = U64(MOST - 1), U64(32)


def orders(store: Store, numbers: np.ndarray, keep: str, priority: list[int]) -> np.ndarray:
    """(n,) u64 for documents by number. keep: first | longest (in bytes) | source (`priority` of each source file, low first)."""
    numbers = np.asarray(numbers, dtype=np.int64)
    key = np.zeros(len(numbers), dtype=U64)
    if keep != "first":
        shards = np.searchsorted(store.bases, numbers, side="right") - 1
        for s in np.unique(shards):
            here = shards == s
            shard, local = store.shard(int(s)), numbers[here] - store.bases[s]
            if keep == "longest":
                length = np.minimum(shard.starts[local + 1] - shard.starts[local], MOST - 1)
                key[here] = U64(MOST - 1) - length.astype(U64)
            else:
                key[here] = np.array(priority, dtype=U64)[shard.rows["source"][local]]
    return key << HALF | numbers.astype(U64)


def number_of(order: np.ndarray) -> np.ndarray:
    """(n,) i64: the documents' numbers."""
    return (order & LOW).astype(np.int64)


def unique_pairs(later: np.ndarray, earlier: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (each (n,) u64) sorted by (later, earlier), each once."""
    if not len(later):
        return later, earlier
    if int(later.max()) < MOST:  # by number alone: a pair is one word, and sorts ten times as fast
        packed = np.unique(later << HALF | earlier)
        return packed >> HALF, packed & LOW
    by = np.lexsort((earlier, later))
    later, earlier = later[by], earlier[by]
    new = np.concatenate([[True], (later[1:] != later[:-1]) | (earlier[1:] != earlier[:-1])])
    return later[new], earlier[new]
