"""One global tensor of which each rank holds a few boxes, as views of memory that belongs to somebody else.

ZeRO cuts parameters into flat ranges, which no DTensor placement describes: a range of a matrix is the end of a row, a block of
whole rows, and the beginning of a row. A checkpoint asks a tensor only for its boxes, so it saves and loads these in place,
from and to any other layout, and nothing is gathered.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

Box = tuple[tuple[int, ...], tuple[int, ...]]  # where it begins in the tensor, and its sizes


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Cut the flat range [start, stop) of a contiguous tensor of `shape` into boxes, in flat order: at most 2 ndim - 1."""
    if start >= stop:
        return
    if len(shape) < 2:
        yield (start,) * len(shape), (stop - start,) * len(shape)
        return
    inner, row = shape[1:], math.prod(shape[1:])
    first, begin = divmod(start, row)
    if begin:  # the range begins inside a row: to the end of that row
        cut = min(stop, (first + 1) * row)
        yield from _in_row(inner, first, begin, begin + cut - start)
        first, start = first + 1, cut
    rows = (stop - start) // row
    if rows > 0:
        yield (first, *(0 for _ in inner)), (rows, *inner)
        first, start = first + rows, start + rows * row
    yield from _in_row(inner, first, 0, stop - start)


def _in_row(inner: Sequence[int], row: int, start: int, stop: int) -> Iterator[Box]:
    for offset, sizes in boxes(inner, start, stop):
        yield (row, *offset), (1, *sizes)


class Pieces(torch.Tensor):
    """What this rank holds of a global tensor. A tensor only in name: it has shape, dtype and device, but computes nothing.

    Args:
        shape: of the global tensor.
        dtype: of all views, also where this rank has none.
        device: of the whole tensor that `full` makes.
        views: where it begins in the global tensor -> live view, for each box.
        counts: whether this rank's views are the ones to count, where several ranks hold the same numbers.
    """

    views: Mapping[tuple[int, ...], torch.Tensor]
    counts: bool

    @staticmethod
    def __new__(
        cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device, views: Mapping[tuple[int, ...], torch.Tensor],
        counts: bool = True,
    ) -> Pieces:  # fmt: skip
        self = torch.Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=dtype, device=device)
        self.views, self.counts = {torch.Size(offset): view for offset, view in views.items()}, counts
        return self  # type: ignore[no-any-return]

    def __repr__(self) -> str:  # type: ignore[override]
        parts = ", ".join(f"{list(view.shape)} at {list(offset)}" for offset, view in self.views.items())
        return f"Pieces({list(self.shape)}: {parts})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"{func}: a Pieces holds parts of a tensor and computes nothing; use its views, or full()")

    @staticmethod
    def of_range(
        shape: Sequence[int], local_shape: Sequence[int], offset: Sequence[int], start: int, flat: torch.Tensor,
        device: torch.device, counts: bool = True,
    ) -> Pieces:  # fmt: skip
        """`flat` (1-d) is the range from `start` of a local tensor that itself begins at `offset` of the global one."""
        views, done = {}, 0
        for place, sizes in boxes(local_shape, start, start + flat.numel()):
            numel = math.prod(sizes)
            views[tuple(map(sum, zip(offset, place, strict=True)))] = flat[done : done + numel].view(sizes)
            done += numel
        return Pieces(shape, flat.dtype, device, views, counts)

    def full(self) -> torch.Tensor:
        """The whole tensor on every rank; collective over all of them."""
        out = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        if self.counts:
            for offset, view in self.views.items():
                out[tuple(slice(o, o + s) for o, s in zip(offset, view.shape, strict=True))] = view
        if dist.is_initialized():
            dist.all_reduce(out)  # each number comes from one rank, all others add 0: bitwise
        return out
