"""Text between stages: shards of documents, UTF-8 back to back, with a row of facts for each.

    NNNNN.K.text       the bytes
    NNNNN.K.starts.npy (D + 1,) i64: where each document starts in them, and where the last one ends
    NNNNN.K.rows.npy   (D,) of ROW: where it came from, what it is

A document's number is its place in the order of the input, over all shards: shard s holds [base(s), base(s + 1)).
"""

from __future__ import annotations

import os
import weakref
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np

from megatron_scratch.corpus.stages import Done, Outputs

ROW = np.dtype([
    ("hash_high", "<u8"), ("hash_low", "<u8"),  # blake2b of the text, 16 bytes
    ("source", "<u4"),  # which file of the input
    ("chars", "<u4"),  # Unicode characters
    ("place", "<i8"),  # its first byte in that file as decompressed, or its row of a table
    ("id", "<u8"),  # hash of the field corpus.id_key; 0 where it has none
])  # fmt: skip


READ = 1 << 20  # bytes
OPEN = 32  # shards that a process holds at once; each costs three file descriptors, and 1,024 are usual


class ShardWriter:
    """Appends documents to shard `number` of a task."""

    def __init__(self, outputs: Outputs, number: int):
        self.outputs, self.number = outputs, number
        self.ends: list[int] = []
        self.rows: list[tuple[int, ...]] = []
        self.size = 0

    def __enter__(self) -> ShardWriter:
        self.opened = self.outputs.open(f"{self.number}.text")
        self.file = self.opened.__enter__()
        return self

    def add(self, text: bytes, row: tuple[int, ...]) -> None:
        self.file.write(text)
        self.size += len(text)
        self.ends.append(self.size)
        self.rows.append(row)

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        self.opened.__exit__(kind, value, trace)
        if kind is None:
            self.outputs.save(f"{self.number}.starts.npy", np.array([0, *self.ends], dtype=np.int64))
            self.outputs.save(f"{self.number}.rows.npy", np.array(self.rows, dtype=ROW))


class Shard:
    """One shard. `starts` (D + 1,) i64; `rows` (D,) of ROW, both mapped; document i of it is number base + i. Texts are read, not
    mapped: pages of a map would count as this process's memory for as long as it is open."""

    def __init__(self, stem: str, base: int):
        self.path, self.base = f"{stem}.text", base
        self.starts, self.rows = (np.load(f"{stem}.{name}.npy", mmap_mode="r").view(np.ndarray) for name in ("starts", "rows"))
        self.file = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.file)
        size = os.fstat(self.file).st_size
        assert size == self.starts[-1], f"{self.path} has {size} bytes, {self.starts[-1]} expected"

    def __len__(self) -> int:
        return len(self.rows)

    def raw(self, i: int) -> bytes:
        start, end = self.starts[i : i + 2].tolist()
        return os.pread(self.file, end - start, start)

    def raws(self, places: np.ndarray) -> Iterator[bytes]:
        """Documents in ascending order, read READ bytes at a time."""
        starts, ends = self.starts[places].tolist(), self.starts[places + 1].tolist()
        first = 0
        while first < len(starts):
            begin = starts[first]
            last = max(first + 1, bisect_right(ends, begin + READ, lo=first))
            block = os.pread(self.file, ends[last - 1] - begin, begin)
            yield from (block[start - begin : end - begin] for start, end in zip(starts[first:last], ends[first:last], strict=True))
            first = last

    def text(self) -> np.ndarray:
        """(bytes,) u8: all of it, mapped while the array lives."""
        return np.memmap(self.path, np.uint8, "r").view(np.ndarray) if self.starts[-1] else np.zeros(0, np.uint8)

    def texts(self, keep: np.ndarray | None = None) -> Iterator[tuple[int, str]]:
        """(number in the shard, text) of the documents that `keep` (D,) bool leaves."""
        places = np.arange(len(self)) if keep is None else np.flatnonzero(keep)
        for i, raw in zip(places.tolist(), self.raws(places), strict=True):
            yield i, raw.decode("utf-8")


class Store:
    """All shards of a stage. As JSON (`spec`) it is what tasks are handed."""

    def __init__(self, stems: Sequence[str], counts: Sequence[int]):
        self.stems, self.counts = list(stems), list(counts)
        self.bases = [0, *accumulate(self.counts)]
        self._stamps: dict[int, tuple[int, int]] = {}

    @classmethod
    def of(cls, spec: dict[str, Any]) -> Store:
        return cls(spec["stems"], spec["counts"])

    @classmethod
    def of_stage(cls, done: Done) -> Store:
        """The shards that the tasks of a stage wrote, as many as each result says."""
        shards = [(done.path(i, str(k)), count) for i, told in enumerate(done.results) for k, count in enumerate(told["shards"])]
        return cls([stem for stem, _ in shards], [count for _, count in shards])

    def tasks(self) -> list[dict[str, Any]]:
        """A task for each shard."""
        return [{"shard": s} for s in range(len(self.stems))]

    def spec(self) -> dict[str, Any]:
        return {"stems": self.stems, "counts": self.counts}

    @property
    def documents(self) -> int:
        return self.bases[-1]

    def shard(self, s: int) -> Shard:
        """A stage that is run again, for other settings, writes other files of the same names, and has another store."""
        if s not in self._stamps:
            told = os.stat(f"{self.stems[s]}.text")
            self._stamps[s] = told.st_ino, told.st_mtime_ns
        return _shard(self.stems[s], self.bases[s], self._stamps[s])

    def find(self, number: int) -> tuple[Shard, int]:
        """(shard, number in it) of a document."""
        s = bisect_right(self.bases, number) - 1
        return self.shard(s), number - self.bases[s]


@lru_cache(maxsize=OPEN)
def _shard(stem: str, base: int, stamp: tuple[int, int]) -> Shard:
    return Shard(stem, base)
