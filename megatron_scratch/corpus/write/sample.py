"""Samples of the text that is left: for training a tokenizer, and for choosing its encoder. Both are the same however the corpus
is cut into shards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from megatron_scratch.corpus.dedup.removals import kept_mask

if TYPE_CHECKING:
    from megatron_scratch.corpus.graph import Graph

BLOCK = 1 << 16  # bytes of the pieces that a tokenizer's sample is made of
DOCUMENTS, BYTES = 1000, 2_000_000  # of the sample that encoders have to agree on


def sample_texts(graph: Graph, limit: int | None) -> Iterator[str]:
    """All documents that are left, or `limit` bytes of their text in 64 KiB pieces spread evenly."""
    total = graph.left_total("bytes")
    if limit is None or limit >= total:
        for s, told in enumerate(graph.left):
            if told["documents"]:
                yield from (text for _, text in graph.text.shard(s).texts(_keep(graph, s)))
        return
    size = min(BLOCK, limit)
    blocks, keep = total // size, limit // size
    for k in range(keep):
        begin = k * blocks // keep * size
        yield _bytes(graph, begin, begin + size).decode("utf-8", "ignore")  # a cut character is left out


def _keep(graph: Graph, s: int) -> np.ndarray:
    shard = graph.text.shard(s)
    return kept_mask(graph.removed, shard.base, shard.base + len(shard))


def _bytes(graph: Graph, begin: int, end: int) -> bytes:
    """Bytes [begin, end) of all text that is left, back to back."""
    pieces, before = [], 0
    for s, told in enumerate(graph.left):
        low, high = max(begin - before, 0), min(end - before, told["bytes"])
        if low < high:
            shard, documents = graph.text.shard(s), np.flatnonzero(_keep(graph, s))
            ends = np.cumsum(np.diff(shard.starts)[documents])
            for i in range(int(np.searchsorted(ends, low, side="right")), int(np.searchsorted(ends, high)) + 1):
                raw = shard.raw(int(documents[i]))
                start = int(ends[i]) - len(raw)
                pieces.append(raw[max(low - start, 0) : max(high - start, 0)])
        before += told["bytes"]
    return b"".join(pieces)


def sample_documents(graph: Graph) -> Iterator[bytes]:
    """Up to 1,000 documents and about 2 MB, spread evenly."""
    count, size = graph.left_total("documents"), graph.left_total("bytes")
    keep = max(1, min(DOCUMENTS, count, BYTES * count // max(1, size)))
    wanted = [k * count // keep for k in range(keep)]
    before = 0
    for s, told in enumerate(graph.left):
        here = [w - before for w in wanted if before <= w < before + told["documents"]]
        if here:
            shard, documents = graph.text.shard(s), np.flatnonzero(_keep(graph, s))
            yield from (shard.raw(int(documents[i])) for i in here)
        before += told["documents"]
