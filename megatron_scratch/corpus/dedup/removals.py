"""Which documents go, in favour of which: what the stages of deduplication hand on, as files sorted by document."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np

from megatron_scratch.corpus.stages import Done

NOBODY = np.iinfo(np.int64).min  # `kept` of a document that went in favour of none; -1 - f: of file f of the evaluation sets
REMOVAL = np.dtype([("document", "<i8"), ("kept", "<i8"), ("similarity", "<f8")])


def removals(documents: np.ndarray, kept: np.ndarray, similarity: np.ndarray | float) -> np.ndarray:
    """(n,) of REMOVAL, sorted by document."""
    rows = np.empty(len(documents), REMOVAL)
    order = np.argsort(documents, kind="stable")
    rows["document"], rows["kept"] = documents[order], kept[order]
    rows["similarity"] = similarity[order] if isinstance(similarity, np.ndarray) else similarity
    return rows


def read_range(paths: Sequence[str], low: int, high: int) -> np.ndarray:
    """The removals of documents [low, high) out of sorted files, sorted; each document is in one of them at most."""
    pieces = [np.empty(0, REMOVAL)]
    for path in paths:
        rows = np.load(path, mmap_mode="r")
        first, end = (bisect_left(rows["document"], number) for number in (low, high))  # searchsorted would copy the column
        pieces.append(np.array(rows[first:end]))  # a view would keep the file open
    found = np.concatenate(pieces)
    return found[np.argsort(found["document"], kind="stable")]


def removal_files(*stages: Done | None) -> list[str]:
    """The removal files of some stages; a stage writes one per task, or as many runs as its result says."""
    paths: list[str] = []
    for done in filter(None, stages):
        for i, told in enumerate(done.results):
            names = [f"{run}.removed.npy" for run in range(told["runs"])] if "runs" in told else ["removed.npy"]
            paths += [done.path(i, name) for name in names]
    return paths


def find(paths: Sequence[str], documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """((k,) places in `documents` (n,) i64 of those that some file removes, (k,) of REMOVAL)."""
    places, found = [np.empty(0, np.int64)], [np.empty(0, REMOVAL)]
    for path in paths:
        rows = np.load(path, mmap_mode="r")
        column = rows["document"]
        within = np.flatnonzero((documents >= column[0]) & (documents <= column[-1])) if len(rows) else []
        at = np.array([bisect_left(column, documents[i]) for i in within], np.int64)
        hits = column[at] == documents[within] if len(at) else np.zeros(0, bool)
        places.append(np.asarray(within, np.int64)[hits])
        found.append(np.asarray(rows[at[hits]]))
    return np.concatenate(places), np.concatenate(found)


def kept_mask(paths: Sequence[str], low: int, high: int) -> np.ndarray:
    """(high - low,) bool: true for the documents that no file removes."""
    keep = np.ones(high - low, dtype=bool)
    keep[read_range(paths, low, high)["document"] - low] = False
    return keep
