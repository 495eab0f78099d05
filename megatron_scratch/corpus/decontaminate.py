"""Documents that hold text of an evaluation set go: they share `ngram` words in a row with one of its records.

The method of GPT-3 (arXiv 2005.14165, appendix C; 13 words), on the words of `dedup/words.py`. Records of fewer words are matched
whole, down to SHORTEST words. What is compared are 64-bit hashes: 10^9 documents against 10^6 n-grams err 10^-4 times.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_scratch.config.corpus import CorpusConfig
from megatron_scratch.corpus.dedup.removals import kept_mask, removals
from megatron_scratch.corpus.dedup.signatures import comparer
from megatron_scratch.corpus.dedup.words import word_hashes
from megatron_scratch.corpus.formats import Bad, Keys, Record, reader_of
from megatron_scratch.corpus.sources import SourceFile, find_files
from megatron_scratch.corpus.stages import Outputs
from megatron_scratch.corpus.store import Store
from megatron_scratch.util.errors import UserError

SHORTEST = 8  # words of an evaluation record that is matched whole; shorter ones are in every text


def collect_tasks(c: CorpusConfig) -> list[dict[str, Any]]:
    """One task: evaluation sets are small. The names and states of their files are part of it."""
    files = find_files(list(c.decontaminate))
    return [{"files": [{"name": f.name, "url": f.url, "stamp": f.stamp()} for f in files], "fields": c.decontaminate_keys,
             "most": c.max_record_mb << 20, "ngram": c.decontaminate_ngram}]  # fmt: skip


def collect(outputs: Outputs, files: list[dict[str, str]], fields: list[str], most: int, ngram: int) -> dict[str, Any]:
    """`N.grams.npy` (n,) u64 and `N.owners.npy` (n,) i64, sorted: the n-grams of N words, and the first file that has each."""
    found: dict[int, list[np.ndarray]] = {}
    owners: dict[int, list[np.ndarray]] = {}
    records = short = 0
    for number, told in enumerate(files):
        for text in _texts(told, fields, most):
            records += 1
            n = min(ngram, len(word_hashes(text)))
            if n < min(SHORTEST, ngram):
                short += 1
                continue
            grams = comparer(n)[0](text.encode("utf-8", "replace"))
            found.setdefault(n, []).append(grams)
            owners.setdefault(n, []).append(np.full(len(grams), number))
    if not found:
        raise UserError(f"corpus.decontaminate has {records} records and none of {SHORTEST} words or more in the fields "
                        f"{', '.join(fields)}; name the fields with corpus.decontaminate_keys")  # fmt: skip
    for n, pieces in found.items():
        grams, first = np.unique(np.concatenate(pieces), return_index=True)
        outputs.save(f"{n}.grams.npy", grams)
        outputs.save(f"{n}.owners.npy", np.concatenate(owners[n])[first])
    return {"records": records, "short": short, "lengths": sorted(found), "names": [told["name"] for told in files]}


def _texts(told: dict[str, str], fields: list[str], most: int) -> list[str]:
    """The texts of an evaluation file: each named field of each record. One that cannot be read is an error: none may slip by."""
    file, texts = SourceFile(told["name"], told["url"], ""), []
    for field in fields:
        for record in reader_of(file)(file, 0, None, Keys(field, "", most)):
            if isinstance(record, Bad) and not (len(fields) > 1 and record.reason.startswith("no field")):
                file.check(told["stamp"])
                raise UserError(f"corpus.decontaminate: {file.name}:{record.line or record.place}: {record.reason}; mend the file")
            if isinstance(record, Record):
                texts.append(record.text)
    file.check(told["stamp"])
    return texts


def find(outputs: Outputs, store: dict[str, Any], shard: int, removed: list[str], lengths: list[int], grams: str) -> dict[str, Any]:
    """`removed.npy`: documents with an n-gram of an evaluation set; kept: -1 - its file; similarity: the share of such n-grams."""
    part = Store.of(store).shard(shard)
    tables = [(n, *(np.load(f"{grams}{n}.{name}.npy", mmap_mode="r") for name in ("grams", "owners"))) for n in lengths]
    rows: list[tuple[int, int, float]] = []
    left = np.flatnonzero(kept_mask(removed, part.base, part.base + len(part)))
    for i, raw in zip(left.tolist(), part.raws(left), strict=True):
        for n, known, owners in tables:
            mine = comparer(n)[0](raw)
            at = np.minimum(np.searchsorted(known, mine), len(known) - 1)
            hits = known[at] == mine
            if hits.any():
                rows.append((part.base + i, -1 - int(owners[at[hits][0]]), float(hits.mean())))
                break
    documents, kept, share = (np.array([row[k] for row in rows]) for k in range(3))
    outputs.save("removed.npy", removals(documents.astype(np.int64), kept.astype(np.int64), share.astype(np.float64)))
    return {"removed": len(rows)}
