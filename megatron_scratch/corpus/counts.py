"""What each step took from a shard, for the report: documents, bytes, how similar near copies were, what is left of each source."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_scratch.corpus.dedup.removals import read_range
from megatron_scratch.corpus.stages import Outputs
from megatron_scratch.corpus.store import Shard, Store

BINS = 50  # of the similarity of near copies: 0.02 each
LEAST = 3  # pairs of least similarity that are shown: by them a threshold is judged


def run(outputs: Outputs, store: dict[str, Any], text: dict[str, Any], shard: int, removed: dict[str, list[str]]) -> dict[str, Any]:
    """Counts of one shard; no file.

    Args:
        store, text: the documents as they were read, and after repeated pieces were cut out.
        removed: why -> files of removals, in the order of the steps.
    """
    read, last = Store.of(store).shard(shard), Store.of(text).shard(shard)
    keep, told = np.ones(len(read), bool), {}
    near: dict[str, Any] = {"similarity": [], "least": []}
    for why, paths in removed.items():
        rows = read_range(paths, read.base, read.base + len(read))
        places = rows["document"] - read.base
        keep[places] = False
        part = read if why in ("exact copy", "near copy") else last
        told[why] = [len(rows), int(_sizes(part)[places].sum())]
        if why == "near copy":
            near = _near(rows)
    return {"removed": told, **near, "sources": _sources(last, keep), "lengths": _lengths(last.rows["chars"][keep])}


def _sizes(part: Shard) -> np.ndarray:
    return np.diff(part.starts)


def _near(rows: np.ndarray) -> dict[str, Any]:
    """similarity: documents per bin; least: [similarity, document, kept] of the least similar, the first by number of equals."""
    bins = np.minimum((rows["similarity"] * BINS).astype(np.int64), BINS - 1)
    by = np.lexsort((rows["document"], rows["similarity"]))[:LEAST]
    least = [[float(row["similarity"]), int(row["document"]), int(row["kept"])] for row in rows[by]]
    return {"similarity": np.bincount(bins, minlength=BINS).tolist() if len(rows) else [], "least": least}


def _sources(part: Shard, keep: np.ndarray) -> dict[str, list[int]]:
    """Source file -> [documents, bytes] that are left."""
    source, at, documents = np.unique(part.rows["source"][keep], return_inverse=True, return_counts=True)
    sizes = np.zeros(len(source), np.int64)
    np.add.at(sizes, at, _sizes(part)[keep])
    return {str(n): [d, size] for n, d, size in zip(source.tolist(), documents.tolist(), sizes.tolist(), strict=True)}


def _lengths(chars: np.ndarray) -> dict[str, int]:
    """Documents by the binary digits of their length in characters."""
    bits, counts = np.unique(np.frexp(chars.astype(np.float64))[1], return_counts=True)
    return dict(zip(map(str, bits.tolist()), counts.tolist(), strict=True))
