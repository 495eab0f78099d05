"""The shapes and masks of attention that every backend is tested on."""

from __future__ import annotations

from megatron_scratch.models.attend_check import MANY, Case


def shapes(lengths: tuple[int, ...], sizes: tuple[int, ...]) -> list[Case]:
    """Every length with 1, 2 and 4 query heads to a key/value head, window and documents or not; last queries of a cache."""
    square = [Case(length, length, 4, groups, size, window, documents, MANY if length < 8 else 2)
              for length in lengths for groups in (4, 2, 1) for size in sizes for window in (None, 5)
              for documents in (False, True)]  # fmt: skip
    cached = [Case(queries, keys, size=size, window=window, batch=MANY)
              for queries, keys in ((1, 7), (3, 129)) for size in sizes for window in (None, 5)]  # fmt: skip
    return square + cached
