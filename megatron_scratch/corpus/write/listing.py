"""What was left out, for people: one line of JSON per document, with where it was, why it went, and in favour of which."""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator
from operator import itemgetter
from typing import Any

import numpy as np

from megatron_scratch.corpus.dedup.removals import NOBODY, find, read_range
from megatron_scratch.corpus.stages import Outputs
from megatron_scratch.corpus.store import Store
from megatron_scratch.util.files import reserve

EXACT, NEAR = "exact copy", "near copy"
BLOCK = 1 << 22  # removals counted at once
SAMPLES = 5  # places named per reason
HEAD = 200  # characters of a document that are shown


def run(outputs: Outputs, store: dict[str, Any], first: int, end: int, removed: dict[str, list[str]], drops: str,
        sources: list[str], evaluations: list[str]) -> dict[str, Any]:  # fmt: skip
    """`removed.jsonl`: what a task of reading dropped and later stages removed of its shards [first, end), in their order."""
    whole, dropped = Store.of(store), {}
    later = _later(whole, range(first, end), removed, sources, evaluations, dropped)
    with outputs.open("removed.jsonl") as f:
        for _, _, raw in heapq.merge(_earlier(drops, whole.bases[first]), later):
            f.write(raw)
    return {"dropped": dropped}


def _earlier(drops: str, base: int) -> Iterator[tuple[int, int, bytes]]:
    """(documents before it, 0, line) of what reading dropped."""
    with open(f"{drops}.jsonl", "rb") as f:
        for before, raw in zip(np.load(f"{drops}.npy").tolist(), f, strict=True):
            yield base + before, 0, raw


def _later(store: Store, shards: range, removed: dict[str, list[str]], sources: list[str],
           evaluations: list[str], dropped: dict[str, Any]) -> Iterator[tuple[int, int, bytes]]:  # fmt: skip
    """(document, 1, line) of what the later stages removed; counted in `dropped`."""
    for shard in shards:
        base, count = store.bases[shard], store.counts[shard]
        found = {why: read_range(paths, base, base + count) for why, paths in removed.items()}
        _follow(found.get(EXACT), removed.get(NEAR, []))
        rows = [(int(row["document"]), why, row) for why, some in found.items() for row in some]
        for number, why, row in sorted(rows, key=itemgetter(0)):
            line = _line(store, sources, evaluations, why, row)
            told = dropped.setdefault(why, {"count": 0, "samples": []})
            told["count"] += 1
            if told["count"] <= SAMPLES:
                told["samples"].append({"begin": 0, "line": None, **{key: line[key] for key in ("source", "place", "head")}})
            yield number, 1, (json.dumps(line, ensure_ascii=False) + "\n").encode()


def _follow(copies: np.ndarray | None, near: list[str]) -> None:
    """A copy of a document that is like a third one, and went, went in favour of that third one, and is as similar to it."""
    if copies is None or not len(copies):
        return
    places, rows = find(near, copies["kept"])
    copies["kept"][places], copies["similarity"][places] = rows["kept"], rows["similarity"]


def _line(store: Store, sources: list[str], evaluations: list[str], why: str, row: Any) -> dict[str, Any]:
    number = int(row["document"])
    line = {**_where(store, sources, number), "why": why, "head": _head(store, number)}
    if row["kept"] >= 0:
        line |= {"similarity": round(float(row["similarity"]), 6), "of": _where(store, sources, int(row["kept"]))}
    elif row["kept"] != NOBODY:
        line |= {"share": round(float(row["similarity"]), 6), "of": {"source": evaluations[-1 - int(row["kept"])]}}
    return line


def _where(store: Store, sources: list[str], number: int) -> dict[str, Any]:
    part, place = store.find(number)
    row = part.rows[place]
    return {"source": sources[int(row["source"])], "place": int(row["place"])}


def _head(store: Store, number: int) -> str:
    part, place = store.find(number)
    return part.raw(place)[: 4 * HEAD].decode("utf-8", "ignore")[:HEAD]


def copies(outputs: Outputs, removed: list[str], documents: int) -> dict[str, Any]:
    """`copies.npy` (documents,) u4: documents that went in favour of each. An exact copy of one that went later counts for the
    one that stayed."""
    scratch = outputs.path("copies.tmp")  # on disk: four bytes for every document there is
    count = np.memmap(scratch, np.uint32, "w+", shape=(max(1, documents),))
    reserve(scratch)
    for path in removed:
        rows = np.load(path, mmap_mode="r")
        for i in range(0, len(rows), BLOCK):
            kept = np.asarray(rows["kept"][i : i + BLOCK])
            np.add.at(count, kept[kept >= 0], 1)
    for path in removed:
        rows = np.load(path, mmap_mode="r")
        for i in range(0, len(rows), BLOCK):
            some = np.asarray(rows[i : i + BLOCK])
            some = some[(some["kept"] >= 0) & (count[some["document"]] > 0)]
            np.add.at(count, some["kept"], count[some["document"]])
            count[some["document"]] = 0
    outputs.save("copies.npy", count[:documents])
    scratch.unlink()
    return {"most": int(count.max(initial=0))}
