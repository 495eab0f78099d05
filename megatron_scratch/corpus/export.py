"""Documents as text again: OUTPUT/documents/NNNNN.jsonl.zst (.gz where zstandard is not installed), in the order of the input.

A record has `text`, `source` (its file), `place` (its first byte in that file as decompressed, or its row of a table) and, where
the document had an id, `id`: 16 hexadecimal digits, the hash that `data.sidecar.id_hash` gives for it.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_scratch.corpus.dedup.removals import kept_mask
from megatron_scratch.corpus.stages import Done, Outputs
from megatron_scratch.corpus.store import Store
from megatron_scratch.util.files import fsync_dir

if TYPE_CHECKING:
    from megatron_scratch.corpus.graph import Graph

FOLDER = "documents"
FILE = 1 << 28  # bytes of text in a file: cut by documents, so that no number of workers or shards changes it
CHUNK = 1 << 18  # bytes compressed at once, wherever shards end: the same file for any
LEVEL = {"zst": 1, "gz": 6}  # zstd at 3, its default, makes prose 14 % smaller and takes 1.6 times as long; gzip's default


def suffix() -> str:
    return "zst" if find_spec("zstandard") else "gz"


def tasks(graph: Graph) -> list[dict[str, Any]]:
    """Documents [first, end) by number for each file: a file ends before the first that is left and begins beyond FILE bytes."""
    cuts, before, last = [0], 0, 0
    for s in range(len(graph.text.stems)):
        shard = graph.text.shard(s)
        left = np.flatnonzero(kept_mask(graph.removed, shard.base, shard.base + len(shard)))
        if not len(left):
            continue
        sizes = np.diff(shard.starts)[left]
        files = (before + np.cumsum(sizes) - sizes) // FILE
        cuts += (shard.base + left[np.diff(files, prepend=last) > 0]).tolist()
        before, last = before + int(sizes.sum()), int(files[-1])
    return [{"first": first, "end": end} for first, end in pairwise([*cuts, graph.text.documents]) if first < end]


def run(outputs: Outputs, store: dict[str, Any], removed: list[str], first: int, end: int, sources: list[str],
        suffix: str) -> dict[str, Any]:  # fmt: skip
    """`jsonl.SUFFIX`: what is left of documents [first, end). Returns its counts, bytes and sha256."""
    shards, packer, lines = Store.of(store), _packer(suffix), bytearray()
    counts = dict.fromkeys(("documents", "characters", "bytes"), 0)
    with outputs.open(f"jsonl.{suffix}") as f:
        for s, base in enumerate(shards.bases[:-1]):
            low, high = max(first, base), min(end, shards.bases[s + 1])
            if low >= high:
                continue
            part = shards.shard(s)
            left = np.flatnonzero(kept_mask(removed, low, high)) + low - base
            rows = np.array(part.rows[low - base : high - base])[left - (low - base)]
            columns = (rows[name].tolist() for name in ("source", "place", "id"))
            for raw, source, place, name in zip(part.raws(left), *columns, strict=True):
                lines += _line(raw, sources[source], place, name)
                if len(lines) >= CHUNK:
                    f.write(packer.compress(lines))
                    lines.clear()
            counts["documents"] += len(left)
            counts["characters"] += int(rows["chars"].sum(dtype=np.int64))
            counts["bytes"] += int(np.diff(part.starts)[left].sum())
        f.write(packer.compress(lines))
        f.write(packer.flush())
    size, sha256 = outputs.files[outputs.path(f"jsonl.{suffix}").name]
    return {**counts, "size": size, "sha256": sha256}


def _packer(suffix: str) -> Any:
    """Something with `compress` and `flush`; the same bytes for the same calls."""
    if suffix == "gz":
        return zlib.compressobj(LEVEL["gz"], wbits=31)  # with gzip's header, and no date in it
    import zstandard

    return zstandard.ZstdCompressor(level=LEVEL["zst"], write_checksum=True).compressobj()


def _line(raw: bytes, source: str, place: int, name: int) -> bytes:
    told: dict[str, Any] = {"text": raw.decode("utf-8"), "source": source, "place": place}
    if name:
        told["id"] = f"{name:016x}"
    return _dumps()(told) + b"\n"


@cache
def _dumps() -> Callable[[Any], bytes]:
    """To JSON without spaces: orjson's writer, four times as fast, if it is installed. Python's writes the same bytes."""
    try:
        return import_module("orjson").dumps
    except ModuleNotFoundError:
        return lambda told: json.dumps(told, ensure_ascii=False, separators=(",", ":")).encode()


def place(done: Done, suffix: str, output: Path) -> dict[str, tuple[int, str]]:
    """Give the files of the stage their place in `output`, all at once. Returns (bytes, sha256) of each by name."""
    tmp, final = output / f".{FOLDER}.tmp", output / FOLDER
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir()
    written = {}
    for index, told in enumerate(done.results):
        name = f"{index:05d}.jsonl.{suffix}"
        try:
            os.link(done.path(index, f"jsonl.{suffix}"), tmp / name)
        except OSError:  # a filesystem without links
            shutil.copyfile(done.path(index, f"jsonl.{suffix}"), tmp / name)
        written[f"{FOLDER}/{name}"] = (told["size"], told["sha256"])
    fsync_dir(tmp)
    shutil.rmtree(final, ignore_errors=True)
    tmp.rename(final)
    fsync_dir(output)
    return written
