"""What comes out of a file: documents, and what could not be read, with where it stands."""

from __future__ import annotations

import errno
import lzma
import zlib
from dataclasses import dataclass
from typing import Any

DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError)  # what reading raises where a file is cut, flipped, gone or forbidden
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)


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


def lasting(error: BaseException) -> bool:
    """Whether reading again would fail again: the bytes are damaged, or the file may not be opened. False for a disk or a network
    that failed: what they hold may be well, so it is no reason to leave it out."""
    return not isinstance(error, OSError) or error.errno in (None, *FORBIDDEN)


def unreadable(error: BaseException, place: int = 0, line: int | None = None) -> Bad:
    """The rest of a file that cannot be read. Errors: the error itself, if it does not last."""
    if not lasting(error):
        raise error
    return Bad(f"unreadable file ({type(error).__name__})", place, line)


def empty() -> Bad:
    return Bad("empty file", 0)


def too_large(most: int) -> str:
    return f"larger than corpus.max_record_mb={most >> 20}"


def field(text: Any, name: Any, place: int, line: int | None, keys: Keys) -> Record | Bad:
    """A record from the value of its field `keys.text`."""
    if not isinstance(text, str):
        return Bad(f"field {keys.text!r} is not text", place, line, repr(text).encode("utf-8", "replace")[:200])
    return Record(text, place, line, name)
