"""Numbers of a saved tensor, a box at a time: of any dtype, however its chunks were cut, in little memory. No torch.

A box is (offset, shape) in the global tensor. A checkpoint's chunks are boxes; where two checkpoints cut a tensor differently, what
one chunk of each has in common is a box of both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from megatron_scratch.checkpoint.manifest import DTYPES, Chunk, CorruptCheckpoint, Saved
from megatron_scratch.checkpoint.place import PIECE, Place

Index = tuple[int, ...]
Box = tuple[Index, Index]  # offset, shape

FLOATS = {"float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"}


def common(a: Chunk, b: Chunk) -> Box:
    """What two chunks of one tensor that overlap have in common."""
    begin = tuple(max(x, y) for x, y in zip(a.offset, b.offset, strict=True))
    end = [min(x + n, y + m) for x, n, y, m in zip(a.offset, a.shape, b.offset, b.shape, strict=True)]
    return begin, tuple(high - low for low, high in zip(begin, end, strict=True))


def span(chunk: Chunk, box: Box) -> tuple[int, int]:
    """From which to which of a chunk's numbers a box of it reaches: those between belong to it or to its neighbours."""
    inside = [o - c for o, c in zip(box[0], chunk.offset, strict=True)]
    first = last = 0
    for low, length, size in zip(inside, box[1], chunk.shape, strict=True):
        first, last = first * size + low, last * size + low + length - 1
    return first, last + 1


def pieces(box: Box, *chunks: Chunk, limit: int) -> Iterator[Box]:
    """Cut a box until none of the chunks has to be read for more than `limit` numbers at once."""
    offset, shape = box
    if math.prod(shape) == 0:
        return
    longest = max(end - begin for begin, end in (span(chunk, box) for chunk in chunks))
    dim = next((d for d, n in enumerate(shape) if n > 1), None)
    if longest <= limit or dim is None:
        yield box
        return
    parts = min(shape[dim], -(-longest // limit))
    for part in range(parts):
        low, high = shape[dim] * part // parts, shape[dim] * (part + 1) // parts
        cut = (*offset[:dim], offset[dim] + low, *offset[dim + 1 :]), (*shape[:dim], high - low, *shape[dim + 1 :])
        yield from pieces(cut, *chunks, limit=limit)


def read_box(place: Place, dtype: str, chunk: Chunk, box: Box) -> np.ndarray:
    """The numbers of a box that lies in a chunk, as they are stored: bfloat16 and 8-bit floats as unsigned integers.

    Raises:
        CorruptCheckpoint: the file ends before.
    """
    stored = np.dtype(DTYPES[dtype][1])
    begin, end = span(chunk, box)
    content = place.read(chunk.file, chunk.at + begin * stored.itemsize, (end - begin) * stored.itemsize)
    if len(content) != (end - begin) * stored.itemsize:
        raise CorruptCheckpoint(f"{place / chunk.file}: shorter than its manifest says")
    flat = np.frombuffer(content, stored)
    strides, step = [], stored.itemsize
    for size in reversed(chunk.shape):
        strides.insert(0, step)
        step *= size
    # The first number of the span is the box's first; from there its rows lie as far apart as the chunk's.
    return np.lib.stride_tricks.as_strided(flat, box[1], strides, writeable=False)


def numbers(place: Place, saved: Saved) -> Iterator[tuple[Box, np.ndarray]]:
    """All of a tensor, a box at a time; as float64 it takes at most PIECE bytes."""
    for chunk in saved.chunks:
        for box in pieces((chunk.offset, chunk.shape), chunk, limit=PIECE // 8):
            yield box, read_box(place, saved.dtype, chunk, box)


def common_boxes(a: Saved, b: Saved) -> Iterator[tuple[Chunk, Chunk, Box]]:
    """Two chunkings of one tensor, cut to boxes that lie in one chunk of each; as float64 one takes at most PIECE bytes."""
    begins = np.array([c.offset for c in b.chunks], np.int64).reshape(len(b.chunks), len(b.shape))
    ends = begins + np.array([c.shape for c in b.chunks], np.int64).reshape(begins.shape)
    for mine in a.chunks:  # of a thousand chunks a side, so that a million pairs are not looked at one by one
        end = np.add(mine.offset, mine.shape)
        for number in np.flatnonzero(((begins < end) & (ends > mine.offset)).all(axis=1)):
            other = b.chunks[number]
            for piece in pieces(common(mine, other), mine, other, limit=PIECE // 8):
                yield mine, other, piece


def as_float64(values: np.ndarray, dtype: str) -> np.ndarray:
    """Stored numbers as float64; exact, but of integers beyond 2^53."""
    with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
        return _decoded(values, dtype)


def _decoded(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":  # the upper half of a float32
        return (values.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if dtype == "float8_e5m2":  # the upper half of a float16
        return (values.astype(np.uint16) << 8).view(np.float16).astype(np.float64)
    if dtype == "float8_e4m3fn":
        return _E4M3[values]
    return values.astype(np.float64)


def _e4m3() -> np.ndarray:
    """All 256 numbers: sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinities, a NaN of each sign (arXiv 2209.05433)."""
    bits = np.arange(256)
    exponent, mantissa = (bits >> 3) & 15, bits & 7
    value = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    return np.where(bits & 127 == 127, np.nan, value * np.where(bits & 128, -1.0, 1.0))


_E4M3 = _e4m3()
