"""Lines or paragraphs that came before, anywhere in the corpus, are cut out of a document: menus, footers, licences.

    hashes  a shard               -> the hash of each piece that is long enough, with where it stands, sorted
    copies  a range of hashes     -> the pieces that are not the first of their hash, by document
    cut     a shard               -> its text without them

The first in the order of the input stays. A document of which nothing is left goes, in favour of nobody.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_left
from collections.abc import Iterator
from typing import Any

import numpy as np

from megatron_scratch.corpus.dedup.exact import sorted_hashes
from megatron_scratch.corpus.dedup.removals import NOBODY, kept_mask, removals
from megatron_scratch.corpus.dedup.words import U64
from megatron_scratch.corpus.stages import Done, Outputs
from megatron_scratch.corpus.store import ROW, ShardWriter, Store

BLANK = re.compile(r"(\n\s*\n)")
TASK = 1 << 22  # pieces per task of `copies`: 100 MB


def pieces(text: str, kind: str) -> Iterator[str]:
    """A text in lines or in paragraphs (which end at a blank line), with what ends them: joined they are the text."""
    if kind == "line":
        yield from re.findall(r"[^\n]*\n|[^\n]+", text)
        return
    parts = [*BLANK.split(text), ""]
    yield from (piece for piece in map("".join, zip(parts[::2], parts[1::2], strict=True)) if piece)


def _hash(piece: str) -> int:
    """64 bits of the words of a piece: what differs in blanks alone is the same."""
    return int.from_bytes(hashlib.blake2b(" ".join(piece.split()).encode(), digest_size=8).digest(), "little")


def _long(piece: str, least: int) -> bool:
    return len(piece.strip()) >= least


def hashes(outputs: Outputs, store: dict[str, Any], shard: int, removed: list[str], kind: str, least: int) -> dict[str, Any]:
    """`pieces.npy` (3, n) u64, sorted: hash, document, and the place among the document's pieces."""
    part = Store.of(store).shard(shard)
    found: list[tuple[int, int, int]] = []
    for i, text in part.texts(kept_mask(removed, part.base, part.base + len(part))):
        found += [(_hash(piece), part.base + i, k) for k, piece in enumerate(pieces(text, kind)) if _long(piece, least)]
    columns = np.array(found, dtype=U64).reshape(-1, 3).T
    outputs.save("pieces.npy", columns[:, np.argsort(columns[0], kind="stable")])
    return {"pieces": len(found)}


def copy_tasks(hashed: Done) -> list[dict[str, Any]]:
    count = max(1, -(-hashed.total("pieces") // TASK))
    edges = [(i << 64) // count for i in range(count + 1)]
    return [{"low": a, "high": b - 1} for a, b in zip(edges[:-1], edges[1:], strict=True)]


def copies(outputs: Outputs, hashed: list[str], low: int, high: int) -> dict[str, Any]:
    """`copies.npy` (2, n) u64, sorted by document: the pieces to cut out."""
    parts = []
    for path in hashed:
        columns = np.load(path, mmap_mode="r")
        first, end = np.searchsorted(columns[0], U64(low), side="left"), np.searchsorted(columns[0], U64(high), side="right")
        parts.append(np.array(columns[:, first:end]))
    value, document, place = np.concatenate(parts, axis=1)
    by = np.argsort(value, kind="stable")  # shards come in the input's order: the first of a hash is the first there
    again = np.concatenate([[False], value[by][1:] == value[by][:-1]])[: len(by)]
    gone = np.stack([document[by][again], place[by][again]])
    outputs.save("copies.npy", gone[:, np.lexsort((gone[1], gone[0]))])
    return {"copies": int(again.sum())}


def cut(outputs: Outputs, store: dict[str, Any], shard: int, removed: list[str], copied: list[str], kind: str) -> dict[str, Any]:
    """The shard again, with the same documents (`store.py`), and `removed.npy`: those of which nothing is left."""
    part = Store.of(store).shard(shard)
    keep = kept_mask(removed, part.base, part.base + len(part))
    gone = _cuts(copied, part.base, part.base + len(part))
    emptied, bytes_cut = [], 0
    with ShardWriter(outputs, 0) as writer:
        for i, row in enumerate(part.rows):
            raw, places = part.raw(i), gone.get(part.base + i)
            if places and keep[i]:
                text = "".join(piece for k, piece in enumerate(pieces(raw.decode("utf-8"), kind)) if k not in places)
                new = text.encode("utf-8")
                bytes_cut += len(raw) - len(new)
                raw, row = new, _row(row, new, text)
                if not text.strip():
                    emptied.append(part.base + i)
            writer.add(raw if keep[i] else b"", tuple(row))
    outputs.save("0.hashes.npy", sorted_hashes(np.array(writer.rows, ROW)))
    documents = np.array(emptied, np.int64)
    outputs.save("removed.npy", removals(documents, np.full(len(documents), NOBODY), 0.0))
    return {"shards": [len(part)], "bytes_cut": bytes_cut, "removed": len(emptied)}


def _row(row: Any, raw: bytes, text: str) -> Any:
    row, digest = row.copy(), hashlib.blake2b(raw, digest_size=16).digest()
    row["hash_high"], row["hash_low"] = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
    row["chars"] = len(text)
    return row


def _cuts(copied: list[str], low: int, high: int) -> dict[int, set[int]]:
    """Places of the pieces to cut, by document."""
    gone: dict[int, set[int]] = {}
    for path in copied:
        columns = np.load(path, mmap_mode="r")
        first, end = (bisect_left(columns[0], number) for number in (low, high))
        for document, place in columns[:, first:end].T.tolist():
            gone.setdefault(document, set()).add(place)
    return gone
