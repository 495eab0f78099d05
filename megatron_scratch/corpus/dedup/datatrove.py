"""datatrove's `.minhash.sig` files (datatrove 0.10, pipeline/dedup/minhash.py): its signatures in place of ours.

`FOLDER/bucket_BBB/RRRRR.minhash.sig` has the signatures of band B of the documents that its task (rank) R read: records without
gaps, little endian, of `rows` hashes (u64, below 2^61 - 1; or u32) and the document's number (u32), sorted by all of them in this
order. Of W ranks, R reads files R, R + W, ... of the sorted input and numbers the documents as its reader yields them: lines
that are not JSON and documents without a character are passed over, documents that our cleaners drop are not.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from megatron_scratch.corpus.dedup.removals import kept_mask
from megatron_scratch.corpus.dedup.signatures import PLACE_BITS, MinHash, band_keys
from megatron_scratch.corpus.dedup.words import U64, mix
from megatron_scratch.corpus.sources import SourceFile
from megatron_scratch.corpus.stages import STAGE, Done, Outputs
from megatron_scratch.corpus.store import Store
from megatron_scratch.util.errors import UserError

NOT_READ = (
    "not JSON",
    "not UTF-8",
    "no field",
    "field ",
    "unreadable file",
    "binary file",
)  # reasons of what it does not number either
MOST = (1 << 61) - 1  # its 64-bit hashes are below this Mersenne prime


# numbers


def number_tasks(read: Done) -> list[dict[str, Any]]:
    """A task for each task of reading."""
    told = json.loads((read.folder / STAGE).read_text("utf-8"))["tasks"]
    return [{"stems": [read.path(i, str(k)) for k in range(len(read.results[i]["shards"]))], "drops": read.path(i, "drops"),
             "files": {piece["name"]: piece["file"] for piece in task["ranges"]}} for i, task in enumerate(told)]  # fmt: skip


def number(outputs: Outputs, stems: list[str], drops: str, files: dict[str, int]) -> dict[str, Any]:
    """`index.npy` (D,) u32: how many documents of its file datatrove's reader yields before each, counted from where this task
    began to read it. Returns that count for each file of the task."""
    sources = np.concatenate([np.empty(0, np.int64), *(np.load(f"{stem}.rows.npy")["source"] for stem in stems)])
    before = np.load(f"{drops}.npy")
    counts: Counter[int] = Counter()
    index = np.empty(len(sources), np.uint32)
    done = 0
    with open(f"{drops}.jsonl", encoding="utf-8") as f:
        for line, place in zip(f, before.tolist(), strict=True):
            told = json.loads(line)
            _count(sources[done:place], index[done:place], counts)
            done = place
            if told["head"] and not told["why"].startswith(NOT_READ):
                counts[files[told["source"]]] += 1
    _count(sources[done:], index[done:], counts)
    outputs.save("index.npy", index)
    return {"counts": {str(file): n for file, n in counts.items()}}


def _count(sources: np.ndarray, index: np.ndarray, counts: Counter[int]) -> None:
    """Documents in a row that all count."""
    for file in np.unique(sources):
        here = np.flatnonzero(sources == file)
        index[here] = counts[int(file)] + np.arange(len(here))
        counts[int(file)] += len(here)


def _begins(numbered: Done, ranks: int) -> tuple[list[dict[str, int]], list[int]]:
    """(for each task of reading: file -> number of its first document there in its rank, documents of each rank)."""
    totals: Counter[int] = Counter()
    for told in numbered.results:
        totals.update({int(file): n for file, n in told["counts"].items()})
    files, begin, sizes = max(totals, default=-1) + 1, dict[int, int](), []
    for rank in range(ranks):
        mine = range(rank, files, ranks)
        sums = ends([totals[file] for file in mine])
        begin.update(zip(mine, sums, strict=False))
        sizes.append(sums[-1])
    tasks = []
    for told in numbered.results:
        tasks.append({file: begin[int(file)] for file in told["counts"]})
        for file, n in told["counts"].items():
            begin[int(file)] += n
    return tasks, sizes


def shards(read: Done, numbered: Done, ranks: int) -> list[dict[str, Any]]:
    """For each shard of documents: where `index.npy` has its documents, and what to add to them, file by file."""
    begins, _ = _begins(numbered, ranks)
    return [{"index": numbered.path(i, "index.npy"), "first": first, "begins": begins[i]} for i, told in enumerate(read.results)
            for first in ends(told["shards"])[:-1]]  # fmt: skip


def ends(counts: list[int]) -> list[int]:
    """0 and the running sums."""
    return list(accumulate(counts, initial=0))


def places(part: Any, index: str, first: int, begins: dict[str, int]) -> np.ndarray:
    """(n,) number in its rank of each document of a shard."""
    table = np.zeros(int(part.rows["source"].max(initial=0)) + 1, np.int64)
    for file, n in begins.items():
        if int(file) < len(table):
            table[int(file)] = n
    return table[part.rows["source"]] + np.load(index, mmap_mode="r")[first : first + len(part)]


def match(known: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the place of each of `wanted` in `known`, which is sorted; whether it is there)."""
    if not len(known):
        return np.zeros(len(wanted), np.int64), np.zeros(len(wanted), bool)
    at = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    return at, known[at] == wanted


# its signatures


