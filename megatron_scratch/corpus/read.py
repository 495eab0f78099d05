"""The first stage: records to clean documents, in shards of bounded size, and what was dropped on the way."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from megatron_scratch.config.corpus import CorpusConfig
from megatron_scratch.corpus.clean import Cleaner, Drop, build_cleaners
from megatron_scratch.corpus.dedup.exact import sorted_hashes
from megatron_scratch.corpus.formats import Bad, End, Keys, Record, reader_of, splits
from megatron_scratch.corpus.sources import SourceFile
from megatron_scratch.corpus.stages import Done, Outputs, batches
from megatron_scratch.corpus.store import ROW, ShardWriter
from megatron_scratch.util.errors import UserError

DIGEST = 16  # bytes of blake2b per text: two of 10^9 different texts collide with probability 10^-21
SAMPLES = 5  # places named per reason
HEAD = 200  # characters of a dropped document that are shown
MOST = 1 << 20  # documents in a shard: their rows take 300 bytes each until it is written


def tasks(c: CorpusConfig, files: list[SourceFile]) -> list[dict[str, Any]]:
    """Ranges of files of about corpus.shard_mb together. With corpus.max_bytes one task reads until that is full."""
    limit = c.shard_mb << 20
    pieces, sizes = [], []
    for number, file in enumerate(files):
        ranges = splits(file, limit)
        pieces += [(number, begin, end) for begin, end in ranges]
        sizes += [max(1, file.size() // len(ranges))] * len(ranges)
    whole = [(0, len(pieces))] if c.max_bytes is not None else batches(sizes, limit)
    stamps = [file.stamp() for file in files]
    return [{"ranges": [{"file": n, "name": files[n].name, "url": files[n].url, "begin": begin, "end": end, "stamp": stamps[n]}
                        for n, begin, end in pieces[first:last]]} for first, last in whole]  # fmt: skip


def settings(c: CorpusConfig) -> dict[str, Any]:
    """What all tasks share."""
    options = dict(c.options)
    if "length" in c.clean:
        options["length"] = {"min_chars": c.min_chars, **(c.options.get("length") or {})}
    return {"keys": [c.text_key, c.id_key, c.max_record_mb << 20], "on_bad": c.on_bad, "clean": c.clean, "options": options,
            "max_bytes": c.max_bytes, "shard": c.shard_mb << 20}  # fmt: skip


class Dropped:
    """What was left out: a count per reason, the first places with the beginning of their texts, and a line of JSON for each."""

    def __init__(self, file: Any, documents: Callable[[], int]):
        self.counts: Counter[str] = Counter()
        self.documents = documents
        self.samples: dict[str, list[dict[str, Any]]] = {}
        self.file = file
        self.before: list[int] = []  # documents of this task that came before each

    def add(self, reason: str, name: str, begin: int, place: int, line: int | None, head: str) -> None:
        self.counts[reason] += 1
        self.before.append(self.documents())
        head = head[:HEAD]
        if self.counts[reason] <= SAMPLES:
            self.samples.setdefault(reason, []).append({"source": name, "begin": begin, "line": line, "place": place, "head": head})
        told = {"source": name, "place": place, "why": reason, "head": head}
        self.file.write((json.dumps(told, ensure_ascii=False) + "\n").encode("utf-8", "replace"))

    def as_dict(self) -> dict[str, Any]:
        return {reason: {"count": n, "samples": self.samples[reason]} for reason, n in sorted(self.counts.items())}


def run(outputs: Outputs, ranges: list[dict[str, Any]], keys: list[Any], on_bad: str, clean: list[str], options: dict[str, Any],
        max_bytes: int | None, shard: int) -> dict[str, Any]:  # fmt: skip
    """Shards `K.text`, `K.starts.npy`, `K.rows.npy`, `K.hashes.npy`; `drops.jsonl`. Returns counts per shard, source and reason."""
    cleaners = build_cleaners(clean, options)
    sources: dict[str, Counter[str]] = {}
    lines: list[int] = []
    with outputs.open("drops.jsonl") as f, _Shards(outputs, shard) as shards:
        dropped = Dropped(f, lambda: shards.documents)
        for told in ranges:
            if max_bytes is not None and shards.bytes >= max_bytes:
                break
            file, count = SourceFile(told["name"], told["url"], ""), sources.setdefault(str(told["file"]), Counter())
            lines.append(0)
            for record in reader_of(file)(file, told["begin"], told["end"], Keys(*keys)):
                if isinstance(record, End):
                    lines[-1] = record.lines
                    continue
                _take(record, told, cleaners, on_bad, shards, dropped, count, max_bytes)
                if max_bytes is not None and shards.bytes >= max_bytes:
                    break
            file.check(told["stamp"])
    outputs.save("drops.npy", np.array(dropped.before, np.int64))
    return {"shards": shards.counts, "documents": shards.documents, "bytes": shards.bytes,
            "seen": sum(c["seen"] for c in sources.values()),
            "sources": {n: {k: c[k] for k in ("documents", "characters", "bytes")} for n, c in sources.items()},
            "lines": lines, "dropped": dropped.as_dict()}  # fmt: skip


def why(read: Done) -> str:
    """What was left out, in a line."""
    counts: Counter[str] = Counter()
    for told in read.results:
        counts.update({reason: dropped["count"] for reason, dropped in told["dropped"].items()})
    return ", ".join(f"{n} {reason}" for reason, n in sorted(counts.items())) or "the files are empty"


def _take(record: Record | Bad, told: dict[str, Any], cleaners: list[tuple[str, Cleaner]], on_bad: str, shards: _Shards,
          dropped: Dropped, count: Counter[str], max_bytes: int | None) -> None:  # fmt: skip
    """One record: to a shard, or to `dropped`."""
    count["seen"] += 1
    where = (told["name"], told["begin"], record.place, record.line)
    if isinstance(record, Bad):
        if on_bad == "stop":
            SourceFile(told["name"], told["url"], "").check(told["stamp"])
            raise UserError(
                f"{_exact_place(told, record)}: {record.reason}; mend it, or leave such records out with corpus.on_bad=skip"
            )
        dropped.add(record.reason, *where, record.head.decode("utf-8", "replace"))
        return
    text: str | Drop = record.text
    if not record.text or record.text.isspace():
        dropped.add("empty", *where, record.text)
        return
    for _, cleaner in cleaners:
        text = cleaner(text)  # type: ignore[arg-type]
        if isinstance(text, Drop):
            dropped.add(text.reason, *where, record.text)
            return
    if not text or text.isspace():
        dropped.add("empty", *where, record.text)
        return
    try:
        raw = text.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        dropped.add("not UTF-8", *where, record.text)
        return
    if max_bytes is not None and shards.bytes + len(raw) > max_bytes:
        text = raw[: max_bytes - shards.bytes].decode("utf-8", "ignore")
        raw = text.encode("utf-8")
    shards.add(raw, len(text), told["file"], record)
    count["documents"] += 1
    count["characters"] += len(text)
    count["bytes"] += len(raw)


def _exact_place(told: dict[str, Any], record: Bad) -> str:
    """file:line, with the lines of the file before it counted where a range begins in the middle."""
    if record.line is None:
        return f"{told['name']} (record {record.place})"
    if not told["begin"]:
        return f"{told['name']}:{record.line}"
    before, left = 0, record.place
    with SourceFile(told["name"], told["url"], "").open() as f:
        while left and (data := f.read(min(left, 1 << 20))):
            before, left = before + data.count(b"\n"), left - len(data)
    return f"{told['name']}:{before + 1}"


class _Shards:
    """Documents to shards 0, 1, ... of one task; a full one is closed before the next begins."""

    def __init__(self, outputs: Outputs, limit: int):
        self.outputs, self.limit = outputs, limit
        self.counts: list[int] = []
        self.bytes = self.documents = 0
        self.writer: ShardWriter | None = None

    def __enter__(self) -> _Shards:
        return self

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        if self.writer is not None:
            self._close(kind, value, trace)

    def add(self, raw: bytes, chars: int, source: int, record: Record) -> None:
        if self.writer is None:
            self.writer = ShardWriter(self.outputs, len(self.counts)).__enter__()
        digest = hashlib.blake2b(raw, digest_size=DIGEST).digest()
        name = 0 if record.id is None else _id_hash(record.id)
        self.writer.add(
            raw, (int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little"), source, chars, record.place, name)
        )
        self.bytes += len(raw)
        self.documents += 1
        if self.writer.size >= self.limit or len(self.writer.ends) >= MOST:
            self._close()

    def _close(self, kind: Any = None, value: Any = None, trace: Any = None) -> None:
        writer, self.writer = self.writer, None
        assert writer is not None
        writer.__exit__(kind, value, trace)
        if kind is None:
            self.outputs.save(f"{len(self.counts)}.hashes.npy", sorted_hashes(np.array(writer.rows, ROW)))
            self.counts.append(len(writer.ends))


def _id_hash(value: Any) -> int:
    return int.from_bytes(hashlib.blake2b(str(value).encode("utf-8", "replace"), digest_size=8).digest(), "little")
