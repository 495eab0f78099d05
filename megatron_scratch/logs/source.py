"""One file of a run, and how much of it a sink has been given."""

from __future__ import annotations

import json
import zlib
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_scratch.logs.sink import Row
from megatron_scratch.logs.tail import Rows


class Source:
    """Rows in their order, those left out that a sink has. Step and checksum of each are kept (16 bytes): where a file has been
    replaced by one without its last rows, they tell which."""

    def __init__(self, path: Path, sent: dict[str, Any], stepped: bool = True) -> None:
        """
        Args:
            sent: what `sent()` said in an earlier process.
            stepped: rows after a step can be dropped, to come anew. The ledger keeps all of its rows.
        """
        self.rows, self.stepped = Rows(path), stepped
        self.skip, self.last = int(sent.get("rows", 0)), int(sent.get("step", -1))
        self.floor = -1
        self.steps, self.marks = array("q"), array("Q")

    def sent(self) -> dict[str, int]:
        """What has been given, as far as it holds."""
        return {"rows": max(self.skip, len(self.marks)), "step": self.last}

    def take(self) -> tuple[int | None, list[Row]]:
        """Rows to give. Or the step after which what has been given holds no more; `back_to` is to follow."""
        while fresh := self.rows.new():
            if self.rows.replaced:
                dropped, fresh = self._compare(fresh)
                if dropped is not None:
                    return dropped, []
            if given := [row for row in fresh if self._is_new(row)]:
                return None, given
        if self.rows.file is not None:  # it has been read to its end; one with fewer rows than were sent has been begun anew
            self.skip = min(self.skip, len(self.marks))
        return None, []

    def back_to(self, step: int) -> None:
        """Give rows after `step` once more, if any of them has been given."""
        if self.last > step:
            self.rows.again()
            self.steps, self.marks = array("q"), array("Q")
            self.skip, self.last, self.floor = 0, step, step

    def close(self) -> None:
        self.rows.close()

    def _is_new(self, row: Row) -> bool:
        step = int(row.get("step") or 0)
        self.steps.append(step)
        self.marks.append(_mark(row))
        new = len(self.marks) > self.skip and step > self.floor
        if new:
            self.last = max(self.last, step)
        return new

    def _compare(self, fresh: list[Row]) -> tuple[int | None, list[Row]]:
        """The last step that another file shares with the one before; None: it has all rows of that one, and these beyond."""
        while more := self.rows.new():
            fresh = more if self.rows.replaced else fresh + more
        same = _same(map(_mark, fresh), self.marks)
        if same < len(self.marks) and self.stepped:
            return self.steps[same - 1] if same else -1, []
        del self.marks[same:], self.steps[same:]
        return None, fresh[same:]


def _mark(row: Row) -> int:
    return zlib.crc32(json.dumps(row, sort_keys=True).encode())


def _same(a: Iterable[int], b: Iterable[int]) -> int:
    """How many are alike, from the first."""
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count
