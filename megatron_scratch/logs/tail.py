"""A file of JSON lines, read as it grows."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

PIECE = 1 << 20  # bytes read at a time


class Rows:
    """The rows of a file that another process appends to, maybe replaces, and has maybe not made yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: IO[bytes] | None = None  # kept open: the number of a file that is gone may be given to the one that replaces it
        self.offset = 0
        self.replaced = False  # before the rows that came last: those are the first ones of another file, or of a shorter one

    def new(self) -> list[dict[str, Any]]:
        """Complete rows that have come since the last call, up to a MiB of them; [] if there are none. A line that is no JSON
        object, of a writer that was killed, is passed over."""
        self.replaced = False
        try:
            lines = self._lines()
        except OSError:  # absent; or on a network that has lost it
            self.close()
            return []
        rows = []
        for line in lines:
            with suppress(ValueError):
                rows.append(json.loads(line))
        return [row for row in rows if isinstance(row, dict)]

    def again(self) -> None:
        """From the first row once more."""
        self.offset = 0

    def close(self) -> None:
        """Until the next call of `new`, which goes on."""
        if self.file is not None:
            self.file.close()
        self.file = None

    def _lines(self) -> list[bytes]:
        now = os.stat(self.path)
        if self.file is not None:
            held = os.fstat(self.file.fileno())
            if (held.st_dev, held.st_ino) != (now.st_dev, now.st_ino) or now.st_size < self.offset:
                self.close()
        if self.file is None:
            self.file, self.replaced, self.offset = open(self.path, "rb", buffering=0), self.offset > 0, 0
        piece, size = self._read(PIECE), PIECE
        while len(piece) == size and b"\n" not in piece:  # one line is longer than that
            size *= 2
            piece = self._read(size)
        whole = piece[: piece.rfind(b"\n") + 1]
        self.offset += len(whole)
        return whole.splitlines()

    def _read(self, size: int) -> bytes:
        assert self.file is not None
        self.file.seek(self.offset)
        return self.file.read(size)
