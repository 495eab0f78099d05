"""n-grams of words that a text has more than once.

An n-gram can only repeat where its first n - 1 words do, so all but the 2-grams look at the few places that are left. Places are
compared by 64-bit hashes, polynomial sums modulo 2^64 of the words' mixed numbers: two of 10^6 collide with probability 10^-7.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megatron_scratch.corpus.dedup.words import U64, C, mix


class Grams:
    """The repeated n-grams of one text, for one n.

    places: (R,) i64, the first word of each, ascending; hashes: (R,) u64; starts: (W + 1,) i64, characters of the words before.
    """

    def __init__(self, n: int, places: np.ndarray, hashes: np.ndarray, starts: np.ndarray):
        self.n, self.places, self.hashes = n, places, hashes
        self.lengths = starts[places + n] - starts[places]

    def top_chars(self) -> int:
        """Characters of the most frequent one (of several: the first), with spaces between its words, times how often it is."""
        _, first, counts = np.unique(self.hashes, return_index=True, return_counts=True)
        best = int(counts.max())
        return best * (int(self.lengths[first[counts == best].min()]) + self.n - 1)

    def repeated_chars(self) -> int:
        """Characters in those that came before, from left to right; the next is looked for behind the one that was found."""
        seen: set[int] = set()
        free = chars = 0
        for place, value, length in zip(self.places.tolist(), self.hashes.tolist(), self.lengths.tolist(), strict=True):
            if place < free:
                continue
            if value in seen:
                chars, free = chars + length, place + self.n
            else:
                seen.add(value)
        return chars


def repeated_grams(words: list[str], most: int) -> Iterator[Grams]:
    """For n = 2 to `most`, as long as any repeats."""
    numbers: dict[str, int] = {}
    total = codes = mix(np.array([numbers.setdefault(w, len(numbers)) for w in words], dtype=U64) + U64(1))
    starts = np.concatenate([[0], np.cumsum(np.fromiter(map(len, words), np.int64, len(words)))])
    places = np.arange(len(words))
    for n in range(2, most + 1):
        total = total[:-1] * U64(C) + codes[n - 1 :]
        places = places[: np.searchsorted(places, len(total))]
        places = places[_again(total[places])]
        if not len(places):
            return
        yield Grams(n, places, total[places], starts)


def _again(x: np.ndarray) -> np.ndarray:
    """(N,) bool: which values stand more than once in x (N,)."""
    order = np.argsort(x)
    ordered = x[order]
    same = np.concatenate([[False], ordered[1:] == ordered[:-1], [False]])[: len(x) + 1]
    found = np.zeros(len(x), dtype=bool)
    found[order] = same[1:] | same[:-1]
    return found
