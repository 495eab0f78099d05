"""What a preparation tells about itself in manifest.json: sources, what was left out and why, counts of the stages."""

from __future__ import annotations

from typing import Any

from megatron_scratch.corpus.graph import Graph
from megatron_scratch.corpus.read import SAMPLES
from megatron_scratch.corpus.write.encode import SIDES


def described(graph: Graph) -> dict[str, Any]:
    """The part of the manifest that is the same for every verb."""
    return {"sources": sources(graph), "dropped": dropped(graph), "stages": stages(graph)}


def sources(graph: Graph) -> list[dict[str, Any]]:
    """Per entry of corpus.input: files, and what reading and cleaning left of them."""
    found: dict[str, dict[str, Any]] = {}
    for file in graph.files:
        told = found.setdefault(file.entry, {"input": file.entry, "files": 0, "documents": 0, "characters": 0, "bytes": 0})
        told["files"] += 1
    for result in graph.read.results:
        for index, counts in result["sources"].items():
            told = found[graph.files[int(index)].entry]
            for name, n in counts.items():
                told[name] += n
    return list(found.values())


def dropped(graph: Graph) -> dict[str, Any]:
    """What was left out, by reason: how many, and the first places with the beginnings of their texts."""
    merged: dict[str, Any] = {}
    for told in [*graph.read.results, *graph.listed.results]:
        for reason, some in told["dropped"].items():
            into = merged.setdefault(reason, {"count": 0, "samples": [], "heads": []})
            into["count"] += some["count"]
            for sample in some["samples"][: SAMPLES - len(into["samples"])]:
                into["samples"].append(_place(sample, graph.lines_before))
                into["heads"].append(sample["head"])
    return dict(sorted(merged.items()))


def _place(sample: dict[str, Any], lines_before: dict[tuple[str, int], int]) -> str:
    """file:line of a line, file@place of anything else that is not at the beginning of its file."""
    if sample["line"] is not None:
        return f"{sample['source']}:{lines_before[sample['source'], sample['begin']] + sample['line']}"
    return f"{sample['source']}@{sample['place']}" if sample["place"] else sample["source"]


def stages(graph: Graph) -> dict[str, Any]:
    """What the stages of deduplication counted."""
    found = {"read": graph.read, "exact": graph.exact, "sign": graph.signed, "pair": graph.paired, "check": graph.checked,
             "star": graph.star, "contaminated": graph.contaminated}  # fmt: skip
    return {name: {key: done.total(key) for key, value in done.results[0].items() if isinstance(value, int) and key != "runs"}
            for name, done in found.items() if done is not None and done.results}  # fmt: skip


def summary(manifest: dict[str, Any]) -> str:
    """What came out, in a line."""
    splits, documents = manifest.get("splits", {}), manifest.get("documents")
    parts = [f"{name} {s['documents']} documents, {s['tokens']} tokens" for name in SIDES if (s := splits.get(name))]
    if documents:
        files = f"{documents['files']} file{'s' * (documents['files'] != 1)}"
        parts.append(f"{documents['documents']} documents, {documents['bytes'] / 1e6:.1f} MB of text in {files}")
    if "tokenizer" in manifest:
        parts.append(f"vocabulary {manifest['tokenizer']['vocab_size']}")
    return "; ".join(parts)
