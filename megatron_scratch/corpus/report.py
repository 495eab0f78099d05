"""What a preparation came to, as numbers: what each step took, from where, why, and at what cost.

The numbers of texts are the same however the work was cut; times are not, so nothing here goes into manifest.json.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable
from heapq import nlargest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_scratch import __version__
from megatron_scratch.config.corpus import minhash_settings
from megatron_scratch.corpus import clock
from megatron_scratch.corpus.counts import BINS, LEAST
from megatron_scratch.corpus.lengths import by_powers, described, document_lengths
from megatron_scratch.data.indexed import IndexedDataset

if TYPE_CHECKING:
    from megatron_scratch.corpus.graph import Graph

HEAD = 600  # characters of a text that are shown
LARGEST = 5  # groups of copies that are shown
BLOCK = 1 << 22  # documents whose copies are looked at at once

# step: its name for people, why a document went there, its stages. Names that are no stage are those of `clock.clocked`.
STEPS = {
    "read": ("read and clean", "", ("read",)),
    "exact": ("exact copies", "exact copy", ("exact",)),
    "near": ("near copies", "near copy", ("numbered", "sign", "pair", "check", "star", "export")),
    "spans": ("repeated pieces", "nothing new", ("span_hashes", "span_copies", "spans")),
    "contaminated": ("evaluation sets", "contaminated", ("evaluations", "contaminated")),
    "tokenizer": ("tokenizer", "", ("tokenizer",)),
    "encode": ("encode", "", ("encode",)),
    "write": ("write", "", ("parts_train", "parts_valid", "documents", "write", "listed", "copies", "counted")),
}  # fmt: skip


def collect(graph: Graph, manifest: dict[str, Any], output: Path) -> dict[str, Any]:
    """All that the report shows, as JSON. The files of the verb are in `output` already."""
    spent = {name: _spent(done.folder) for name, done in graph.ran.items()} | clock.noted(graph.work)
    counted = graph.counted.results
    spent["counted"] = _spent(graph.counted.folder)
    steps = _steps(graph, counted, spent)
    everything = [some for times in spent.values() for some in times]
    return {
        "format": 1, "verb": manifest["verb"], "output": str(output), "version": __version__, "key": manifest["key"],
        "finished": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "total": {"seconds": clock.wall(everything), "cpu_seconds": sum(s[2] for s in everything)},
        "steps": steps, "sources": _sources(graph, manifest, counted), "dropped": _dropped(graph, manifest),
        "near": _near(graph, counted), "copies": _copies(graph), "lengths": _lengths(output, manifest, counted),
        **{name: manifest.get(name) for name in ("tokenizer", "splits", "documents", "config")},
    }  # fmt: skip


def _spent(folder: Path) -> list[list[float]]:
    """What the tasks of a stage cost, from their markers."""
    markers = (json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.done")))
    return [marker["spent"] for marker in markers if "spent" in marker]


def _steps(graph: Graph, counted: list[dict[str, Any]], spent: dict[str, list[list[float]]]) -> list[dict[str, Any]]:
    """In their order: documents and bytes of text before and after each step that ran, its tasks, wall and CPU seconds."""
    left = [graph.read.total("documents"), graph.read.total("bytes")]
    rows = []
    for name, (label, why, stages) in STEPS.items():
        times = [some for stage in stages for some in spent.get(stage, [])]
        if not times:
            continue
        before = [graph.read.total("seen"), _on_disk(graph)] if name == "read" else list(left)
        if why:
            left = [n - sum(told["removed"][why][k] for told in counted) for k, n in enumerate(left)]
        if name == "spans" and graph.spans is not None:
            left[1] -= graph.spans.total("bytes_cut")
        rows.append({"name": name, "label": label, "documents_in": before[0], "bytes_in": before[1], "documents_out": left[0],
                     "bytes_out": left[1], "tasks": len(times), "seconds": clock.wall(times),
                     "cpu_seconds": sum(s[2] for s in times)})  # fmt: skip
    return rows


def _on_disk(graph: Graph) -> int | None:
    """Bytes of the input's files, as they lie; None where asking for them would be a message for each, or all was not read."""
    known = graph.cfg.max_bytes is None and all(file.local for file in graph.files)
    return sum(file.size() for file in graph.files) if known else None


