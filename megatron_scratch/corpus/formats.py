"""Files to records, by what their names say: text, JSON lines, parquet; as they are or compressed.

A record that is no document (not JSON, not UTF-8, no such field, ...) comes out as `Bad` with where it stands; reading goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from typing import IO, Any

from megatron_scratch.corpus import tables
from megatron_scratch.corpus.compressed import COMPRESSED, open_text, stem_of, zstandard
from megatron_scratch.corpus.records import DAMAGED, Bad, End, Keys, Record, empty, field, too_large, unreadable
from megatron_scratch.corpus.sources import DATASETS, TOPICS, SourceFile

__all__ = ["Bad", "End", "Keys", "Reader", "Record", "reader_of", "splits"]

LINES = (".jsonl", ".ndjson", ".json")
MARK = b"\xef\xbb\xbf"  # the byte order mark, which JSON has no place for and Windows writes
Reader = Callable[[SourceFile, int, "int | None", Keys], Iterator["Record | Bad | End"]]


def reader_of(file: SourceFile) -> Reader:
    """(file, begin, end, keys) -> its records in [begin, end): bytes of JSON lines, row groups of parquet, all of anything else."""
    if file.name == TOPICS:
        return _topics
    if file.url.startswith(DATASETS):
        return tables.dataset
    stem = stem_of(file)
    return tables.parquet if stem.endswith(".parquet") else _lines if stem.endswith(LINES) else _whole


def splits(file: SourceFile, limit: int) -> list[tuple[int, int | None]]:
    """Ranges of about `limit` bytes that `reader_of` takes, where a file can be cut; else the whole file.

    Errors: `UserError` where a package is missing that reads such files.
    """
    reader, size, name = reader_of(file), file.size(), file.url.lower()
    if reader is tables.parquet:
        return tables.row_groups(file, limit)
    if reader is tables.dataset:
        tables.check_dataset(file)
    elif name.endswith(".zst"):
        zstandard(file)
    elif reader is _lines and not name.endswith(COMPRESSED) and size > limit:
        count = -(-size // limit)
        return [(size * i // count, size * (i + 1) // count) for i in range(count)]
    return [(0, None)]


def _topics(file: SourceFile, begin: int, end: int | None, keys: Keys) -> Iterator[Record | Bad]:
    from pydoc_data.topics import topics

    for number, (name, text) in enumerate(sorted(topics.items())):
        yield Record(text, number, id=name)


def _whole(file: SourceFile, begin: int, end: int | None, keys: Keys) -> Iterator[Record | Bad]:
    """A file is one document, unless it holds a NUL byte or is not UTF-8."""
    try:
        with open_text(file) as f:
            raw = f.read(keys.most + 1)
    except DAMAGED as error:
        yield unreadable(error)
        return
    if not raw:
        yield empty()
    elif len(raw) > keys.most:
        yield Bad(too_large(keys.most), 0, head=raw[:200])
    elif b"\0" in raw:
        yield Bad("binary file", 0, head=raw[:200])
    else:
        try:
            yield Record(raw.decode("utf-8"), 0)
        except UnicodeDecodeError:
            yield Bad("not UTF-8", 0, head=raw[:200])


def _lines(file: SourceFile, begin: int, end: int | None, keys: Keys) -> Iterator[Record | Bad | End]:
    """JSON lines: one document a line. Blank lines are no documents. A line belongs to the range that its first byte is in."""
    place, line = begin, 0
    try:
        with open_text(file) as f:
            if begin:
                f.seek(begin - 1)
                place = begin - 1 + _skip(f, None if end is None else end - begin + 1)
            while end is None or place < end:
                raw = f.readline(keys.most + 1)
                if not raw:
                    break
                line += 1
                size = len(raw)
                if size > keys.most and not raw.endswith(b"\n"):
                    yield Bad(too_large(keys.most), place, line, raw[:200])
                    del raw
                    size += _skip(f, None if end is None else end - place - size)
                elif (bare := raw.removeprefix(MARK) if place == 0 else raw).strip():
                    yield _record(bare, place, line, keys)
                place += size
        if not place:
            yield empty()
    except DAMAGED as error:
        yield unreadable(error, place, line + 1)
    yield End(line)


def _skip(f: IO[bytes], most: int | None) -> int:
    """Read to the end of a line, a megabyte at a time, or a little over `most` bytes: a line of many ranges is read once by each,
    not to its end by each. Returns the bytes."""
    total = 0
    while (most is None or total < most) and (raw := f.readline(1 << 20)):
        total += len(raw)
        if raw.endswith(b"\n"):
            break
    return total


def _record(raw: bytes, place: int, line: int, keys: Keys) -> Record | Bad:
    try:
        value, sure = _value(raw, keys)
    except UnicodeDecodeError:
        return Bad("not UTF-8", place, line, raw[:200])
    except (ValueError, RecursionError):
        return Bad("not JSON", place, line, raw[:200])
    if not isinstance(value, dict) or keys.text not in value:
        return Bad(f"no field {keys.text!r}", place, line, raw[:200])
    if raw.count(_quoted(keys.text)) > 1 and _twice(raw, keys.text):
        return Bad(f"field {keys.text!r} is there twice", place, line, raw[:200])
    found = field(value[keys.text], value.get(keys.id), place, line, keys)
    if not sure and isinstance(found, Record) and not _is_text(found.text):
        return Bad("not UTF-8", place, line, raw[:200])
    return found


@cache
def _quoted(key: str) -> bytes:
    return json.dumps(key).encode()


@cache
def _quick() -> Callable[[bytes], Any] | None:
    """orjson's reader, twice as fast as Python's, if it is installed."""
    try:
        return import_module("orjson").loads
    except ModuleNotFoundError:
        return None


def _value(raw: bytes, keys: Keys) -> tuple[Any, bool]:
    """What a line of JSON says, as Python's reader has it, and whether it surely holds no half surrogate. Python's is asked where
    orjson refuses (NaN, half surrogates, broken UTF-8, great depth), and where the id is more than a word, as orjson makes floats
    of integers above 64 bits."""
    if quick := _quick():
        try:
            value = quick(raw)
            if not isinstance(value, dict) or isinstance(value.get(keys.id), (str, int, type(None))):
                return value, True
        except ValueError:
            pass
    return json.loads(raw.decode("utf-8")), b"\\u" not in raw


def _twice(raw: bytes, key: str) -> bool:
    """Whether an object names a key again: JSON's readers take the last, and another text would be lost."""
    pairs: list[tuple[str, Any]] = json.loads(raw, object_pairs_hook=list)
    return sum(name == key for name, _ in pairs) > 1


def _is_text(text: str) -> bool:
    """False for half of a surrogate pair, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
