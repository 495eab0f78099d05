"""Exact copies: documents with one 128-bit hash of their text. One task per range of the hash."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_scratch.corpus.dedup.order import number_of, orders
from megatron_scratch.corpus.dedup.removals import removals
from megatron_scratch.corpus.dedup.words import U64
from megatron_scratch.corpus.stages import Outputs
from megatron_scratch.corpus.store import Store

TASK = 1 << 21  # documents per task: 50 MB


def tasks(store: Store) -> list[dict[str, Any]]:
    count = -(-store.documents // TASK)
    edges = [(i << 64) // count for i in range(count + 1)]
    return [{"low": low, "high": high - 1} for low, high in zip(edges[:-1], edges[1:], strict=True)]


def sorted_hashes(rows: np.ndarray) -> np.ndarray:
    """(3, D) u64 for `hashes.npy`: both halves of the hash and the place in the shard, sorted by the upper half."""
    by = np.argsort(rows["hash_high"], kind="stable")
    return np.stack([rows["hash_high"][by], rows["hash_low"][by], by.astype(U64)])


def run(outputs: Outputs, store: dict[str, Any], low: int, high: int, keep: str, priority: list[int]) -> dict[str, Any]:
    """Documents with a hash from `low` to `high` (its upper half): `removed.npy`. Of equal ones the lowest in order stays."""
    shards = Store.of(store)
    parts = []
    for stem, base in zip(shards.stems, shards.bases, strict=False):
        columns = np.load(f"{stem}.hashes.npy", mmap_mode="r")
        first = np.searchsorted(columns[0], U64(low), side="left")
        end = np.searchsorted(columns[0], U64(high), side="right")
        part = np.array(columns[:, first:end])
        part[2] += U64(base)
        parts.append(part)
    upper, lower, number = np.concatenate(parts, axis=1)
    by = np.lexsort((lower, upper))
    upper, lower, number = upper[by], lower[by], number[by]
    same = (upper[1:] == upper[:-1]) & (lower[1:] == lower[:-1])
    grouped = np.concatenate([[False], same]) | np.concatenate([same, [False]])
    group = np.cumsum(np.concatenate([[True], ~same]))[grouped]
    order = orders(shards, number[grouped], keep, priority)
    by = np.lexsort((order, group))
    group, number = group[by], number_of(order[by])
    first = np.flatnonzero(np.concatenate([[True], group[1:] != group[:-1]]))[: len(group)]
    leader = number[first].repeat(np.diff(np.append(first, len(group))))
    gone = number != leader
    outputs.save("removed.npy", removals(number[gone], leader[gone], 1.0))
    return {"removed": int(gone.sum())}