def read_tasks(folder: str, read: Done, numbered: Done, kind: MinHash) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A task for each shard of documents, once the files are what they must be.

    Returns them and what they share. Errors: `UserError` for another number of bands or rows, for missing or cut files.
    """
    names = _ranks(folder, kind)
    paths = [Path(folder, "bucket_000", name) for name in names]
    bits = _precision(folder, paths, kind)
    probes = [SourceFile(path.name, str(path), "").probe() for path in paths]
    _, sizes = _begins(numbered, len(names))
    tasks = [{"shard": s, "numbers": numbers} for s, numbers in enumerate(shards(read, numbered, len(names)))]
    return tasks, {"folder": str(Path(folder).absolute()), "bits": bits, "sizes": sizes, "probes": probes}


def record(bits: int, rows: int) -> np.dtype:
    """One record of a file."""
    return np.dtype([("hash", f"<u{bits // 8}", (rows,)), ("document", "<u4")])


def _ranks(folder: str, kind: MinHash) -> list[str]:
    """The files of each bucket, the same in all: 00000.minhash.sig and so on."""
    buckets = sorted(Path(folder).glob("bucket_*"))
    if [b.name for b in buckets] != [f"bucket_{b:03d}" for b in range(kind.bands)]:
        raise UserError(f"corpus.minhash.signatures={folder} has {len(buckets)} folders bucket_NNN and corpus.minhash.bands is "
                        f"{kind.bands}; give the folder and the number of buckets of datatrove's signatures")  # fmt: skip
    sizes = [{p.name: p.stat().st_size for p in b.glob("*.minhash.sig")} for b in buckets]
    names = sorted(sizes[0])
    if not names or names != [f"{r:05d}.minhash.sig" for r in range(len(names))]:
        raise UserError(f"corpus.minhash.signatures={folder} has {len(names)} files in bucket_000, not one for each rank from "
                        "00000.minhash.sig on; finish datatrove's signatures first")  # fmt: skip
    for bucket, other in zip(buckets, sizes, strict=True):
        if other != sizes[0]:
            raise UserError(f"corpus.minhash.signatures: the files of {bucket} are not those of bucket_000 in number and size; "
                            "make datatrove's signatures again")  # fmt: skip
    return names


def _precision(folder: str, paths: list[Path], kind: MinHash) -> int:
    """64 or 32, told by which of the records fit: sizes, order, each document once."""
    fitting = [bits for bits in (64, 32) if all(p.stat().st_size % record(bits, kind.rows).itemsize == 0 for p in paths)]
    filled = next((p for p in paths if p.stat().st_size), None)
    if filled is not None:
        fitting = [bits for bits in fitting if _sound(np.fromfile(filled, record(bits, kind.rows)), bits)]
    if not fitting:
        raise UserError(f"corpus.minhash.signatures={folder}: the files are not sorted records of corpus.minhash.rows={kind.rows} "
                        "hashes; give the hashes per bucket of datatrove's signatures")  # fmt: skip
    return fitting[0]


def _sound(records: np.ndarray, bits: int) -> bool:
    first = records["hash"][:, 0]
    return (len(np.unique(records["document"])) == len(records) and bool((first[1:] >= first[:-1]).all())
            and (bits == 32 or int(records["hash"].max(initial=0)) < MOST))  # fmt: skip


def read(outputs: Outputs, store: dict[str, Any], removed: list[str], kind: dict[str, int], shard: int, numbers: dict[str, Any],
         files: dict[str, Any]) -> dict[str, Any]:  # fmt: skip
    """What `minhash.sign` writes, from datatrove's files. A hash of 64 bits becomes one of 32, equal where they were.

    Args:
        numbers: the shard's, of `shards`.
        files: what `read_tasks` says of them.
    """
    folder, bits, sizes = files["folder"], files["bits"], files["sizes"]
    part, minhash = Store.of(store).shard(shard), MinHash(**kind)
    keep = kept_mask(removed, part.base, part.base + len(part))
    place, rank = places(part, **numbers), part.rows["source"] % len(sizes)
    found = np.zeros((len(part), minhash.size), np.uint32)
    signed = np.zeros(len(part), np.int64)
    for r in np.unique(rank):
        here = np.flatnonzero((rank == r) & keep)
        here = here[np.argsort(place[here], kind="stable")]
        for band in range(minhash.bands):
            records = _records(folder, band, int(r), record(bits, minhash.rows), sizes[r])
            at, hit = match(place[here], records["document"])
            found[here[at[hit]], band * minhash.rows : (band + 1) * minhash.rows] = _folded(records["hash"][hit], bits)
            signed[here[at[hit]]] += 1
    if wrong := np.flatnonzero((signed != 0) & (signed != minhash.bands)).tolist():
        raise UserError(f"corpus.minhash.signatures={folder}: document {place[wrong[0]]} of rank {rank[wrong[0]]} is not in all "
                        "buckets; make datatrove's signatures again")  # fmt: skip
    there = np.flatnonzero(signed)
    words = band_keys(found[there], minhash) << U64(PLACE_BITS) | np.arange(len(there), dtype=U64)
    words.sort(axis=1)
    outputs.save("signatures.npy", found[there])
    outputs.save("numbers.npy", there + part.base)
    outputs.save("bands.npy", words)
    return {"documents": int(keep.sum()), "signed": len(there)}


def _records(folder: str, band: int, rank: int, kind: np.dtype, size: int) -> np.ndarray:
    """One file. Errors: `UserError` for a document that we have not read."""
    path = Path(folder, f"bucket_{band:03d}", f"{rank:05d}.minhash.sig")
    records = np.fromfile(path, kind)
    last = int(records["document"].max(initial=0))
    if len(records) and last >= size:
        raise UserError(f"corpus.minhash.signatures: {path} has document {last}, and there are {size} in the files of corpus.input "
                        "that rank read; give the same files, in the same order")  # fmt: skip
    return records


def _folded(hashes: np.ndarray, bits: int) -> np.ndarray:
    return hashes if bits == 32 else (mix(hashes.astype(U64)) >> U64(32)).astype(np.uint32)
