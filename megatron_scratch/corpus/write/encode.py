"""A shard of text to ids, per side, in the order that its documents will have on disk.

That order is a keyed hash of a document's place among all that are left, so it does not depend on how the corpus is cut into
shards, and each shard can lay out its own documents before any other is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from megatron_scratch.corpus.dedup.removals import kept_mask
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
    the character `cut` of the corpus on, in the order they came, with EOD between documents only.
    """

    split: str
    cut: int
    seed: int
    characters: int  # of the whole corpus; where `tail` ends without an EOD


def run(outputs: Outputs, store: dict[str, Any], shard: int, removed: list[str], first: int, first_char: int, deal: dict[str, Any],
        tokenizer: str, encoder: str) -> dict[str, Any]:  # fmt: skip
    """`SIDE.ids` (tokens back to back) and `SIDE.docs.npy` (n,) of DOCUMENT, both sorted by order.

    Args:
        first, first_char: documents and characters that are left of the shards before this one.
    """
    part, plan, coder = Store.of(store).shard(shard), Deal(**deal), load_encoder(tokenizer, encoder)
    keep = np.flatnonzero(kept_mask(removed, part.base, part.base + len(part)))
    pieces = _dealt(part, keep, plan, first, first_char)
    sides: dict[str, list[tuple[int, int, np.ndarray]]] = {side: [] for side in SIDES}
    counts = {side: dict.fromkeys(("documents", "tokens", "characters", "bytes", "unknown_tokens"), 0) for side in SIDES}
    for batch in _batches(pieces):
        _encode(batch, coder, sides, counts)
    for side, found in sides.items():
        _save(outputs, side, found, best_dtype(coder.tokenizer.vocab_size))
    return counts


@dataclass(frozen=True)
class Piece:
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
    orders = ranks_of(np.arange(first, first + len(keep)), key("documents on disk", plan.seed))
    rows = part.rows[keep]
    for i, order, row in zip(keep.tolist(), orders.tolist(), rows, strict=True):
        side = "valid" if int(row["hash_high"]) < plan.cut else "train"
        yield Piece(side, order, part.base + i, part.raw(i), int(row["chars"]), True)


def _tail(part: Shard, keep: np.ndarray, plan: Deal, first: int, begin: int) -> Iterator[Piece]:
    for place, i in enumerate(keep.tolist(), first):
        raw, chars = part.raw(i), int(part.rows["chars"][i])
        head = min(max(plan.cut - begin, 0), chars)  # characters of it that are train's
        begin += chars
        text = raw.decode("utf-8") if 0 < head < chars else ""
        for side, count in (("train", head), ("valid", chars - head)):
            if count:
                cut = (text[:head] if side == "train" else text[head:]).encode() if text else raw
                whole_ends = begin not in (plan.cut, plan.characters)
                yield Piece(side, place, part.base + i, cut, count, whole_ends and (side == "valid" or count == chars))


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


def _encode(batch: list[Piece], coder: Encoder, sides: dict[str, list], counts: dict[str, dict[str, int]]) -> None:
    ids, lengths = coder.encode([piece.raw for piece in batch])
    ends = np.cumsum(lengths)
    unknown, eod = coder.tokenizer.unk_id, np.array([coder.tokenizer.eod_id], ids.dtype)
    for piece, start, end in zip(batch, (ends - lengths).tolist(), ends.tolist(), strict=True):
        tokens = ids[start:end]
        count = counts[piece.side]
        count["unknown_tokens"] += 0 if unknown is None else int((tokens == unknown).sum())
        tokens = np.concatenate([tokens, eod]) if piece.ended else tokens
        sides[piece.side].append((piece.order, piece.number, tokens))
        for name, n in (("documents", 1), ("tokens", len(tokens)), ("characters", piece.chars), ("bytes", len(piece.raw))):
            count[name] += n


def _save(outputs: Outputs, side: str, found: list[tuple[int, int, np.ndarray]], dtype: np.dtype) -> None:
    found.sort(key=lambda item: item[0])
    with outputs.open(f"{side}.ids") as f:
        for _, _, tokens in found:
            f.write(memoryview(tokens.astype(dtype)).cast("B") if len(tokens) else b"")
    begins = accumulate((len(tokens) for _, _, tokens in found), initial=0)
    rows = [(order, number, begin, len(tokens)) for (order, number, tokens), begin in zip(found, begins, strict=False)]
    outputs.save(f"{side}.docs.npy", np.array(rows, DOCUMENT))
