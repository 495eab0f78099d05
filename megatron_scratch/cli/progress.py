"""Lines of a verb at work. The count of a stage changes in place on a terminal; elsewhere it is a line now and then."""

from __future__ import annotations

import re
import time
from typing import IO

COUNT = re.compile(r"(\w+): (\d+) of (\d+)\b")
PAUSE = 30.0  # seconds between lines about one stage in a log


class Progress:
    """Call it with a line. "NAME: K of N" is a count: each follows its stage's last one, and ends with the time the stage took."""

    def __init__(self, stream: IO[str]):
        self.stream, self.terminal = stream, stream.isatty()
        self.stage, self.open = "", False
        self.began = self.told = time.monotonic()

    def __call__(self, line: str) -> None:
        count = COUNT.match(line)
        if not count:
            self.close()
            self._write(line + "\n")
            self.began = self.told = time.monotonic()
            return
        name, k, n = count[1], int(count[2]), int(count[3])
        now = time.monotonic()
        if name != self.stage:
            self.close()
            self.stage = name
        if k == n:
            self._count(f"{name}: {n} of {n}, {now - self.began:.1f} s", "\n")
            self.stage, self.began, self.told = "", now, now
        elif self.terminal:
            self._count(f"{name}: {k} of {n}", "")
        elif now - self.told >= PAUSE:
            self.told = now
            self._write(f"{name}: {k} of {n}\n")

    def close(self) -> None:
        """End a line that was left open."""
        if self.open:
            self._write("\n")
        self.stage, self.open = "", False

    def _count(self, line: str, end: str) -> None:
        self._write(f"\r\x1b[K{line}{end}" if self.terminal else line + end)
        self.open = self.terminal and not end

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()
