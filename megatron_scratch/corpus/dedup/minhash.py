"""Near copies by MinHash-LSH: sign every document, pair those that share a band, compare the texts, keep the first of each star.

    sign   a shard of documents           -> signatures, and the keys of its bands, sorted
    pair   ranges of (band, key)          -> pairs of documents with one key, sorted
    check  a range of the later document  -> the pairs whose texts are similar enough, with their Jaccard similarity
    star   all confirmed pairs, in order  -> who goes, and in favour of whom

Memory is bounded by the size of a task at each step but the last, which has one bit per document.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np

from megatron_scratch.corpus.dedup.order import LOW, number_of, orders, unique_pairs
from megatron_scratch.corpus.dedup.removals import kept_mask, removals
from megatron_scratch.corpus.dedup.signatures import PLACE_BITS, MinHash, band_keys, comparer, compiled, least_agreement, signatures
from megatron_scratch.corpus.dedup.words import U64
from megatron_scratch.corpus.stages import Done, Outputs
from megatron_scratch.corpus.store import Store

KEYS = 1 << 22  # band keys per task of `pair`: 100 MB
PAIRS = 1 << 21  # candidate pairs per task of `check`
RUN = 1 << 23  # pairs held before they are written as one sorted run
CHUNK = 1 << 16  # pairs whose signatures are compared at once: 60 MB
CACHE = 1 << 13  # documents whose shingles are remembered while comparing: 40 MB for web pages
PLACE = U64((1 << PLACE_BITS) - 1)


# sign


def sign(outputs: Outputs, store: dict[str, Any], shard: int, removed: list[str], kind: dict[str, int]) -> dict[str, Any]:
    """`signatures.npy` (n, K) u32, `numbers.npy` (n,) i64, `bands.npy` (bands, n) u64: key << PLACE_BITS | row, sorted.

    Documents without a shingle (fewer words than `ngram`) have no signature.
    """
    part, minhash = Store.of(store).shard(shard), MinHash(**kind)
    keep = kept_mask(removed, part.base, part.base + len(part))
    found, counts = signatures(part.text(), part.starts, minhash)  # of the copies, too: fewer than it costs to leave them out
    signed = keep & (counts > 0)
    found, numbers = found[signed], np.flatnonzero(signed) + part.base
    assert len(numbers) <= PLACE, "more documents in a shard than PLACE_BITS can number"
    words = band_keys(found, minhash) << U64(PLACE_BITS) | np.arange(len(numbers), dtype=U64)
    words.sort(axis=1)
    outputs.save("signatures.npy", found)
    outputs.save("numbers.npy", numbers)
    outputs.save("bands.npy", words)
    return {"documents": int(keep.sum()), "signed": len(numbers)}


# pair


def pair_tasks(signed: Done, kind: MinHash) -> list[dict[str, Any]]:
    """Ranges [low, high] of keys, several bands to a task or a band to several tasks, of about KEYS keys."""
    cuts = max(1, -(-signed.total("signed") // KEYS))
    edges = [(i << (64 - PLACE_BITS)) // cuts for i in range(cuts + 1)]
    ranges = [(band, edges[i], edges[i + 1]) for band in range(kind.bands) for i in range(cuts)]
    each = max(1, KEYS * cuts // max(1, signed.total("signed")))
    return [{"ranges": ranges[i : i + each]} for i in range(0, len(ranges), each)]


def pair(outputs: Outputs, store: dict[str, Any], signed: list[str], ranges: list[list[int]], partners: int, keep: str,
         priority: list[int]) -> dict[str, Any]:  # fmt: skip
    """`K.pairs.npy` (2, n) u64: the later and the earlier of each pair by `order.orders`, sorted, each once in a run.

    In a bucket of more than `partners` documents each is paired with the first `partners` of them: the work on a text that half
    of the corpus repeats stays linear, and it is found in favour of the first ones all the same.
    """
    shards, runs, held, total = Store.of(store), 0, [], 0
    for band, low, high in ranges:
        later, earlier = _bucket_pairs(shards, signed, band, low, high, partners, keep, priority)
        held.append((later, earlier))
        if sum(len(x) for x, _ in held) >= RUN:
            total += _flush(outputs, held, runs)
            held, runs = [], runs + 1
    if held:
        total += _flush(outputs, held, runs)
        runs += 1
    return {"runs": runs, "pairs": total}


def _flush(outputs: Outputs, held: list[tuple[np.ndarray, np.ndarray]], run: int) -> int:
    later, earlier = unique_pairs(*(np.concatenate(columns) for columns in zip(*held, strict=True)))
    outputs.save(f"{run}.pairs.npy", np.stack([later, earlier]))
    return len(later)


def _bucket_pairs(shards: Store, signed: list[str], band: int, low: int, high: int, partners: int, keep: str,
                  priority: list[int]) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    keys, numbers = _in_buckets(signed, band, low, high)
    order = orders(shards, numbers, keep, priority)
    by = np.lexsort((order, keys))
    keys, order = keys[by], order[by]
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))[: len(keys)]
    start_of = starts.repeat(np.diff(np.append(starts, len(keys))))
    place = np.arange(len(keys)) - start_of
    later, earlier = [np.empty(0, U64)], [np.empty(0, U64)]
    for k in range(partners):
        more = np.flatnonzero(place > k)
        if not len(more):
            break
        later.append(order[more])
        earlier.append(order[start_of[more] + k])
    return np.concatenate(later), np.concatenate(earlier)


def _in_buckets(signed: list[str], band: int, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
    """(keys, numbers) of the documents that share their key in this band with another."""
    keys, numbers = [np.empty(0, U64)], [np.empty(0, np.int64)]
    for stem in signed:
        words = np.load(f"{stem}.bands.npy", mmap_mode="r")[band]
        first, end = np.searchsorted(words, [U64(low << PLACE_BITS), U64((high << PLACE_BITS) - 1)])
        end += end < len(words) and words[end] == U64((high << PLACE_BITS) - 1)
        part = np.array(words[first:end])
        keys.append(part >> U64(PLACE_BITS))
        numbers.append(np.load(f"{stem}.numbers.npy", mmap_mode="r")[(part & PLACE).astype(np.int64)])
    key, number = np.concatenate(keys), np.concatenate(numbers)
    by = np.argsort(key, kind="stable")  # sorted runs: merging them is what a stable sort does
    key, number = key[by], number[by]
    same = key[1:] == key[:-1]
    shared = np.concatenate([[False], same]) | np.concatenate([same, [False]])
    return key[shared[: len(key)]], number[shared[: len(key)]]


# check


def runs(paired: Done) -> list[str]:
    return [paired.path(i, f"{run}.pairs.npy") for i, told in enumerate(paired.results) for run in range(told["runs"])]


def check_tasks(paired: Done) -> list[dict[str, Any]]:
    """Ranges of the later document with about PAIRS candidates each, cut at quantiles of a sample."""
    paths = runs(paired)
    count = max(1, -(-paired.total("pairs") // PAIRS))
    sample = np.sort(np.concatenate([np.empty(0, U64), *(_sampled(path) for path in paths)]))
    cuts = [int(sample[len(sample) * i // count]) for i in range(1, count)] if len(sample) else []
    edges = sorted({0, *cuts, 1 << 64})
    return [{"low": a, "high": b - 1} for a, b in zip(edges[:-1], edges[1:], strict=True)]


def _sampled(run: str) -> np.ndarray:
    later = np.load(run, mmap_mode="r")[0]
    return np.array(later[:: max(1, len(later) // 4096)])


def check(outputs: Outputs, store: dict[str, Any], signed: list[str], runs: list[str], low: int, high: int, kind: dict[str, int],
          threshold: float) -> dict[str, Any]:  # fmt: skip
    """`confirmed.npy` (2, n) u64 and `similarity.npy` (n,) f8: pairs of Jaccard similarity >= threshold, sorted as the candidates.

    Texts are compared where their signatures agree in `least_agreement` rows; the similarity is that of the sets of shingles.
    """
    minhash = MinHash(**kind)
    later, earlier = _candidates(runs, low, high)
    likely = np.zeros(len(later), bool)
    least = least_agreement(minhash, threshold)
    table = _Signatures(signed)
    for i in range(0, len(later), CHUNK):
        part = slice(i, i + CHUNK)
        likely[part] = table.agreement(number_of(later[part]), number_of(earlier[part])) >= least
    later, earlier = later[likely], earlier[likely]
    similarity = _similarities(Store.of(store), later, earlier, minhash.ngram)
    similar = similarity >= threshold
    outputs.save("confirmed.npy", np.stack([later[similar], earlier[similar]]))
    outputs.save("similarity.npy", similarity[similar])
    return {"candidates": len(likely), "compared": len(later), "confirmed": int(similar.sum())}


def _candidates(runs: list[str], low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
    pieces = [np.empty((2, 0), U64)]
    for run in runs:
        pairs = np.load(run, mmap_mode="r")
        first = np.searchsorted(pairs[0], U64(low), side="left")
        end = np.searchsorted(pairs[0], U64(high), side="right")
        pieces.append(np.array(pairs[:, first:end]))
    return unique_pairs(*np.concatenate(pieces, axis=1))


class _Signatures:
    """The signatures of all shards, by document number."""

    def __init__(self, stems: list[str]):
        firsts = [(stem, np.load(f"{stem}.numbers.npy", mmap_mode="r")[:1].tolist()) for stem in stems]
        self.stems = [stem for stem, first in firsts if first]
        self.first = np.array([first[0] for _, first in firsts if first])

    def _rows(self, numbers: np.ndarray) -> np.ndarray:
        shards = np.searchsorted(self.first, numbers, side="right") - 1
        pieces = [np.empty((0, 0), np.uint32)]
        for s in np.unique(shards):  # `numbers` are sorted: each shard's stand together
            at = np.searchsorted(np.load(f"{self.stems[s]}.numbers.npy", mmap_mode="r"), numbers[shards == s])
            pieces.append(np.load(f"{self.stems[s]}.signatures.npy", mmap_mode="r")[at])
        return np.concatenate(pieces[len(pieces) > 1 :])

    def agreement(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """(n,) rows that are equal."""
        different, back = np.unique(np.concatenate([one, other]), return_inverse=True)
        rows = self._rows(different)
        return (rows[back[: len(one)]] == rows[back[len(one) :]]).sum(axis=1)


def _similarities(store: Store, later: np.ndarray, earlier: np.ndarray, ngram: int) -> np.ndarray:
    (shingles, jaccard), seen = comparer(ngram), OrderedDict()

    def of(order: Any) -> np.ndarray:
        number = int(order & LOW)
        if number in seen:
            seen.move_to_end(number)
        else:
            shard, place = store.find(number)
            seen[number] = shingles(shard.raw(place))
            if len(seen) > CACHE:
                seen.popitem(last=False)
        return seen[number]

    return np.array([jaccard(of(a), of(b)) for a, b in zip(later, earlier, strict=True)], dtype=np.float64)


# star


def star(outputs: Outputs, confirmed: list[str], documents: int) -> dict[str, Any]:
    """`R.removed.npy`: a document goes if one that stays is similar to it, in favour of the most similar; the others stay.

    Going through documents in order makes "one that stays" known when it is asked for, and no chain of similar pairs can
    remove a document that is like no kept one. Each run of removals is sorted by document.
    """
    gone = np.zeros(documents // 8 + 1, np.uint8)
    runs, total = 0, 0
    for later, earlier, similarity in _blocks(confirmed):
        document, kept, how = _star(number_of(later), number_of(earlier), similarity, gone)
        outputs.save(f"{runs}.removed.npy", removals(document, kept, how))
        runs, total = runs + 1, total + len(document)
    return {"runs": runs, "removed": total}


def _blocks(confirmed: list[str]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """All pairs in order, a task of `check` at a time: none of them splits a document."""
    for stem in confirmed:
        later, earlier = np.load(f"{stem}.confirmed.npy")
        yield later, earlier, np.load(f"{stem}.similarity.npy")


def _star(later: np.ndarray, earlier: np.ndarray, similarity: np.ndarray, gone: np.ndarray,
          fast: bool | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """One block of pairs by number; `gone` has a bit per document, and is kept up."""
    if not (compiled() if fast is None else fast):
        return _star_slowly(later, earlier, similarity, gone)
    from megatron_scratch.corpus.dedup import kernel

    found = np.empty(len(later), np.int64), np.empty(len(later), np.int64), np.empty(len(later), np.float64)
    count = kernel.star(later, earlier, similarity, gone, *found)
    return tuple(column[:count] for column in found)


def _star_slowly(later: np.ndarray, earlier: np.ndarray, similarity: np.ndarray, gone: np.ndarray) -> tuple[np.ndarray, ...]:
    best: dict[int, tuple[int, float]] = {}
    bits, done = memoryview(gone), -1
    for d, e, s in zip(later.tolist(), earlier.tolist(), similarity.tolist(), strict=True):
        if d != done and done in best:
            bits[done >> 3] |= 1 << (done & 7)
        done = d
        if not bits[e >> 3] >> (e & 7) & 1 and s > best.get(d, (0, -1.0))[1]:
            best[d] = e, s
    if done in best:
        bits[done >> 3] |= 1 << (done & 7)
    return (
        np.array(list(best), np.int64),
        np.array([e for e, _ in best.values()], np.int64),
        np.array([s for _, s in best.values()]),
    )
