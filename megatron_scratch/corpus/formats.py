"""Files to records, by what their names say: text, JSON lines, parquet; as they are or compressed.

A record that is no document (not JSON, not UTF-8, no such field, ...) comes out as `Bad` with where it stands; reading goes on.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import IO, Any
from urllib.parse import parse_qsl

from megatron_scratch.corpus.sources import DATASETS, TOPICS, SourceFile
from megatron_scratch.util.errors import UserError

COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
LINES = (".jsonl", ".ndjson", ".json")
ROWS = 1024  # of a parquet file held at once
UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)


@dataclass(frozen=True)
class Record:
    """One document: its text, its first byte in the file as decompressed (or its row), the line it is (or None), its own id."""

    text: str
    place: int
    line: int | None = None
    id: Any = None


@dataclass(frozen=True)
class Bad:
    """What could not be read: why, and where. `line` is counted from the beginning of the range that was read."""

    reason: str
    place: int
    line: int | None = None
    head: bytes = b""  # the beginning of it


@dataclass(frozen=True)
class End:
    """The end of a range of lines, and how many it had."""

    lines: int


@dataclass(frozen=True)
class Keys:
    """Which fields of a record are read, and how large one may be in bytes."""

    text: str
    id: str
    most: int


Reader = Callable[[SourceFile, int, int | None, Keys], Iterator["Record | Bad | End"]]


def reader_of(file: SourceFile) -> Reader:
    """(file, begin, end, keys) -> its records in [begin, end): bytes of JSON lines, row groups of parquet, all of anything else."""
    if file.name == TOPICS:
        return _topics
    if file.url.startswith(DATASETS):
        return _dataset
    stem = _stem(file)
    return _parquet if stem.endswith(".parquet") else _lines if stem.endswith(LINES) else _whole


def splits(file: SourceFile, limit: int) -> list[tuple[int, int | None]]:
    """Ranges of about `limit` bytes that `reader_of` takes, where a file can be cut; else the whole file."""
    reader, size = reader_of(file), file.size()
    if reader is _lines and not file.url.lower().endswith(COMPRESSED) and size > limit:
        count = -(-size // limit)
        return [(size * i // count, size * (i + 1) // count) for i in range(count)]
    if reader is _parquet:
        return _row_groups(file, limit)
    return [(0, None)]


def _stem(file: SourceFile) -> str:
    name = file.url.lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    return name


@contextmanager
def open_text(file: SourceFile) -> Iterator[IO[bytes]]:
    """The bytes as decompressed."""
    name = file.url.lower()
    with file.open() as raw, _decompressed(file, name, raw) as f:
        yield f


def _decompressed(file: SourceFile, name: str, raw: IO[bytes]) -> Any:
    if name.endswith(".gz"):
        return gzip.open(raw, "rb")
    if name.endswith(".bz2"):
        return bz2.open(raw, "rb")
    if name.endswith(".xz"):
        return lzma.open(raw, "rb")
    if name.endswith(".zst"):
        return _zstandard(file).ZstdDecompressor().stream_reader(raw, read_across_frames=True, closefd=False)
    return nullcontext(raw)


def _zstandard(file: SourceFile) -> Any:
    try:
        import zstandard
    except ModuleNotFoundError as error:
        raise UserError(f"{file.name} needs the package zstandard; run: pip install 'megatron-scratch[corpus]'") from error
    return zstandard


def _topics(file: SourceFile, begin: int, end: int | None, keys: Keys) -> Iterator[Record | Bad]:
    from pydoc_data.topics import topics

    for number, (name, text) in enumerate(sorted(topics.items())):
        yield Record(text, number, id=name)


def _whole(file: SourceFile, begin: int, end: int | None, keys: Keys) -> Iterator[Record | Bad]:
    """A file is one document, unless it holds a NUL byte or is not UTF-8."""
    try:
        with open_text(file) as f:
            raw = f.read(keys.most + 1)
    except UNREADABLE as error:
        yield Bad(f"unreadable file ({type(error).__name__})", 0)
        return
    if len(raw) > keys.most:
        yield Bad(too_large(keys.most), 0, head=raw[:200])
    elif b"\0" in raw:
        yield Bad("binary file", 0, head=raw[:200])
    else:
        try:
            yield Record(raw.decode("utf-8"), 0)
        except UnicodeDecodeError:
            yield Bad("not UTF-8", 0, head=raw[:200])


def too_large(most: int) -> str:
    return f"larger than corpus.max_record_mb={most >> 20}"


def _lines(file: SourceFile, begin: int, end: int | None, keys: Keys) -> Iterator[Record | Bad | End]:
    """JSON lines: one document a line. Blank lines are no documents. A line belongs to the range that its first byte is in."""
    place, line = begin, 0
    try:
        with open_text(file) as f:
            if begin:
                f.seek(begin - 1)
                place = begin - 1 + _skip(f)
            while end is None or place < end:
                raw = f.readline(keys.most + 1)
                if not raw:
                    break
                line += 1
                size = len(raw)
                if size > keys.most and not raw.endswith(b"\n"):
                    size += _skip(f)
                    yield Bad(too_large(keys.most), place, line, raw[:200])
                elif raw.strip():
                    yield _record(raw, place, line, keys)
                place += size
    except UNREADABLE as error:
        yield Bad(f"unreadable file ({type(error).__name__})", place, line + 1)
    yield End(line)


def _skip(f: IO[bytes]) -> int:
    """Read to the end of a line, a megabyte at a time; returns the bytes."""
    total = 0
    while raw := f.readline(1 << 20):
        total += len(raw)
        if raw.endswith(b"\n"):
            break
    return total


def _record(raw: bytes, place: int, line: int, keys: Keys) -> Record | Bad:
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError:
        return Bad("not UTF-8", place, line, raw[:200])
    except (ValueError, RecursionError):
        return Bad("not JSON", place, line, raw[:200])
    if not isinstance(value, dict) or keys.text not in value:
        return Bad(f"no field {keys.text!r}", place, line, raw[:200])
    return _field(value[keys.text], value.get(keys.id), place, line, keys)


def _field(text: Any, name: Any, place: int, line: int | None, keys: Keys) -> Record | Bad:
    if not isinstance(text, str):
        return Bad(f"field {keys.text!r} is not text", place, line, repr(text).encode("utf-8", "replace")[:200])
    return Record(text, place, line, name)


def _pyarrow(file: SourceFile) -> Any:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise UserError(f"{file.name} needs the package pyarrow; run: pip install 'megatron-scratch[corpus]'") from error
    return pyarrow.parquet


def _row_groups(file: SourceFile, limit: int) -> list[tuple[int, int | None]]:
    from megatron_scratch.corpus.stages import batches

    parquet = _pyarrow(file)
    try:
        with file.open() as f, parquet.ParquetFile(f) as table:
            meta = table.metadata
            sizes = [meta.row_group(i).total_byte_size for i in range(meta.num_row_groups)]
    except (OSError, ValueError):  # pyarrow's own errors are of these
        return [(0, None)]  # reading it says what is wrong
    return list(batches(sizes, limit)) or [(0, None)]


def _parquet(file: SourceFile, begin: int, end: int | None, keys: Keys) -> Iterator[Record | Bad]:
    """Rows of row groups [begin, end), by the columns `keys.text` and `keys.id`."""
    row = 0
    try:
        with file.open() as f, _pyarrow(file).ParquetFile(f) as table:
            names = table.schema_arrow.names
            if keys.text not in names:
                yield Bad(f"no field {keys.text!r}", 0)
                return
            row = sum(table.metadata.row_group(i).num_rows for i in range(begin))
            groups = range(begin, table.metadata.num_row_groups if end is None else end)
            columns = [keys.text, *([keys.id] if keys.id in names else [])]
            for batch in table.iter_batches(ROWS, row_groups=list(groups), columns=columns):
                for value in batch.to_pylist():
                    yield _field(value[keys.text], value.get(keys.id), row, None, keys)
                    row += 1
    except (OSError, ValueError) as error:
        yield Bad(f"unreadable file ({type(error).__name__})", row)


def _dataset(file: SourceFile, begin: int, end: int | None, keys: Keys) -> Iterator[Record | Bad]:
    """A Hugging Face dataset as a stream, in its own order: datasets://NAME?name=CONFIG&split=train&data_files=..."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise UserError(f"{file.name} needs the package datasets; run: pip install 'megatron-scratch[datasets]'") from error
    name, _, query = file.url.removeprefix(DATASETS).partition("?")
    options = {"split": "train", **dict(parse_qsl(query))}
    for row, value in enumerate(datasets.load_dataset(name, streaming=True, **options)):
        if keys.text not in value:
            yield Bad(f"no field {keys.text!r}", row)
        else:
            yield _field(value[keys.text], value.get(keys.id), row, None, keys)
