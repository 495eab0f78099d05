"""The same as `words.py` and `signatures.py`, compiled by numba (an optional package) the first time it runs on a machine.

Texts come as UTF-8 in one array, document i at [starts[i], starts[i + 1]). The two tables are those of `words.tables`.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from megatron_scratch.corpus.dedup.words import C as C_INT
from megatron_scratch.corpus.dedup.words import P as P_INT

P, C = np.uint64(P_INT), np.uint64(C_INT)
FIRST, SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
S27, S30, S31, S32, ONE = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(32), np.uint64(1)
ZERO = np.uint64(0)


@njit(inline="always")
def _mix(x):
    x = (x ^ (x >> S30)) * FIRST
    x = (x ^ (x >> S27)) * SECOND
    return x ^ (x >> S31)


@njit(cache=True)
def _shingles(text, begin, end, n, power, is_word, lower, ring, out):
    """Hashes of the shingles of text[begin:end] to `out`; returns their number. `power` is C^n; `ring` (n,) is scratch."""
    words, count, slot = 0, 0, 0
    word, total, inside = ZERO, ZERO, False
    i = begin
    while i <= end:
        c = np.uint32(0)
        step = 1
        if i < end:
            b = np.uint32(text[i])
            if b < 128:
                c = b
            elif b < 224:
                c = (b & 31) << 6 | np.uint32(text[i + 1]) & 63
                step = 2
            elif b < 240:
                c = (b & 15) << 12 | (np.uint32(text[i + 1]) & 63) << 6 | np.uint32(text[i + 2]) & 63
                step = 3
            else:
                c = ((b & 7) << 18 | (np.uint32(text[i + 1]) & 63) << 12 | (np.uint32(text[i + 2]) & 63) << 6
                     | np.uint32(text[i + 3]) & 63)  # fmt: skip
                step = 4
        i += step
        low = lower[c]
        if is_word[low]:
            word = word * P + np.uint64(low)
            inside = True
        elif inside:
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
            word, inside = ZERO, False
    return count


@njit(cache=True)
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


@njit(cache=True)
def signatures(text, starts, n, power, is_word, lower, a, b, out, counts):
    """`out` (D, K) u32, filled with 2^32 - 1 before; `counts` (D,) i64: shingles of each document."""
    longest = 1
    for d in range(len(starts) - 1):
        longest = max(longest, starts[d + 1] - starts[d])
    hashes, ring = np.empty(longest // 2 + 1, np.uint64), np.empty(n, np.uint64)
    for d in range(len(starts) - 1):
        counts[d] = _shingles(text, starts[d], starts[d + 1], n, power, is_word, lower, ring, hashes)
        _minima(hashes, counts[d], a, b, out[d])


@njit(cache=True)
def shingle_set(text, n, power, is_word, lower):
    """The hashes of the different shingles of one text, sorted."""
    out = np.empty(len(text) // 2 + 1, np.uint64)
    count = _shingles(text, 0, len(text), n, power, is_word, lower, np.empty(n, np.uint64), out)
    found = out[:count]
    found.sort()
    different = 0
    for i in range(count):
        if i == 0 or found[i] != found[different - 1]:
            found[different] = found[i]
            different += 1
    return found[:different].copy()


@njit(cache=True)
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


@njit(cache=True)
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
