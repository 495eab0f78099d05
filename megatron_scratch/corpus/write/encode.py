"""A shard of text to ids, per side, in the order that its documents will have on disk.

That order is a keyed hash of a document's place among all that are left, so it does not depend on how the corpus is cut into
shards, and each shard can lay out its own documents before any other is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from megatron_scratch.corpus.dedup.removals import kept_mask
from megatron_scratch.corpus.dedup.words import U64
from megatron_scratch.corpus.stages import Outputs
from megatron_scratch.corpus.store import Shard, Store
from megatron_scratch.corpus.write.encoders import Encoder, load_encoder
from megatron_scratch.data.dataset import key, ranks_of
from megatron_scratch.data.indexed import best_dtype

SIDES = ("train", "valid")
BATCH = 1 << 23  # bytes of text encoded at once
DOCUMENT = np.dtype([("order", "<u8"), ("number", "<i8"), ("begin", "<i8"), ("tokens", "<i8")])  # begin, tokens: in `ids`


@dataclass(frozen=True)
class Deal:
    """Who goes where, decided from counts of the whole corpus.

    split: document: to valid if the first half of its hash is below `cut`, in an order shuffled by `seed`; tail: to valid from
    the character `cut` of the corpus on, in the order they came, with EOD between documents only; none: all to train, in the
    order they came.
    """

    split: str
    cut: int
    seed: int
    characters: int  # of the whole corpus; where `tail` ends without an EOD


def run(outputs: Outputs, store: dict[str, Any], shard: int, removed: list[str], first: int, first_char: int, deal: dict[str, Any],
        tokenizer: str, encoder: str) -> dict[str, Any]:  # fmt: skip
    """`SIDE.ids` (tokens back to back) and `SIDE.docs.npy` (n,) of DOCUMENT, both sorted by order; `used.npy` (vocab_size,) bool.

    Args:
        first, first_char: documents and characters that are left of the shards before this one.
    """
    part, plan, coder = Store.of(store).shard(shard), Deal(**deal), load_encoder(tokenizer, encoder)
    keep = np.flatnonzero(kept_mask(removed, part.base, part.base + len(part)))
    pieces = _dealt(part, keep, plan, first, first_char)
    sides: dict[str, list[tuple[int, int, memoryview]]] = {side: [] for side in SIDES}
    counts = {side: dict.fromkeys(("documents", "tokens", "characters", "bytes", "unknown_tokens"), 0) for side in SIDES}
    used = np.zeros(coder.tokenizer.vocab_size, bool)
    for batch in _batches(pieces):
        used[_encode(batch, coder, sides, counts)] = True
    outputs.save("used.npy", used)
    for side, found in sides.items():
        _save(outputs, side, found, best_dtype(coder.tokenizer.vocab_size))
    return counts


class Piece(NamedTuple):
    """A document, or a part of the one that the cut between the sides goes through."""

    side: str
    order: int
    number: int
    raw: bytes
    chars: int
    ended: bool  # EOD follows


def _dealt(part: Shard, keep: np.ndarray, plan: Deal, first: int, first_char: int) -> Iterator[Piece]:
    if plan.split == "tail":
        yield from _tail(part, keep, plan, first, first_char)
        return
    places = np.arange(first, first + len(keep))
    orders = places if plan.split == "none" else ranks_of(places, key("documents on disk", plan.seed))
    valid, chars = part.rows["hash_high"][keep] < U64(plan.cut), part.rows["chars"][keep]
    columns = (column.tolist() for column in (part.base + keep, orders, valid, chars))
    for raw, number, order, aside, count in zip(part.raws(keep), *columns, strict=True):
        yield Piece("valid" if aside else "train", order, number, raw, count, True)


def _tail(part: Shard, keep: np.ndarray, plan: Deal, first: int, begin: int) -> Iterator[Piece]:
    columns = (part.base + keep).tolist(), part.rows["chars"][keep].tolist()
    for place, (raw, number, chars) in enumerate(zip(part.raws(keep), *columns, strict=True), first):
        head = min(max(plan.cut - begin, 0), chars)  # characters of it that are train's
        begin += chars
        text = raw.decode("utf-8") if 0 < head < chars else ""
        for side, count in (("train", head), ("valid", chars - head)):
            if count:
                cut = (text[:head] if side == "train" else text[head:]).encode() if text else raw
                whole_ends = begin not in (plan.cut, plan.characters)
                yield Piece(side, place, number, cut, count, whole_ends and (side == "valid" or count == chars))


def _batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.raw)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(batch: list[Piece], coder: Encoder, sides: dict[str, list], counts: dict[str, dict[str, int]]) -> np.ndarray:
    """The ids of all of them, (n,) with EOD. A piece's own go to its side as a view of bytes on disk."""
    ids, lengths = coder.encode([piece.raw for piece in batch])
    ended = np.array([piece.ended for piece in batch])
    ends = np.cumsum(lengths + ended)
    is_eod = np.zeros(ends[-1], bool)
    is_eod[ends[ended] - 1] = True
    tokens = np.full(ends[-1], coder.tokenizer.eod_id, best_dtype(coder.tokenizer.vocab_size))
    tokens[~is_eod] = ids
    view, size = memoryview(tokens).cast("B"), tokens.itemsize
    unknown = np.zeros(len(batch), np.int64)
    if coder.tokenizer.unk_id is not None:
        unknown = np.bincount(np.repeat(np.arange(len(batch)), lengths)[ids == coder.tokenizer.unk_id], minlength=len(batch))
    start = 0
    for piece, end in zip(batch, ends.tolist(), strict=True):
        sides[piece.side].append((piece.order, piece.number, view[start * size : end * size]))
        start = end
    told = {"documents": np.ones(len(batch), np.int64), "tokens": lengths + ended, "characters": [piece.chars for piece in batch],
            "bytes": [len(piece.raw) for piece in batch], "unknown_tokens": unknown}  # fmt: skip
    for side, count in counts.items():
        here = [piece.side == side for piece in batch]
        for name, numbers in told.items():
            count[name] += int(np.asarray(numbers)[here].sum())
    return tokens


def _save(outputs: Outputs, side: str, found: list[tuple[int, int, memoryview]], dtype: np.dtype) -> None:
    found.sort(key=itemgetter(0))
    with outputs.open(f"{side}.ids") as f:
        for _, _, tokens in found:
            f.write(tokens)
    docs = np.array([(order, number, 0, len(tokens) // dtype.itemsize) for order, number, tokens in found], DOCUMENT)
    docs["begin"] = np.cumsum(docs["tokens"]) - docs["tokens"]
    outputs.save(f"{side}.docs.npy", docs)
