"""Sample k as a pure function of (data, seed, k): no index files, no state, and a longer run never changes an earlier sample.

A sample is S + 1 tokens; its first S are the input and its last S the labels, so neighbouring windows share one token. An
epoch of T tokens has (T - 1) // S windows; sample j is window `feistel(j % n)` of epoch `j // n`. What is left at the end
of an epoch (fewer than S tokens) is not trained on in that epoch. Legend: S sequence length, D documents.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_scratch import registry
from megatron_scratch.data.indexed import IndexedDataset
from megatron_scratch.util.errors import UserError

MASK = (1 << 64) - 1
ROUNDS = 6  # 4 make a Feistel network a pseudo-random permutation (Luby & Rackoff, 1988); small domains want a few more
ONE = 1 << 32  # a whole, in the blend's fixed-point fractions


@dataclass(frozen=True)
class Sample:
    """tokens (S + 1,) i64; starts (S + 1,) bool, true at the first token of a document; valid tokens, the rest is padding."""

    tokens: np.ndarray
    starts: np.ndarray
    valid: int


def key(*parts: Any) -> int:
    """A 64-bit key from anything that prints, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def mix(x: int) -> int:
    """The finalizer of splitmix64 (Steele et al., 2014): a bijection of 64-bit integers."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def feistel(i: int, n: int, secret: int) -> int:
    """Where a keyed permutation of range(n) sends i: O(1) time, no memory.

    A Feistel network with halves of b // 2 and b - b // 2 bits permutes range(2^b); results of n and above are sent through
    again until they fall inside (cycle walking, Black & Rogaway 2002), less than twice on average.
    """
    assert 0 <= i < n
    bits = (n - 1).bit_length()
    low, high = bits // 2, bits - bits // 2
    while True:
        left, right, left_bits, right_bits = i >> low, i & (1 << low) - 1, high, low
        for step in range(ROUNDS):
            left ^= mix(secret + step * 0x9E3779B97F4A7C15 + right & MASK) & (1 << left_bits) - 1
            left, right, left_bits, right_bits = right, left, right_bits, left_bits
        i = left << low | right  # ROUNDS is even, so the halves have their first widths again
        if i < n:
            return i


def ranks_of(i: np.ndarray, secret: int) -> np.ndarray:
    """(n,) u64: a keyed hash of numbers (n,), a bijection, so different numbers never tie."""
    x = i.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) ^ np.uint64(secret)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permutation(n: int, secret: int) -> np.ndarray:
    """(n,) i64: range(n) in the order of `ranks_of`. No generator, whose stream may change with numpy's version (NEP 19)."""
    return np.argsort(ranks_of(np.arange(n), secret))


