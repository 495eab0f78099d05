"""Encoded shards to parts of the final order, and the parts to one `.bin` with its index, checksums and origins."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_scratch.corpus.stages import Done, Outputs
from megatron_scratch.corpus.store import Store
from megatron_scratch.corpus.write.encode import DOCUMENT
from megatron_scratch.data.indexed import paths
from megatron_scratch.data.sidecar import ORIGIN, SidecarWriter, folder_of
from megatron_scratch.data.writer import IndexedWriter
from megatron_scratch.util.files import sha256_file

PART = 1 << 27  # bytes of tokens per part


def tasks(encoded: Done, side: str, split: str, itemsize: int) -> list[dict[str, Any]]:
    """Ranges of the order: of the hash space, or of the documents as they came."""
    count = max(1, -(-sum(told[side]["tokens"] for told in encoded.results) * itemsize // PART))
    whole = 1 << 64 if split == "document" else sum(told[side]["documents"] for told in encoded.results)
    edges = [whole * i // count for i in range(count)] + [1 << 64]
    return [{"low": a, "high": b - 1} for a, b in zip(edges[:-1], edges[1:], strict=True)]


def run(outputs: Outputs, store: dict[str, Any], encoded: list[str], low: int, high: int, dtype: str,
        copies: str | None) -> dict[str, Any]:  # fmt: skip
    """`ids` and, per document, `tokens.npy` (n,) i4 and `origins.npy` (n,) of ORIGIN: the documents of order `low` to `high`."""
    found, tokens, held = [np.empty(0, DOCUMENT)], [np.empty(0, dtype)], 0
    for stem in encoded:
        rows = np.load(f"{stem}.docs.npy", mmap_mode="r")
        first = bisect_left(rows["order"], low)  # searchsorted would copy the column
        part = np.array(rows[first : bisect_right(rows["order"], high, lo=first)])
        if len(part):
            begin, count = int(part["begin"][0]), int(part["tokens"].sum())
            tokens.append(np.fromfile(f"{stem}.ids", dtype, count, offset=begin * np.dtype(dtype).itemsize))
            part["begin"] += held - begin
            held += count
        found.append(part)
    docs, ids = np.concatenate(found), np.concatenate(tokens)
    docs = docs[np.argsort(docs["order"], kind="stable")]
    view = memoryview(ids).cast("B") if len(ids) else memoryview(b"")
    with outputs.open("ids") as f:
        for start, count in zip((docs["begin"] * ids.itemsize).tolist(), (docs["tokens"] * ids.itemsize).tolist(), strict=True):
            f.write(view[start : start + count])
    outputs.save("tokens.npy", docs["tokens"].astype(np.int32))
    outputs.save("origins.npy", _origins(Store.of(store), docs["number"], copies))
    return {"documents": len(docs), "tokens": int(docs["tokens"].sum())}


def _origins(store: Store, numbers: np.ndarray, copies: str | None) -> np.ndarray:
    """(n,) of ORIGIN for documents by number. copies: (documents,) u4 file of how many went in favour of each."""
    out = np.zeros(len(numbers), ORIGIN)
    out["document"] = numbers
    shards = np.searchsorted(store.bases, numbers, side="right") - 1
    for s in np.unique(shards):
        here = shards == s
        rows = store.shard(int(s)).rows[numbers[here] - store.bases[s]]
        for name in ("source", "place", "id"):
            out[name][here] = rows[name].astype(ORIGIN[name])
    if copies is not None:
        out["copies"] = np.load(copies, mmap_mode="r")[numbers]
    return out


def join(prefix: Path, parts: Done, dtype: np.dtype, sources: list[str], lineage: dict[str, Any]) -> dict[str, tuple[int, str]]:
    """`PREFIX.bin`, `PREFIX.idx` and `PREFIX.meta/`. Returns (bytes, sha256) of each file, by its name from PREFIX's folder."""
    sidecar = SidecarWriter(prefix, parts.total("documents"))
    with IndexedWriter(prefix, dtype) as writer:
        for index in range(len(parts.results)):
            for tokens, lengths in _blocks(
                parts.path(index, "ids"), np.load(parts.path(index, "tokens.npy"), mmap_mode="r"), dtype
            ):
                writer.add_documents(tokens, lengths)
            sidecar.add(np.load(parts.path(index, "origins.npy"), mmap_mode="r"))
    sidecar.commit(writer, sources, lineage)
    whole = {path.name: (sums.size, sums.whole.hexdigest())
             for path, sums in zip(paths(prefix), (writer.bin_sums, writer.idx_sums), strict=True)}  # fmt: skip
    beside = {f"{path.parent.name}/{path.name}": (path.stat().st_size, sha256_file(path)) for path in folder_of(prefix).iterdir()}
    return whole | beside


def _blocks(path: str, lengths: np.ndarray, dtype: np.dtype) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(tokens, lengths) of up to 64 K documents at a time."""
    with open(path, "rb") as f:
        for i in range(0, len(lengths), 1 << 16):
            some = np.asarray(lengths[i : i + (1 << 16)])
            yield np.fromfile(f, dtype, int(some.sum(dtype=np.int64))), some
