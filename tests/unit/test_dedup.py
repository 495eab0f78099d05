"""Near-deduplication against brute force: words, signatures, pairs, stars; compiled and plain numpy give the same numbers."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_scratch.corpus.dedup import minhash, order
from megatron_scratch.corpus.dedup.removals import kept_mask, read_range, removals
from megatron_scratch.corpus.dedup.signatures import (
    EMPTY,
    MinHash,
    band_keys,
    comparer,
    compiled,
    least_agreement,
    signatures,
)
from megatron_scratch.corpus.dedup.words import AWKWARD, C, P, shingle_hashes, tables, word_hashes
from megatron_scratch.corpus.stages import Outputs

KIND = MinHash(28, 4, 5, 1)
needs_numba = pytest.mark.skipif(not compiled(), reason="numba is not installed")
TEXTS = [
    "Hello World foo bar baz Qux", "a b c d", "", "one", "x " * 100, "the quick brown fox " * 50,
    "na\u00efve \u00c4rger \u201cquoted\u201d \u2014 die Gr\u00f6\u00dfe \u00c9COLE x_1 \uff12\uff13 \u4e2d\u6587 \u5b57 ok",
    "\u0130stanbul \u03a3\u03af\u03c3\u03c5\u03c6\u03bf\u03a3 \u039f\u0394\u039f\u03a3 x y z w v",  # by what follows
    "\u212a Kelvin \ufb01 \U0001f600 \U00010400 word word2 word3 word4",
    "tab\tand\u00a0no-break\u2028line \x00 nul \ufeff bom a b c d e",
]  # fmt: skip


def packed(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    raw = [text.encode() for text in texts]
    return np.frombuffer(b"".join(raw), np.uint8), np.cumsum([0, *map(len, raw)], dtype=np.int64)


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def shingle_set(text: str, n: int = 5) -> set[str]:
    words = words_of(text)
    return {" ".join(words[i : i + n]) for i in range(len(words) - n + 1)}


def made_up(seed: int, count: int) -> list[str]:
    """Texts of which some are edits of others."""
    rng = random.Random(seed)
    vocabulary = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz\u00e9\u03b1", k=rng.randint(1, 9))) for _ in range(500)]
    texts: list[list[str]] = []
    for _ in range(count):
        if texts and rng.random() < 0.5:
            words = list(rng.choice(texts))
            for _ in range(rng.choice([0, 1, 2, 5, 20])):
                words[rng.randrange(len(words))] = rng.choice(vocabulary)
        else:
            words = rng.choices(vocabulary, k=rng.randint(3, 120))
        texts.append(words)
    return [" ".join(words) for words in texts]


def test_tables_are_pythons() -> None:
    is_word, lower = tables()
    for code in [*range(0x3000), *range(0xD800, 0xE100), 0x10400, 0x1E900, 0x10FFFF]:
        letter = chr(code)
        assert is_word[code] == bool(re.match(r"\w", letter)), hex(code)
        if letter not in AWKWARD:
            assert chr(lower[code]) == letter.lower(), hex(code)
            assert letter.lower().lower() == letter.lower()  # so a text that Python lowered can be lowered again


def test_word_and_shingle_hashes_are_the_polynomials_that_they_are_said_to_be() -> None:
    def mixed(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    for text in TEXTS:
        want = [mixed(sum(ord(c) * pow(P, len(w) - 1 - i, 2**64) for i, c in enumerate(w)) % 2**64) for w in words_of(text)]
        assert word_hashes(text).tolist() == want
        runs = [want[i : i + 3] for i in range(len(want) - 2)]
        assert shingle_hashes(text, 3).tolist() == [mixed((a * C * C + b * C + c) % 2**64) for a, b, c in runs]


@needs_numba
@pytest.mark.parametrize("ngram", [1, 2, 5, 13])
def test_compiled_is_numpy(ngram: int) -> None:
    texts = TEXTS + made_up(ngram, 60)
    kind = MinHash(5, 3, ngram, 7)
    fast, slow = (signatures(*packed(texts), kind, fast=fast) for fast in (True, False))
    assert np.array_equal(fast[0], slow[0]) and np.array_equal(fast[1], slow[1])
    (set_of, jaccard), (slow_set_of, slow_jaccard) = comparer(ngram, True), comparer(ngram, False)
    sets = [set_of(text.encode()) for text in texts]
    for text, found in zip(texts, sets, strict=True):
        assert np.array_equal(found, slow_set_of(text.encode()))
    for a, b in zip(sets, sets[1:], strict=False):
        assert jaccard(a, b) == slow_jaccard(a, b)


@needs_numba
def test_it_compiles_where_nothing_can_be_kept() -> None:
    """As in a read-only image without a home."""
    code = ("from megatron_scratch.corpus.dedup.signatures import comparer; of, jaccard = comparer(2, True); "
            "print(jaccard(of(b'a b c'), of(b'a b d')))")  # fmt: skip
    nowhere = os.environ | {"NUMBA_CACHE_LOCATOR_CLASSES": "ZipCacheLocator"}  # only a package in a .zip would have one
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=nowhere)
    assert done.stdout == f"{1 / 3}\n", done.stderr


@pytest.mark.parametrize("fast", [pytest.param(True, marks=needs_numba), False])
def test_jaccard_is_that_of_the_sets_of_words(fast: bool) -> None:
    texts = TEXTS + made_up(3, 80)
    set_of, jaccard = comparer(5, fast)
    found = [set_of(text.encode()) for text in texts]
    for i in range(len(texts)):
        for j in range(0, i, 7):
            a, b = shingle_set(texts[i]), shingle_set(texts[j])
            assert jaccard(found[i], found[j]) == (len(a & b) / len(a | b) if a | b else 0.0)


def test_a_signature_is_the_least_hash_and_texts_without_shingles_have_none() -> None:
    a, b = (x.astype(np.uint64) for x in KIND.multipliers())
    assert len(set(a.tolist())) == len(a) == 112 and (a % 2 == 1).all()
    found, counts = signatures(*packed(TEXTS), KIND)
    for text, row, count in zip(TEXTS, found, counts, strict=True):
        x = shingle_hashes(text, 5) >> np.uint64(32)
        assert count == len(x)
        want = [int(((ai * x + bi) % np.uint64(2**32)).min()) if len(x) else EMPTY for ai, bi in zip(a, b, strict=True)]
        assert row.tolist() == want


def test_rows_agree_as_often_as_texts_are_similar() -> None:
    """Mean agreement over 400 functions of a pair of J = 0.5: its standard deviation is sqrt(.25 / 400) = 0.025; five of them."""
    words = [f"w{i}" for i in range(3000)]
    one, other = " ".join(words[:2000]), " ".join(words[1000:])  # 1996 shingles each, 996 shared
    found, _ = signatures(*packed([one, other]), MinHash(100, 4, 5, 11))
    want = 996 / (2 * 1996 - 996)
    assert abs((found[0] == found[1]).mean() - want) < 5 * (want * (1 - want) / 400) ** 0.5


def test_bands_collide_as_the_curve_says() -> None:
    """1 - (1 - s^r)^b over 300 pairs of one similarity, within five standard deviations."""
    rng = random.Random(5)
    texts = []
    for _ in range(300):
        words = [f"w{rng.randrange(10**9)}" for _ in range(200)]
        changed = list(words)
        for k in range(0, 200, 25):  # 8 words, 5 shingles each: 156 of 196 shared, J = 156 / 236
            changed[k + 10] = f"v{rng.randrange(10**9)}"
        texts += [" ".join(words), " ".join(changed)]
    kind = MinHash(14, 8, 5, 3)
    keys = band_keys(signatures(*packed(texts), kind)[0], kind)
    share = (keys[:, ::2] == keys[:, 1::2]).any(axis=0).mean()
    s = 156 / 236
    want = 1 - (1 - s**8) ** 14
    assert abs(share - want) < 5 * (want * (1 - want) / 300) ** 0.5


def test_least_agreement_misses_one_in_millions() -> None:
    from math import comb

    least = least_agreement(KIND, 0.8)
    missed = sum(comb(112, k) * 0.8**k * 0.2 ** (112 - k) for k in range(least))
    assert missed < 1e-6 and least > 60 and least_agreement(KIND, 0.0) == 0


@pytest.mark.parametrize("fast", [pytest.param(True, marks=needs_numba), False])
def test_star_is_the_greedy_rule(fast: bool) -> None:
    """Each document in order: gone if one that stays is similar, in favour of the most similar."""
    rng = np.random.default_rng(2)
    pairs = sorted({tuple(sorted(map(int, rng.choice(200, 2, replace=False)), reverse=True)) for _ in range(600)})
    later, earlier = (np.array(column) for column in zip(*pairs, strict=True))
    similarity = rng.integers(80, 100, len(pairs)) / 100
    want: dict[int, tuple[int, float]] = {}
    for d in range(200):
        found = [(s, -e) for (a, e), s in zip(pairs, similarity.tolist(), strict=True) if a == d and e not in want]
        if found:
            s, e = max(found)
            want[d] = (-e, s)
    gone = np.zeros(200 // 8 + 1, np.uint8)
    cut = int(np.searchsorted(later, 120))  # two blocks, as from two tasks
    got = [minhash._star(later[part], earlier[part], similarity[part], gone, fast) for part in (slice(0, cut), slice(cut, None))]
    assert {int(d): (int(k), float(s)) for block in got for d, k, s in zip(*block, strict=True)} == want
    assert [d for d in range(200) if gone[d >> 3] >> (d & 7) & 1] == sorted(want)


def test_removals_are_read_by_range(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).permutation(1000)[:300]
    out = Outputs(tmp_path, 0)
    for k in range(3):
        out.save(f"{k}.removed.npy", removals(numbers[k::3], numbers[k::3] + 5000, 0.9))
    paths = [str(out.path(f"{k}.removed.npy")) for k in range(3)]
    assert read_range(paths, 0, 1000)["document"].tolist() == sorted(numbers.tolist())
    assert np.flatnonzero(~kept_mask(paths, 100, 450)).tolist() == sorted(int(n) - 100 for n in numbers if 100 <= n < 450)


def test_pairs_are_sorted_and_unique_by_number_and_by_key() -> None:
    rng = np.random.default_rng(1)
    for shift in (0, 40):
        later, earlier = rng.integers(0, 50, (2, 2000)).astype(np.uint64) << np.uint64(shift)
        got = order.unique_pairs(later, earlier)
        assert list(zip(*(x.tolist() for x in got), strict=True)) == sorted(set(zip(later.tolist(), earlier.tolist(), strict=True)))
