"""Our signatures as datatrove's `.minhash.sig` files, whose format `datatrove.py` has, for the stages that follow its first."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from megatron_scratch.corpus.dedup.datatrove import match, places, record, shards
from megatron_scratch.corpus.dedup.removals import read_range
from megatron_scratch.corpus.dedup.signatures import MinHash
from megatron_scratch.corpus.stages import Done, Outputs
from megatron_scratch.corpus.store import Store


def tasks(files: int, read: Done, numbered: Done) -> list[dict[str, Any]]:
    """A task for each input file, which is a rank for datatrove, with the shards that may hold documents of it."""
    ranges: list[list[dict[str, Any]]] = [[] for _ in range(files)]
    told = iter(enumerate(shards(read, numbered, files)))
    for result in read.results:
        for _, (s, shard) in zip(result["shards"], told, strict=False):
            for file, begin in shard["begins"].items():
                ranges[int(file)].append({**shard, "shard": s, "begins": {file: begin}})
    return [{"file": file, "parts": parts} for file, parts in enumerate(ranges)]


def run(outputs: Outputs, store: dict[str, Any], signed: list[str], copies: list[str], kind: dict[str, int], file: int,
        parts: list[dict[str, Any]]) -> dict[str, Any]:  # fmt: skip
    """`BBB.minhash.sig` for each band: the documents of a file as datatrove numbers and sorts them, 64 bits a hash, its default.
    An exact copy, which we did not sign, has the signature of the document that it is a copy of."""
    everything, minhash, table = Store.of(store), MinHash(**kind), _Table(signed)
    rows, numbers = [np.empty((0, minhash.size), np.uint32)], [np.empty(0, np.int64)]
    for told in parts:
        part = everything.shard(told["shard"])
        mine = np.flatnonzero(part.rows["source"] == file)
        found, have = table.rows(_originals(mine + part.base, copies))
        rows.append(found)
        numbers.append(places(part, told["index"], told["first"], told["begins"])[mine][have])
    signature, number = np.concatenate(rows), np.concatenate(numbers)
    for band in range(minhash.bands):
        with outputs.open(f"{band:03d}.minhash.sig") as f:
            f.write(_sorted(signature[:, band * minhash.rows : (band + 1) * minhash.rows], number).tobytes())
    return {"documents": len(number)}


def _originals(numbers: np.ndarray, copies: list[str]) -> np.ndarray:
    """Documents, exact copies replaced by the one that stays."""
    if not len(numbers):
        return numbers
    gone = read_range(copies, int(numbers[0]), int(numbers[-1]) + 1)
    at, hit = match(gone["document"], numbers)
    numbers = numbers.copy()
    numbers[hit] = gone["kept"][at[hit]]
    return numbers


def _sorted(hashes: np.ndarray, number: np.ndarray) -> np.ndarray:
    records = np.empty(len(number), record(64, hashes.shape[1]))
    records["hash"], records["document"] = hashes, number
    return records[np.lexsort((number, *hashes.T[::-1]))]


class _Table:
    """The signatures of all shards, by document number."""

    def __init__(self, stems: list[str]):
        firsts = [(stem, np.load(f"{stem}.numbers.npy", mmap_mode="r")[:1].tolist()) for stem in stems]
        self.stems = [stem for stem, first in firsts if first]
        self.first = np.array([first[0] for _, first in firsts if first])
        self.width = np.load(f"{stems[0]}.signatures.npy", mmap_mode="r").shape[1]

    def rows(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """((n, K) u32, (n,) i64): the signatures of those of `numbers` that have one, and which these are."""
        shard = np.searchsorted(self.first, numbers, side="right") - 1
        out, have = np.empty((len(numbers), self.width), np.uint32), np.zeros(len(numbers), bool)
        for s in np.unique(shard[shard >= 0]):
            here = np.flatnonzero(shard == s)
            at, hit = match(np.load(f"{self.stems[s]}.numbers.npy", mmap_mode="r"), numbers[here])
            out[here[hit]] = np.load(f"{self.stems[s]}.signatures.npy", mmap_mode="r")[at[hit]]
            have[here[hit]] = True
        return out[have], np.flatnonzero(have)


def publish(exported: Done, folder: str) -> None:
    """Give the files of `export` the names that datatrove looks for. Links where that is possible: no byte is written twice."""
    for rank in range(len(exported.results)):
        for path in sorted(exported.folder.glob(f"{rank:05d}.*.minhash.sig")):
            target = Path(folder, f"bucket_{path.name.split('.')[1]}", f"{rank:05d}.minhash.sig")
            target.parent.mkdir(parents=True, exist_ok=True)
            beside = target.with_name(f".{target.name}.{os.getpid()}")
            try:
                os.link(path, beside)
            except OSError:  # another file system
                shutil.copyfile(path, beside)
            os.replace(beside, target)
