"""data.order=megatron: the samples of Megatron-LM's GPTDataset, for runs that were begun there.

Its three index arrays (megatron/core/datasets/gpt_dataset.py, core 0.16), over the sequences of one file; T tokens in all:

    document_index  (E N,) i32  the N sequences, E times over, shuffled together
    sample_index    (n + 1, 2)  (place in document_index, token in that sequence) where each window of S tokens begins
    shuffle_index   (n,)        the window of sample k

E is the least number of epochs that holds the samples of the run. Where less than 0.8 of the last one is needed, it is shuffled
apart from the others, in both arrays. So the length of the run decides the order of all of it: a run made longer keeps its past
only as long as E and that choice stay the same. The random numbers are numpy's legacy RandomState, which is frozen (NEP 19).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from megatron_scratch.config.data import split_fraction
from megatron_scratch.data.indexed import IndexedDataset
from megatron_scratch.util.errors import UserError

APART = 0.80  # of an epoch: a last one of which less is used is shuffled by itself
SURPLUS = 0.005  # --mid-level-dataset-surplus: samples that each dataset of a blend has to spare
BLOCK = 1 << 14  # samples of a blend that are dealt at a time
MOST = 32_766  # datasets of a blend; Megatron numbers them in 16 bits


@dataclass(frozen=True)
class Length:
    """What the number of samples decides: epochs; and whether the last is shuffled apart, then after `before` samples."""

    epochs: int
    apart: bool
    before: int
    samples: int  # that there are: all windows of all epochs


def length(tokens: int, seq_len: int, wanted: int) -> Length:
    """tokens: of one epoch; wanted: samples of the run."""
    epochs = max(1, -(-(wanted * seq_len + 1) // tokens))
    before = ((epochs - 1) * tokens - 1) // seq_len
    apart = epochs > 1 and wanted - before < int(APART * ((tokens - 1) // seq_len))
    return Length(epochs, apart, before, (epochs * tokens - 1) // seq_len)


def document_index(sequences: int, plan: Length, random: np.random.RandomState) -> np.ndarray:
    """(E N,) i32."""
    parts = [plan.epochs - 1, 1] if plan.apart else [plan.epochs]
    shuffled = [np.tile(np.arange(sequences, dtype=np.int32), count) for count in parts]
    for part in shuffled:
        random.shuffle(part)
    return np.concatenate(shuffled)


def sample_index(sizes: np.ndarray, documents: np.ndarray, seq_len: int, samples: int) -> np.ndarray:
    """(n + 1, 2) i32, or i64 where that is too small. Megatron's C++ walks; the windows begin at k S, so a search finds them."""
    dtype = np.int32 if max(len(documents), int(sizes.max())) <= np.iinfo(np.int32).max else np.int64
    ends = np.cumsum(sizes[documents], dtype=np.int64)
    index = np.zeros((samples + 1, 2), dtype)  # the first is (0, 0), even where that sequence is empty
    starts = np.arange(1, samples + 1, dtype=np.int64) * seq_len
    places = np.searchsorted(ends, starts, side="right")
    index[1:, 0] = places
    index[1:, 1] = starts - (ends[places] - sizes[documents[places]])
    return index


