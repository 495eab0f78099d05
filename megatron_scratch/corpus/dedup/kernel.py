"""The same as `words.py` and `signatures.py`, compiled by numba (an optional package) the first time it runs on a machine.

Texts come as UTF-8 in one array, document i at [starts[i], starts[i + 1]). `ascii` and `letters` are those of `words.folded`.
Types are given, so that an array of another type is an error and not a compilation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import f8, i8, njit, types, u1, u4, u8, void

from megatron_scratch.corpus.dedup.words import ASK, AWAY
from megatron_scratch.corpus.dedup.words import C as C_INT
from megatron_scratch.corpus.dedup.words import P as P_INT

P, C = np.uint64(P_INT), np.uint64(C_INT)
FIRST, SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
S27, S30, S31, S32, ZERO = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(32), np.uint64(0)


def _read(kind: types.Type) -> types.Type:
    """A vector that may not be written to."""
    return types.Array(kind, 1, "C", readonly=True)


def _kept(signature: Any) -> Callable[[Any], Any]:
    """Compile, for all processes on this machine to come if there is a folder to keep it in."""

    def decorate(function: Any) -> Any:
        try:
            return njit(signature, cache=True)(function)
        except RuntimeError:  # neither the folder of this file nor the user's cache can be written to: each process takes seconds
            return njit(signature)(function)

    return decorate


TEXT, TABLES = _read(u1), (_read(u1), _read(u4))


@njit(inline="always")
def _mix(x):
    x = (x ^ (x >> S30)) * FIRST
    x = (x ^ (x >> S27)) * SECOND
    return x ^ (x >> S31)


@njit
def _shingles(text, begin, end, n, power, ascii, letters, ring, out):
    """Hashes of the shingles of text[begin:end] to `out`; returns their number, or -1 for a text that only Python can lower.
    `power` is C^n; `ring` (n,) is scratch."""
    words, count, slot, step, i = 0, 0, 0, 1, begin
    total = ZERO
    while i < end:
        word, start = ZERO, i
        while i < end:  # a word
            step = 1
            low = np.uint32(ascii[text[i]])
            if low == AWAY:
                b = np.uint32(text[i])
                if b < 224:
                    c = (b & 31) << 6 | np.uint32(text[i + 1]) & 63
                    step = 2
                elif b < 240:
                    c = (b & 15) << 12 | (np.uint32(text[i + 1]) & 63) << 6 | np.uint32(text[i + 2]) & 63
                    step = 3
                else:
                    c = ((b & 7) << 18 | (np.uint32(text[i + 1]) & 63) << 12 | (np.uint32(text[i + 2]) & 63) << 6
                         | np.uint32(text[i + 3]) & 63)  # fmt: skip
                    step = 4
                low = letters[c]
                if low == ASK:
                    return -1
            if low == 0:
                break
            word = word * P + np.uint64(low)
            i += step
        if i > start:
            hashed = _mix(word)
            total = total * C + hashed
            if words >= n:
                total -= ring[slot] * power
            ring[slot] = hashed
            slot = slot + 1 if slot + 1 < n else 0
            words += 1
            if words >= n:
                out[count] = _mix(total)
                count += 1
        i += step  # what ended it, or beyond the end
    return count


@njit
def _minima(hashes, count, a, b, row):
    """row[j] = min over x of (a[j] x + b[j]) mod 2^32, x the upper half of each hash; four at a time, so that row stays in L1."""
    k = len(a)
    i = 0
    while i + 4 <= count:
        x0, x1 = np.uint32(hashes[i] >> S32), np.uint32(hashes[i + 1] >> S32)
        x2, x3 = np.uint32(hashes[i + 2] >> S32), np.uint32(hashes[i + 3] >> S32)
        for j in range(k):
            first = min(np.uint32(a[j] * x0 + b[j]), np.uint32(a[j] * x1 + b[j]))
            second = min(np.uint32(a[j] * x2 + b[j]), np.uint32(a[j] * x3 + b[j]))
            row[j] = min(row[j], min(first, second))
        i += 4
    while i < count:
        x0 = np.uint32(hashes[i] >> S32)
        for j in range(k):
            row[j] = min(row[j], np.uint32(a[j] * x0 + b[j]))
        i += 1


@_kept(void(TEXT, _read(i8), i8, u8, *TABLES, _read(u4), _read(u4), u4[:, ::1], i8[::1]))
def signatures(text, starts, n, power, ascii, letters, a, b, out, counts):
    """`out` (D, K) u32, filled with 2^32 - 1 before; `counts` (D,) i64: shingles of each document, -1 if Python has to lower it."""
    longest = 1
    for d in range(len(starts) - 1):
        longest = max(longest, starts[d + 1] - starts[d])
    hashes, ring = np.empty(longest // 2 + 1, np.uint64), np.empty(n, np.uint64)
    for d in range(len(starts) - 1):
        counts[d] = _shingles(text, starts[d], starts[d + 1], n, power, ascii, letters, ring, hashes)
        _minima(hashes, counts[d], a, b, out[d])


@_kept(i8(TEXT, i8, u8, *TABLES, u8[::1]))
def shingles(text, n, power, ascii, letters, out):
    """The hashes of one text's shingles to `out`; returns their number, -1 if Python has to lower it."""
    return _shingles(text, 0, len(text), n, power, ascii, letters, np.empty(n, np.uint64), out)


@_kept(f8(_read(u8), _read(u8)))
def jaccard(a, b):
    """`words.jaccard`."""
    i = j = both = 0
    while i < len(a) and j < len(b):
        if a[i] < b[j]:
            i += 1
        elif a[i] > b[j]:
            j += 1
        else:
            both += 1
            i += 1
            j += 1
    whole = len(a) + len(b) - both
    return both / whole if whole else 0.0


@_kept(i8(_read(i8), _read(i8), _read(f8), u1[::1], i8[::1], i8[::1], f8[::1]))
def star(later, earlier, similarity, gone, document, kept, how):
    """`minhash.star` over one block of pairs sorted by `later`; fills the last three, returns their number."""
    count = i = 0
    while i < len(later):
        d, best, who = later[i], -1.0, np.int64(-1)
        while i < len(later) and later[i] == d:
            e = earlier[i]
            if similarity[i] > best and not (gone[e >> 3] >> (e & 7)) & 1:
                best, who = similarity[i], e
            i += 1
        if who >= 0:
            gone[d >> 3] |= np.uint8(1 << (d & 7))
            document[count], kept[count], how[count] = d, who, best
            count += 1
    return count