def _sources(graph: Graph, manifest: dict[str, Any], counted: list[dict[str, Any]]) -> list[dict[str, Any]]:
    left: dict[str, list[int]] = {}
    for told in counted:
        for number, (documents, size) in told["sources"].items():
            into = left.setdefault(graph.files[int(number)].entry, [0, 0])
            into[0], into[1] = into[0] + documents, into[1] + size
    return [{**told, "documents_left": left.get(told["input"], [0, 0])[0], "bytes_left": left.get(told["input"], [0, 0])[1]}
            for told in manifest["sources"]]  # fmt: skip


def _dropped(graph: Graph, manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Reasons with their step and some of the texts, the most frequent first in each step."""
    step_of = {why: label for label, why, _ in STEPS.values() if why}
    rows = [{"reason": reason, "step": step_of.get(reason, STEPS["read"][0]), "count": told["count"],
             "samples": [list(pair) for pair in zip(told["samples"], told["heads"], strict=True)]}
            for reason, told in manifest["dropped"].items()]  # fmt: skip
    order = [label for label, _, _ in STEPS.values()]
    return sorted(rows, key=lambda row: (order.index(row["step"]), -row["count"], row["reason"]))


def _near(graph: Graph, counted: list[dict[str, Any]]) -> dict[str, Any] | None:
    """bins: [from, to, documents] of similarity; least: the pairs of least similarity, with both texts."""
    if graph.star is None:
        return None
    totals = np.zeros(BINS, np.int64)
    for told in counted:
        totals[: len(told["similarity"])] += np.array(told["similarity"], np.int64)
    filled = np.flatnonzero(totals)
    first = int(filled[0]) if len(filled) else BINS
    least = sorted(row for told in counted for row in told["least"])[:LEAST]
    settings = minhash_settings(graph.cfg)
    bins = [[b / BINS, (b + 1) / BINS, int(totals[b])] for b in range(first, BINS)]
    pairs = [{"similarity": s, "gone": _shown(graph, gone), "kept": _shown(graph, kept)} for s, gone, kept in least]
    return {"threshold": settings and settings.threshold, "bins": bins, "least": pairs}


def _copies(graph: Graph) -> dict[str, Any] | None:
    """bins: [from, to, groups] of the documents in a group of copies, the one that stays among them; largest: the first texts."""
    if graph.copies is None:
        return None
    copies = np.load(graph.copies.path(0, "copies.npy"), mmap_mode="r")
    bits: Counter[int] = Counter()
    top: list[tuple[int, int]] = []  # (copies, -number): the first of equals
    for begin in range(0, len(copies), BLOCK):
        some = np.asarray(copies[begin : begin + BLOCK])
        places = np.flatnonzero(some)
        bits.update(np.frexp(some[places].astype(np.float64))[1].tolist())
        best = places[np.argsort(-some[places].astype(np.int64), kind="stable")[:LARGEST]]
        top = nlargest(LARGEST, [*top, *((int(some[i]), -(begin + int(i))) for i in best)])
    return {"bins": [[a + 1, b + 1, n] for a, b, n in by_powers(bits)],
            "largest": [{"documents": n + 1, **_shown(graph, -number)} for n, number in top]}  # fmt: skip


def _shown(graph: Graph, number: int) -> dict[str, Any]:
    shard, place = graph.documents.find(number)
    row = shard.rows[place]
    head = shard.raw(place)[: 4 * HEAD].decode("utf-8", "ignore")[:HEAD]
    return {"place": f"{graph.files[int(row['source'])].name}@{int(row['place'])}", "head": head}


def _lengths(output: Path, manifest: dict[str, Any], counted: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """What is counted -> `lengths.described`, of tokens where there are some, else of characters, which have bins alone."""
    sides = [side for side in ("train", "valid") if side in (manifest.get("splits") or {})]
    if sides:
        return {f"{side}, tokens": described(document_lengths(IndexedDataset(output / side))) for side in sides}
    bits: Counter[int] = Counter()
    for told in counted:
        bits.update({int(b): n for b, n in told["lengths"].items()})
    return {"characters": {"documents": sum(bits.values()), "bins": by_powers(bits)}}
