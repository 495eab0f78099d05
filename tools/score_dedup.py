"""Judge a deduplication by brute force: `score_dedup.py CORPUS OUTPUT`, after `data dedup` (or `prepare`) of a dedup_corpus.py.

Prints, per class of copies, the share of pairs of which one went; and of all removals, the share whose exact Jaccard similarity to
the document that they went in favour of is at least 0.8, and whether that document stayed. With --check exits with 1 unless every
pair at 0.85 and above was found, and every removal is at 0.8 and above, was told exactly, and in favour of a document that stayed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

from dedup_corpus import jaccard, shingles

WHY = ("exact copy", "near copy")


def read_corpus(folder: Path) -> tuple[dict[tuple[str, int], str], dict[str, str]]:
    """((file, first byte of a line) -> id, id -> text)."""
    places, texts = {}, {}
    for path in sorted(folder.glob("shard_*.jsonl")):
        place = 0
        for raw in path.read_bytes().splitlines(keepends=True):
            record = json.loads(raw)
            places[path.name, place], texts[record["id"]] = record["id"], record["text"]
            place += len(raw)
    return places, texts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    places, texts = read_corpus(args.corpus)

    def name(told: dict) -> str:
        return places[Path(told["source"]).name, told["place"]]

    lines = [json.loads(line) for line in open(args.output / "removed.jsonl", encoding="utf-8")]
    gone = {name(x): (name(x["of"]), x["similarity"]) for x in lines if x["why"] in WHY}
    classes: dict[str, list[tuple[float, bool]]] = defaultdict(list)
    for line in open(args.corpus / "truth.jsonl", encoding="utf-8"):
        pair = json.loads(line)
        classes[pair["cls"]].append((pair["jaccard"], pair["a"] in gone or pair["b"] in gone))
    for cls, pairs in classes.items():
        print(f"{cls:6} {sum(found for _, found in pairs):6} of {len(pairs):6} pairs found ({min(pairs)[0]:.3f} and above)")
    missed = sum(not found for pairs in classes.values() for similarity, found in pairs if similarity >= 0.85)
    wrong = stale = untrue = 0
    for document, (kept, told) in gone.items():
        similarity = 1.0 if texts[document] == texts[kept] else jaccard(shingles(texts[document]), shingles(texts[kept]))
        wrong, stale, untrue = wrong + (similarity < 0.8), stale + (kept in gone), untrue + (abs(similarity - told) > 1e-6)
    print(f"removed {len(gone)} of {len(texts)}: {1 - wrong / max(1, len(gone)):.4f} of them at 0.8 and above; {stale} for "
          f"one that went, {untrue} with another similarity than told, {missed} pairs at 0.85 missed")  # fmt: skip
    return int(args.check and bool(missed or wrong or stale or untrue or not gone))


if __name__ == "__main__":
    sys.exit(main())
