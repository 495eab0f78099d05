"""MinHash signatures (Broder, 1997) and the keys of LSH bands (Indyk & Motwani, 1998) for batches of texts.

K = bands x rows hash functions h_j(x) = a_j x + b_j mod 2^32, x the upper half of a shingle's hash; a signature is the least
h_j over the shingles of a text. Two texts of Jaccard similarity s agree at each j with probability s, and share the key of at
least one band with 1 - (1 - s^rows)^bands. numba compiles the loop where it is installed; the numpy twin gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import numpy as np

from megatron_scratch.corpus.dedup.words import U64, C, different, folded, jaccard, mix, shingle_hashes

EMPTY = 0xFFFFFFFF  # in a signature without shingles
KEY_BITS = 40  # of a band's key; the place in the shard takes the other 24 bits of a word that sorts fast
PLACE_BITS = 64 - KEY_BITS
BLOCK = 1 << 15  # shingles per pass of the numpy twin: 128 KiB, which stay in L2


@dataclass(frozen=True)
class MinHash:
    """bands x rows hash functions over shingles of `ngram` words."""

    bands: int
    rows: int
    ngram: int
    seed: int

    @property
    def size(self) -> int:
        return self.bands * self.rows

    def multipliers(self) -> tuple[np.ndarray, np.ndarray]:
        """(a, b), each (K,) u32, a odd."""
        x = mix(np.arange(1, 2 * self.size + 1, dtype=U64) * U64(C) + U64(self.seed))
        x = (x >> U64(32)).astype(np.uint32)
        return x[: self.size] | np.uint32(1), x[self.size :].copy()


def compiled() -> bool:
    """Whether numba is installed."""
    return find_spec("numba") is not None


def signatures(text: np.ndarray, starts: np.ndarray, kind: MinHash, fast: bool | None = None) -> tuple[np.ndarray, np.ndarray]:
    """((D, K) u32 signatures, (D,) i64 shingles) of the texts that lie in `text` (bytes,) u8 at `starts` (D + 1,) i64.

    Args:
        fast: True: compiled; False: numpy; None: compiled where numba is installed.
    """
    counts = np.zeros(len(starts) - 1, np.int64)
    out = np.full((len(starts) - 1, kind.size), EMPTY, np.uint32)
    run = _compiled if (compiled() if fast is None else fast) else _numpy
    run(np.asarray(text), starts, kind, out, counts)
    return out, counts


def _compiled(text: np.ndarray, starts: np.ndarray, kind: MinHash, out: np.ndarray, counts: np.ndarray) -> None:
    """The compiled loop lowers letter by letter; texts with a letter of `AWKWARD` are lowered by Python, and done again."""
    from megatron_scratch.corpus.dedup import kernel

    settings = (kind.ngram, U64(pow(C, kind.ngram, 1 << 64)), *folded(), *kind.multipliers())
    kernel.signatures(text, starts, *settings, out, counts)
    again = np.flatnonzero(counts < 0)
    if len(again):
        lowered = [_lowered(text[starts[i] : starts[i + 1]].tobytes()) for i in again]
        ends = np.cumsum([0, *map(len, lowered)], dtype=np.int64)
        found, number = np.full((len(again), kind.size), EMPTY, np.uint32), np.zeros(len(again), np.int64)
        kernel.signatures(np.frombuffer(b"".join(lowered), np.uint8), ends, *settings, found, number)
        out[again], counts[again] = found, number


def _lowered(raw: bytes) -> bytes:
    return raw.decode("utf-8").lower().encode()


def _numpy(text: np.ndarray, starts: np.ndarray, kind: MinHash, out: np.ndarray, counts: np.ndarray) -> None:
    a, b = kind.multipliers()
    for d in range(len(starts) - 1):
        hashes = shingle_hashes(text[starts[d] : starts[d + 1]].tobytes().decode("utf-8"), kind.ngram)
        counts[d] = len(hashes)
        x = (hashes >> U64(32)).astype(np.uint32)
        for i in range(0, len(x), BLOCK):
            block = x[i : i + BLOCK]
            for j in range(kind.size):
                out[d, j] = min(out[d, j], (block * a[j] + b[j]).min())


@cache
def comparer(ngram: int, fast: bool | None = None) -> tuple[Callable[[bytes], np.ndarray], Callable[..., float]]:
    """(UTF-8 text -> (n,) u64, the hashes of its different shingles, sorted; two of these -> their Jaccard similarity)."""
    if not (compiled() if fast is None else fast):
        return lambda raw: different(shingle_hashes(raw.decode("utf-8"), ngram)), jaccard
    from megatron_scratch.corpus.dedup import kernel

    settings = (ngram, U64(pow(C, ngram, 1 << 64)), *folded())

    def shingles(raw: bytes) -> np.ndarray:
        found = np.empty(len(raw) // 2 + 1, U64)
        count = kernel.shingles(np.frombuffer(raw, np.uint8), *settings, found)
        return different(found[:count]) if count >= 0 else shingles(_lowered(raw))

    return shingles, kernel.jaccard


def band_keys(signature: np.ndarray, kind: MinHash) -> np.ndarray:
    """(bands, D) u64 below 2^KEY_BITS: a hash of each band's rows."""
    rows = signature.reshape(len(signature), kind.bands, kind.rows).astype(U64)
    total = np.broadcast_to(np.arange(1, kind.bands + 1, dtype=U64)[:, None], (kind.bands, len(signature))).copy()
    for r in range(kind.rows):
        total = mix(total * U64(C) + rows[:, :, r].T)
    return total >> U64(PLACE_BITS)


def least_agreement(kind: MinHash, threshold: float) -> int:
    """The rows of two signatures that must agree before their texts are compared: five standard deviations below the mean of a
    pair that is just similar enough, which so is passed over once in 3 million times."""
    mean, deviation = kind.size * threshold, (kind.size * threshold * (1 - threshold)) ** 0.5
    return max(0, int(mean - 5 * deviation))