def shuffle_index(plan: Length, random: np.random.RandomState) -> np.ndarray:
    """(n,) u32, or i64 where that is too small."""
    dtype = np.uint32 if plan.samples < np.iinfo(np.uint32).max - 1 else np.int64
    edges = [0, plan.before, plan.samples] if plan.apart else [0, plan.samples]
    parts = [np.arange(a, b, dtype=dtype) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    for part in parts:
        random.shuffle(part)
    return np.concatenate(parts)


class MegatronStream:
    """The shuffled sequences of all epochs, one after the other. A sequence is a document."""

    def __init__(self, indexed: IndexedDataset, seq_len: int, documents: np.ndarray, index: np.ndarray):
        self.indexed, self.seq_len, self.documents, self.index = indexed, seq_len, documents, index

    def window(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [start, start + count) as (count,) i64, and where sequences start among them as (count,) bool. Starts are those
        of windows: multiples of S."""
        pieces, starts, have = [], np.zeros(count, dtype=bool), 0
        for sequence, skip, length in self._sequences(start, count):
            starts[have] |= skip == 0
            pieces.append(self.indexed.sequence(sequence, skip, length))
            have += length
        return np.concatenate(pieces).astype(np.int64), starts

    def pieces(self, start: int, count: int) -> Iterator[tuple[int, int, int]]:
        """(document of the file, a, b) for each piece of tokens [start, start + count): it is tokens [a, b) of the document."""
        x = self.indexed
        for sequence, skip, length in self._sequences(start, count):
            document = int(np.searchsorted(x.document_indices, sequence, side="right")) - 1
            a = int(x.sequence_starts[sequence] - x.document_starts[document]) + skip
            yield document, a, a + length

    def _sequences(self, start: int, count: int) -> Iterator[tuple[int, int, int]]:
        """(sequence, first token of it, tokens) of the pieces that have any."""
        place, skip = (int(x) for x in self.index[start // self.seq_len])
        while count:
            sequence = int(self.documents[place])
            length = min(int(self.indexed.sizes[sequence]) - skip, count)
            if length:
                yield sequence, skip, length
            count, place, skip = count - length, place + 1, 0


class MegatronOrder:
    """The `sample_order` of one file. Its one epoch is the whole run; the arrays are made when the first sample is asked for."""

    def __init__(self, indexed: IndexedDataset, seed: int, seq_len: int, samples: int | None, split: str | None):
        if samples is None:
            raise UserError("data.order=megatron depends on the length of the run; give data.megatron_samples=N, Megatron's "
                            "--train-iters x --global-batch-size (or --train-samples)")  # fmt: skip
        self.indexed, self.seed, self.seq_len = indexed, seed, seq_len
        self.sequences = int(round(split_fraction(split) * float(indexed.num_sequences)))
        tokens = int(indexed.sequence_starts[self.sequences])
        if not tokens:
            raise UserError(f"{indexed.prefix}: data.megatron_split={split} leaves no token of its {indexed.num_sequences} "
                            "sequences for training; give more to the first part")  # fmt: skip
        self.plan = length(tokens, seq_len, samples)
        self.windows = self.plan.samples

    @cached_property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(document_index, sample_index, shuffle_index). One generator makes both shuffles, in this order."""
        random = np.random.RandomState(self.seed)
        documents = document_index(self.sequences, self.plan, random)
        return (documents, sample_index(self.indexed.sizes, documents, self.seq_len, self.plan.samples),
                shuffle_index(self.plan, random))  # fmt: skip

    def place(self, j: int) -> tuple[int, int]:
        """(0, window) of sample j."""
        if j >= self.windows:
            raise UserError(f"{self.indexed.prefix} has {self.windows} samples in the order of data.megatron_samples, the run asks "
                            f"for sample {j}; give the number that the whole run takes")  # fmt: skip
        return 0, int(self.arrays[2][j])

    def stream(self, epoch: int) -> MegatronStream:
        documents, index, _ = self.arrays
        return MegatronStream(self.indexed, self.seq_len, documents, index)

    @property
    def identity(self) -> Any:
        """What decides the order besides tokens, seed and sequence length."""
        return self.plan.epochs, self.plan.apart, self.sequences

    @staticmethod
    def blended(make: Callable[[int, int | None], Any], weights: Sequence[float], seed: int, samples: int | None) -> Any:
        """make: (dataset, its samples) -> GPTDataset. Weights are normalised twice, by the builder and by the blend."""
        if samples is None:
            return make(0, None)  # says what is missing
        once = _normalised(weights)
        targets = [math.ceil(samples * weight) for weight in once]
        datasets = [make(i, math.ceil(target * (1 + SURPLUS))) for i, target in enumerate(targets)]
        return MegatronBlend(datasets, _normalised(once), sum(targets))


def _normalised(weights: Sequence[float]) -> list[float]:
    w = np.array(weights, dtype=np.float64)
    return (w / np.sum(w)).tolist()


class MegatronBlend:
    """Megatron's BlendedDataset: each sample comes from the dataset that is farthest behind its weight.

    That is a loop over all samples before; it is run as far as it is asked for (2 us a sample). The arithmetic is that of x86-64:
    compilers for other machines may fuse its products and sums, and then a tie can fall the other way.
    """

    def __init__(self, datasets: Sequence[Any], weights: Sequence[float], size: int):
        if len(datasets) > MOST:
            raise UserError(f"data.blend has {len(datasets)} datasets; Megatron's order allows {MOST}")
        self.datasets, self.weights, self.size, self.name = list(datasets), list(weights), size, "blend"
        self.blocks: list[np.ndarray] = []  # (BLOCK,) each: dataset of each sample dealt so far
        self.before = [np.zeros(len(datasets), np.int64)]  # samples of each dataset before each block

    def _deal(self) -> None:
        """One block more."""
        weights, counts, first = np.array(self.weights), self.before[-1].astype(np.float64), len(self.blocks) * BLOCK
        block = np.empty(BLOCK, np.int16)
        for i in range(BLOCK):
            part = int(np.argmax(weights * max(first + i, 1.0) - counts))
            block[i] = part
            counts[part] += 1
        self.blocks.append(block)
        self.before.append(counts.astype(np.int64))

    def locate_part(self, k: int) -> tuple[int, int]:
        """(dataset, its sample) of sample k."""
        if k >= self.size:
            raise UserError(f"the blend has {self.size} samples in the order of data.megatron_samples, the run asks for sample "
                            f"{k}; give the number that the whole run takes")  # fmt: skip
        b, i = divmod(k, BLOCK)
        while len(self.blocks) <= b:
            self._deal()
        part = int(self.blocks[b][i])
        return part, int(self.before[b][part] + np.count_nonzero(self.blocks[b][:i] == part))

    def locate(self, k: int) -> tuple[str, int]:
        part, j = self.locate_part(k)
        return self.datasets[part].locate(j)

    def __getitem__(self, k: int) -> Any:
        part, j = self.locate_part(k)
        return self.datasets[part][j]

    def fingerprint(self) -> str:
        parts = [("megatron", d.fingerprint(), w) for d, w in zip(self.datasets, self.weights, strict=True)]
        return hashlib.sha256(repr(parts).encode()).hexdigest()
