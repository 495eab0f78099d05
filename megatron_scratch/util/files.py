"""Files that are either whole or absent: write beside, fsync, rename, fsync the folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

CHUNK = 1 << 20  # bytes per read while hashing


def fsync_dir(path: Path) -> None:
    """Make the names inside a folder durable; without it a rename can be lost with the power."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def atomic_write(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary neighbour of `path`; on a clean exit it is made durable and renamed over `path`, else removed."""
    path = Path(path)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(tmp, mode, encoding=None if "b" in mode else "utf-8") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
        fsync_dir(path.parent)
    finally:
        tmp.unlink(missing_ok=True)


def reserve(path: Path) -> None:
    """Have the file system find room for all of a file. One that is mapped and has holes needs it: a write to a page that finds no
    room is SIGBUS, which nobody can report."""
    with open(path, "r+b") as f:
        if hasattr(os, "posix_fallocate") and (size := os.fstat(f.fileno()).st_size):  # not on macOS
            os.posix_fallocate(f.fileno(), 0, size)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_write(path, "w") as f:
        json.dump(value, f, indent=1)
        f.write("\n")


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's content, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while piece := f.read(CHUNK):
            digest.update(piece)
    return digest.hexdigest()
