"""The orders of `data.order` without an end: an epoch's windows, dealt by a keyed permutation. `megatron_order.py` is the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron_scratch.data.dataset import Blend, GPTDataset, Stream, feistel, key, permutation
from megatron_scratch.data.indexed import IndexedDataset

EPOCHS_KEPT = 2  # document orders kept in memory: a run reads one epoch, or two where a batch crosses


class Permuted:
    """A `sample_order` whose epochs have T tokens and `windows` windows each, dealt by a keyed permutation.

    An order has `windows`, `place(j)`, `stream(epoch)`; `identity`, what its fingerprint holds besides its name; and
    `blended(make, weights, seed, samples)`: several datasets as one, where make(i, samples) gives dataset i.
    """

    identity: Any = None

    def __init__(self, indexed: IndexedDataset, seed: int, seq_len: int, samples: int | None, split: str | None):
        assert samples is None and split is None, "check_data refuses them"
        self.indexed, self.seed, self.windows = indexed, seed, (indexed.num_tokens - 1) // seq_len

    def place(self, j: int) -> tuple[int, int]:
        """(epoch, window of its stream) of sample j."""
        epoch, i = divmod(j, self.windows)
        return epoch, feistel(i, self.windows, key("windows", self.seed, epoch))

    @staticmethod
    def blended(make: Callable[[int, int | None], GPTDataset], weights: Sequence[float], seed: int, samples: int | None) -> Any:
        return Blend([make(i, None) for i in range(len(weights))], weights, seed)


class DocumentOrder(Permuted):
    """Documents are shuffled anew in each epoch, joined, and cut into windows; the windows are permuted."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.kept: dict[int, Stream] = {}

    def stream(self, epoch: int) -> Stream:
        if epoch not in self.kept:
            while len(self.kept) >= EPOCHS_KEPT:
                self.kept.pop(next(iter(self.kept)))
            order = permutation(self.indexed.num_documents, key("documents", self.seed, epoch))
            self.kept[epoch] = Stream(self.indexed, order)
        return self.kept[epoch]


class ContiguousOrder(Permuted):
    """Windows of the file as it lies, permuted in each epoch; for data that was shuffled when it was written."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.whole = Stream(self.indexed)

    def stream(self, epoch: int) -> Stream:
        return self.whole
