"""Rows of a file that grows, is replaced, is cut short, or ends in half a line; and which of them a sink is given."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_scratch.logs import tail
from megatron_scratch.logs.source import Source
from megatron_scratch.logs.tail import Rows


def rows(*steps: int, **more: Any) -> list[dict[str, Any]]:
    return [{"step": step, **more} for step in steps]


def append(path: Path, found: list[dict[str, Any]]) -> None:
    with open(path, "a") as f:
        f.writelines(json.dumps(row) + "\n" for row in found)


def replace(path: Path, found: list[dict[str, Any]]) -> None:
    new = path.with_suffix(".new")
    new.unlink(missing_ok=True)
    append(new, found)
    new.touch()
    os.replace(new, path)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """All that is opened meanwhile is closed."""
    opened: list[Rows] = []
    real = Rows.__init__

    def kept(self: Rows, path: Path) -> None:
        real(self, path)
        opened.append(self)

    monkeypatch.setattr(Rows, "__init__", kept)
    yield tmp_path / "metrics.jsonl"
    for rows in opened:
        rows.close()


def test_a_file_that_is_not_there_yet_and_grows(path: Path) -> None:
    tailed = Rows(path)
    assert tailed.new() == [] and not tailed.replaced
    append(path, rows(1, 2))
    assert tailed.new() == rows(1, 2) and not tailed.replaced
    assert tailed.new() == []
    append(path, rows(3))
    assert tailed.new() == rows(3) and not tailed.replaced


def test_half_a_last_line_waits_for_its_other_half(path: Path) -> None:
    tailed = Rows(path)
    path.write_text('{"step": 1}\n{"st')
    assert tailed.new() == rows(1) and tailed.new() == []
    with open(path, "a") as f:
        f.write('ep": 2}\n{"step": 3')
    assert tailed.new() == rows(2)


def test_what_is_no_row_is_passed_over(path: Path) -> None:
    path.write_bytes(b'{"step": 1}\n{"st{"step": 2}\n[3]\n\n\xff\xfe\n7\n{"step": 4, "text": "a\\u2028b\\r"}\n')
    assert Rows(path).new() == [{"step": 1}, {"step": 4, "text": "a\u2028b\r"}]


def test_a_replaced_file_comes_from_its_beginning(path: Path) -> None:
    tailed = Rows(path)
    append(path, rows(1, 2, 3))
    assert tailed.new() == rows(1, 2, 3)
    replace(path, rows(1, 2))
    append(path, rows(3, again=True))
    assert tailed.new() == [*rows(1, 2), *rows(3, again=True)] and tailed.replaced
    append(path, rows(4))
    assert tailed.new() == rows(4) and not tailed.replaced


def test_a_file_of_the_same_size_is_another_one(path: Path) -> None:
    tailed = Rows(path)
    append(path, rows(1, 2))
    tailed.new()
    for _ in range(5):  # a file system gives numbers of files anew: the one that is held open cannot be given
        replace(path, rows(3, 4))
        assert tailed.new() == rows(3, 4) and tailed.replaced


def test_a_file_that_is_cut_short_or_taken_away(path: Path) -> None:
    tailed = Rows(path)
    append(path, rows(1, 2, 3))
    tailed.new()
    os.truncate(path, len('{"step": 1}\n'))
    assert tailed.new() == rows(1) and tailed.replaced
    path.unlink()
    assert tailed.new() == []
    append(path, rows(5))
    assert tailed.new() == rows(5) and tailed.replaced


def test_a_long_file_is_read_in_pieces_and_a_poll_reads_only_what_is_new(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail, "PIECE", 64)
    read: list[int] = []
    real = Rows._read

    def counted(self: Rows, size: int) -> bytes:
        piece = real(self, size)
        read.append(len(piece))
        return piece

    monkeypatch.setattr(Rows, "_read", counted)
    tailed = Rows(path)
    long = {"step": 9, "text": "x" * 500}  # more than a piece
    append(path, [*rows(*range(1, 9)), long, *rows(10)])
    found = []
    while more := tailed.new():
        found += more
    assert found == [*rows(*range(1, 9)), long, *rows(10)]
    read.clear()
    append(path, rows(11))
    assert tailed.new() == rows(11) and tailed.new() == []
    assert sum(read) == len('{"step": 11}\n')


def given(source: Source) -> list[dict[str, Any]]:
    out = []
    while True:
        dropped, more = source.take()
        assert dropped is None
        if not more:
            return out
        out += more


def test_a_source_goes_on_where_an_earlier_process_ended(path: Path) -> None:
    append(path, rows(1, 2, 2, 3))
    first = Source(path, {})
    assert given(first) == rows(1, 2, 2, 3) and first.sent() == {"rows": 4, "step": 3}
    append(path, rows(3, 4))
    assert given(Source(path, {"rows": 4, "step": 3})) == rows(3, 4), "a row of the step that was sent last is not lost"


def test_a_source_says_after_which_step_rows_were_dropped(path: Path) -> None:
    append(path, rows(1, 2, 3, 4))
    source = Source(path, {})
    given(source)
    replace(path, rows(1, 2))
    append(path, rows(3, again=True))
    assert source.take() == (2, [])
    source.back_to(2)
    assert given(source) == rows(3, again=True) and source.sent() == {"rows": 3, "step": 3}


def test_a_source_that_lost_nothing_gives_only_what_is_new(path: Path) -> None:
    append(path, rows(1, 2))
    source = Source(path, {})
    given(source)
    replace(path, rows(1, 2, 3))
    assert given(source) == rows(3)


def test_going_back_gives_only_rows_after_the_step(path: Path) -> None:
    append(path, rows(1, 2, 3, 4))
    source = Source(path, {"rows": 4, "step": 4})
    source.back_to(2)
    assert given(source) == rows(3, 4)
    behind = Source(path, {"rows": 1, "step": 1})
    behind.back_to(2)
    assert given(behind) == rows(2, 3, 4), "a row that was never given is not dropped with those that were"


def test_a_file_that_was_begun_anew_is_given_whole(path: Path) -> None:
    path.write_text("")
    source = Source(path, {"rows": 100, "step": 100})
    assert given(source) == []
    append(path, rows(101, 102))
    assert given(source) == rows(101, 102)


def test_a_ledger_keeps_what_was_given(path: Path) -> None:
    events = [{"event": "start"}, {"event": "save", "step": 5}]
    append(path, events)
    source = Source(path, {}, stepped=False)
    assert given(source) == events
    replace(path, [events[0], {"event": "stop"}])
    assert given(source) == [{"event": "stop"}]