class Stream:
    """The documents of a file as one stream of tokens, in the file's order or another (`order`, (D,) indices)."""

    def __init__(self, indexed: IndexedDataset, order: np.ndarray | None = None):
        self.indexed, self.order = indexed, order
        starts = indexed.document_starts
        if order is not None:
            starts = np.concatenate([[0], np.cumsum(np.diff(starts)[order])])
        self.starts = starts  # (D + 1,) tokens of the stream before each document, then all

    def window(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [start, start + count) as (count,) i64, and where documents start among them as (count,) bool."""
        first, end = (int(x) for x in np.searchsorted(self.starts, (start, start + count), side="left"))
        is_start = np.zeros(count, dtype=bool)
        is_start[self.starts[first:end] - start] = True
        if self.order is None and self.indexed.contiguous:
            return self.indexed.read(start, count).astype(np.int64), is_start
        pieces = [self._part(*piece) for piece in self.pieces(start, count)]
        return np.concatenate(pieces).astype(np.int64), is_start

    def pieces(self, start: int, count: int) -> Iterator[tuple[int, int, int]]:
        """(document of the file, a, b) for each piece of tokens [start, start + count): it is tokens [a, b) of the document."""
        first, end = (int(np.searchsorted(self.starts, *at)) for at in ((start, "right"), (start + count, "left")))
        for d in range(first - 1, end):
            a, b = int(self.starts[d]), int(self.starts[d + 1])
            a, b = max(start - a, 0), min(start + count, b) - a
            if a < b:
                yield d if self.order is None else int(self.order[d]), a, b

    def _part(self, document: int, a: int, b: int) -> np.ndarray:
        """Tokens [a, b) of a document of the file, over its sequences."""
        x = self.indexed
        at = int(x.document_starts[document])
        if x.contiguous:
            return x.read(at + a, b - a)
        first = int(np.searchsorted(x.sequence_starts, at + a, side="right")) - 1
        pieces = []
        while a < b:
            skip = at + a - int(x.sequence_starts[first])
            count = min(int(x.sizes[first]) - skip, b - a)
            pieces.append(x.sequence(first, skip, count))
            a, first = a + count, first + 1
        return np.concatenate(pieces)


class GPTDataset:
    """Training samples of one file, numbered 0, 1, 2, ... without end.

    Args:
        order: a `sample_order` entry.
        content: sha256 of the tokens if it is known (a manifest's); else the file is probed when a fingerprint is asked for.
        samples, split: data.megatron_samples and data.megatron_split, for the order that reads them.
    """

    def __init__(self, indexed: IndexedDataset, seq_len: int, seed: int, order: str = "documents", content: str | None = None,
                 samples: int | None = None, split: str | None = None):  # fmt: skip
        self.indexed, self.seq_len, self.seed, self.content = indexed, seq_len, seed, content
        self.name = indexed.prefix
        self.order_name, self.order = order, registry.get("sample_order", order)(indexed, seed, seq_len, samples, split)
        self.samples_per_epoch = self.order.windows
        if self.samples_per_epoch < 1:
            raise UserError(f"{self.name} has {indexed.num_tokens} tokens, one sample of train.seq_len={seq_len} needs "
                            f"{seq_len + 1}; use a shorter train.seq_len or more data")  # fmt: skip
        self.epoch: int | None = None

    def window_of(self, j: int) -> tuple[int, int]:
        """(epoch, window in the epoch's stream) of sample j."""
        assert j >= 0
        return self.order.place(j)

    def locate(self, j: int) -> tuple[str, int]:
        """(file, sample of that file) of sample j: what to name when a sample is bad."""
        return self.name, j

    def __getitem__(self, j: int) -> Sample:
        epoch, i = self.window_of(j)
        if epoch != self.epoch:
            self.indexed.check_size()
            self.epoch = epoch
        tokens, starts = self.order.stream(epoch).window(i * self.seq_len, self.seq_len + 1)
        return Sample(tokens, starts, self.seq_len + 1)

    def pieces(self, j: int) -> list[tuple[int, int, int]] | None:
        """(document of the file, a, b) for each piece of sample j, tokens [a, b) of it. None: the order cannot tell."""
        epoch, i = self.window_of(j)
        told = getattr(self.order.stream(epoch), "pieces", None)
        return list(told(i * self.seq_len, self.seq_len + 1)) if told else None

    def fingerprint(self) -> str:
        """sha256 of what decides the samples besides seed and length: the tokens and the order."""
        told = (self.content or self.indexed.fingerprint(), self.order_name)
        told += () if self.order.identity is None else (self.order.identity,)
        return hashlib.sha256(repr(told).encode()).hexdigest()


class Later:
    """A dataset from its sample `first` on: the data of a run that goes on from where another has been."""

    def __init__(self, dataset: GPTDataset | Blend, first: int):
        self.dataset, self.first, self.name = dataset, first, dataset.name

    def locate(self, k: int) -> tuple[str, int]:
        return self.dataset.locate(self.first + k)

    def __getitem__(self, k: int) -> Sample:
        return self.dataset[self.first + k]

    def fingerprint(self) -> str:
        return hashlib.sha256(repr((self.dataset.fingerprint(), self.first)).encode()).hexdigest()


class Blend:
    """Several datasets in fixed proportions: sample k -> (dataset, its sample j), in closed form.

    The datasets are the leaves of a Huffman tree over their weights. A node whose left part has the fraction p / 2^32 sends
    (n p + phase) >> 32 of its first n samples to the left, the others to the right (Beatty's sequences): every prefix of the
    run has each dataset within about 1 sample of its weight (each level adds less than 1 and scales what it was handed),
    and each dataset's own samples come as 0, 1, 2, ... without gaps.
    """

    def __init__(self, datasets: Sequence[Any], weights: Sequence[float], seed: int):
        if not datasets or len(datasets) != len(weights) or not all(0 < w < float("inf") for w in weights):
            raise UserError(f"a blend of {len(datasets)} datasets has weights {list(weights)}; give one above 0 to each")
        self.datasets, self.name = list(datasets), "blend"
        self.weights = [w / sum(weights) for w in weights]
        heap: list[tuple[float, int, Any]] = [(w, i, i) for i, w in enumerate(self.weights)]
        heapq.heapify(heap)
        for node in range(len(heap), 2 * len(heap) - 1):
            (small, _, right), (large, _, left) = heapq.heappop(heap), heapq.heappop(heap)
            p = min(max(round(large / (small + large) * ONE), 1), ONE - 1)  # never 0: a tiny weight is still used
            heapq.heappush(heap, (small + large, node, (p, key("blend", seed, node) % ONE, left, right)))
        self.tree = heap[0][2]

    def locate_part(self, k: int) -> tuple[int, int]:
        """(dataset, its sample) of sample k."""
        node = self.tree
        while isinstance(node, tuple):
            p, phase, left, right = node
            before = k * p + phase >> 32
            if (k + 1) * p + phase >> 32 > before:
                node, k = left, before
            else:
                node, k = right, k - before
        return node, k

    def locate(self, k: int) -> tuple[str, int]:
        part, j = self.locate_part(k)
        return self.datasets[part].locate(j)

    def __getitem__(self, k: int) -> Sample:
        part, j = self.locate_part(k)
        return self.datasets[part][j]

    def fingerprint(self) -> str:
        parts = [(d.fingerprint(), w) for d, w in zip(self.datasets, self.weights, strict=True)]
        return hashlib.sha256(repr(parts).encode()).hexdigest()


class EvalWindows:
    """Every token of one or more files predicted once, in order (each file's first has nothing before it).

    Window i of a file is its tokens [i S, i S + S], the last one padded. Beyond `len()` samples are all padding, so the last
    global batch of an evaluation may be fetched like any other.
    """

    def __init__(self, files: IndexedDataset | Sequence[IndexedDataset], seq_len: int):
        files = [files] if isinstance(files, IndexedDataset) else list(files)
        self.seq_len, self.streams = seq_len, [Stream(f) for f in files]
        counts = [-(-(f.num_tokens - 1) // seq_len) for f in files]
        for f in files:
            if f.num_tokens < 2:
                raise UserError(f"{f.prefix} has {f.num_tokens} tokens, an evaluation needs at least 2; give more data, or none")
        self.ends = np.cumsum(counts)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def locate(self, i: int) -> tuple[str, int]:
        part = int(np.searchsorted(self.ends, i, side="right"))
        return self.streams[part].indexed.prefix, i - (int(self.ends[part - 1]) if part else 0)

    def __getitem__(self, i: int) -> Sample:
        tokens, starts, count = np.zeros(self.seq_len + 1, np.int64), np.zeros(self.seq_len + 1, bool), 0
        if i < len(self):
            part = int(np.searchsorted(self.ends, i, side="right"))
            first = self.locate(i)[1] * self.seq_len
            count = min(self.seq_len + 1, self.streams[part].indexed.num_tokens - first)
            tokens[:count], starts[:count] = self.streams[part].window(first, count)
        return Sample(tokens, starts, count)

    def fingerprint(self) -> str:
        return hashlib.sha256(repr([s.indexed.fingerprint() for s in self.streams]).encode()).hexdigest()
