"""Words of a text as 64-bit hashes, in plain numpy: what a shingle is made of. `kernel.py` is the same, compiled.

A word is a match of `re.findall(r"\\w+", text.lower())`, in any script. Its hash is the polynomial sum of its lowered code
points c: sum c_i P^(L-1-i) mod 2^64, mixed. A shingle is n words in a row (Broder, 1997), its hash the polynomial sum of theirs.
"""

from __future__ import annotations

import re
import sys
from functools import cache

import numpy as np

P = 0x9E3779B97F4A7C55  # odd, so it has an inverse modulo 2^64
C = 0xD6E8FEB86659FD93
U64 = np.uint64
INVERSE = pow(P, -1, 1 << 64)
AWKWARD = "\u0130\u03a3"  # lowered to two code points, and by what stands around: only `str.lower` knows
ASK, AWAY = 0xFFFFFFFF, 0xFF  # in `folded`: it is one of these; this byte is no ASCII


def mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele et al., 2014) on u64: a bijection, so it adds no collision."""
    x = (x ^ (x >> U64(30))) * U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> U64(27))) * U64(0x94D049BB133111EB)
    return x ^ (x >> U64(31))


@cache
def tables() -> tuple[np.ndarray, np.ndarray]:
    """(0x110000,) bool: is it part of a word; (0x110000,) u32: its lower case. Of lowered text, for `AWKWARD`."""
    letters = np.arange(sys.maxunicode + 1, dtype="<u4").tobytes().decode("utf-32-le", "surrogatepass")
    is_word = np.zeros(sys.maxunicode + 1, dtype=np.bool_)
    for found in re.finditer(r"\w+", letters):
        is_word[found.start() : found.end()] = True
    lowered = letters.replace(AWKWARD[0], "_").replace(AWKWARD[1], "_").lower()
    lower = np.frombuffer(lowered.encode("utf-32-le", "surrogatepass"), np.uint32).copy()
    assert len(lower) == len(is_word)
    return is_word, lower


@cache
def folded() -> tuple[np.ndarray, np.ndarray]:
    """`tables` as one: (256,) u8 by byte, and (0x110000,) u32 by code point: its lower case, 0 where that is no part of a word."""
    is_word, lower = tables()
    letters = np.where(is_word[lower], lower, 0).astype(np.uint32)
    letters[[ord(letter) for letter in AWKWARD]] = ASK
    return np.where(np.arange(256) < 128, letters[:256], AWAY).astype(np.uint8), letters


@cache
def _powers(base: int, count: int) -> np.ndarray:
    """(count,) u64: base^0, base^1, ... modulo 2^64."""
    x = np.full(count, base, dtype=U64)
    x[0] = 1
    return np.cumprod(x, dtype=U64)


def _up(n: int) -> int:
    return 1 << max(n, 4096).bit_length()


def word_hashes(text: str) -> np.ndarray:
    """(W,) u64: the hash of each word of a text, in order."""
    points = np.frombuffer(text.lower().encode("utf-32-le", "surrogatepass"), np.uint32)
    is_word = np.concatenate([[False], tables()[0][points], [False]])
    edges = np.flatnonzero(is_word[1:] != is_word[:-1])
    starts, ends = edges[::2], edges[1::2]
    sums = np.zeros(len(points) + 1, dtype=U64)
    np.cumsum(points * _powers(INVERSE, _up(len(points)))[: len(points)], dtype=U64, out=sums[1:])
    return mix((sums[ends] - sums[starts]) * _powers(P, _up(len(points)))[ends - 1])


def shingle_hashes(text: str, n: int) -> np.ndarray:
    """(max(W - n + 1, 0),) u64: the hash of each run of n words, in order, repeated ones too."""
    words = word_hashes(text)
    count = len(words) - n + 1
    if count <= 0:
        return np.zeros(0, dtype=U64)
    total = np.zeros(count, dtype=U64)
    for k in range(n):
        total = total * U64(C) + words[k : k + count]
    return mix(total)


def different(hashes: np.ndarray) -> np.ndarray:
    """Sorted, each once. numpy sorts with vector instructions, ten times as fast as numba."""
    found = np.sort(hashes)
    return found[np.concatenate([[True], found[1:] != found[:-1]])] if len(found) else found


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """|A and B| / |A or B| of two sets, each given by its sorted, different elements; 0 of two empty ones."""
    both = len(np.intersect1d(a, b, assume_unique=True))
    whole = len(a) + len(b) - both
    return both / whole if whole else 0.0
