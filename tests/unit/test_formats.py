"""Files to records: each format, each kind of damage, and ranges that together give each record once."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_scratch.corpus import formats
from megatron_scratch.corpus.formats import Bad, End, Keys, Record, reader_of, splits
from megatron_scratch.corpus.sources import SourceFile
from megatron_scratch.util.errors import UserError

KEYS = Keys("text", "id", 1 << 20)


def squeeze_zst(raw: bytes) -> bytes:
    return pytest.importorskip("zstandard").ZstdCompressor(write_checksum=True).compress(raw)  # type: ignore[no-any-return]


SQUEEZE: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": squeeze_zst}  # fmt: skip
PACKED = sorted(suffix for suffix in SQUEEZE if suffix)


def source(path: Path, raw: bytes | None = None) -> SourceFile:
    if raw is not None:
        path.write_bytes(raw)
    return SourceFile(path.name, str(path), str(path))


def read(file: SourceFile, begin: int = 0, end: int | None = None, keys: Keys = KEYS) -> list[Any]:
    return [r for r in reader_of(file)(file, begin, end, keys) if not isinstance(r, End)]


def texts(records: list[Any]) -> list[str]:
    return [r.text for r in records if isinstance(r, Record)]


def bad(records: list[Any]) -> list[tuple[str, int | None]]:
    return [(r.reason, r.line) for r in records if isinstance(r, Bad)]


def lines(*values: Any) -> bytes:
    return b"".join(json.dumps({"text": value}).encode() + b"\n" for value in values)


# JSON lines


@pytest.mark.parametrize("suffix", sorted(SQUEEZE))
def test_json_lines_compressed_or_not(suffix: str, tmp_path: Path) -> None:
    raw = b'{"text": "one", "id": 7}\r\n\r\n  \n{"text": "z\xc3\xb6lf"}\n{"id": "x", "text": "last"}'
    found = read(source(tmp_path / f"a.JSONL{suffix}", SQUEEZE[suffix](raw)))
    assert [(r.text, r.line, r.id) for r in found] == [("one", 1, 7), ("z\u00f6lf", 4, None), ("last", 5, "x")]
    assert all(raw[r.place :].startswith(b"{") and r.text.encode() in raw[r.place :].split(b"\n")[0] for r in found)


SHAPES = {
    "plain": lines("a", "bb", "ccc"),
    "windows": lines("a", "bb", "ccc").replace(b"\n", b"\r\n"),
    "blank lines": b"\n\n" + lines("a") + b"\n \n\r\n" + lines("b") + b"\n\n",
    "no last newline": lines("a", "b", "c")[:-1],
    "a long line": lines("a", "x" * 90, "b", "c"),
    "damaged": lines("a") + b"{oops\n" + lines("b", 3) + b"\xff\n" + lines("c"),
    "a mark at the beginning": b"\xef\xbb\xbf" + lines("a", "b"),
    "nothing but newlines": b"\n" * 20,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_ranges_at_every_byte_give_each_line_once(shape: str, tmp_path: Path) -> None:
    raw = SHAPES[shape]
    file = source(tmp_path / "a.jsonl", raw)
    whole = [(type(r), r.place) for r in read(file)]
    count = raw.count(b"\n") + (not raw.endswith(b"\n"))
    for cut in range(len(raw) + 1):
        pieces = [list(reader_of(file)(file, a, b, KEYS)) for a, b in ((0, cut), (cut, len(raw)))]
        found = [(type(r), r.place) for piece in pieces for r in piece if not isinstance(r, End)]
        assert [f for f in found if f != (Bad, 0) or f in whole] == whole, cut
        assert sum(piece[-1].lines for piece in pieces) == count, cut
    rng = np.random.default_rng(1)
    for _ in range(50):
        edges = [0, *sorted(rng.integers(0, len(raw) + 1, rng.integers(2, 9)).tolist()), len(raw)]
        found = [(type(r), r.place) for a, b in zip(edges[:-1], edges[1:], strict=True) if a < b for r in read(file, a, b)]
        assert found == whole, edges


def test_splits_of_json_lines_cover_a_file(tmp_path: Path) -> None:
    file = source(tmp_path / "a.jsonl", lines(*map(str, range(1000))))
    for limit in (1, 7, 1000, 1 << 20):
        ranges = splits(file, limit)
        assert ranges[0][0] == 0 and (len(ranges) == 1 or ranges[-1][1] == file.size())
        assert all(a[1] == b[0] and 0 < b[0] - a[0] <= limit for a, b in zip(ranges, ranges[1:], strict=False))
    assert texts([r for a, b in splits(file, 777) for r in read(file, a, b)]) == list(map(str, range(1000)))
    assert len(splits(source(tmp_path / "a.jsonl.gz", gzip.compress(b"x" * 9999)), 7)) == 1, "a stream has no middle to begin at"


LINES = {
    b"{broken": "not JSON",
    b"[" * 100_000: "not JSON",  # deeper than any stack
    b'{"a":' * 100_000: "not JSON",
    b'{"text": "a\0b"}': "not JSON",  # a control character in a string
    b"\0\0\0\0": "not JSON",  # what a file system leaves at the end after a crash
    b'{"text": "a"} {"text": "b"}': "not JSON",
    b'{"n": ' + b"9" * 5000 + b', "text": "a"}': "not JSON",  # more digits than Python reads
    b'{"text": "\xff"}': "not UTF-8",
    b'{"text": "\xed\xa0\x80"}': "not UTF-8",  # half a surrogate, as bytes
    b'{"text": "\\ud800"}': "not UTF-8",  # and as an escape
    b'{"text": "\\udc00 \\ud800"}': "not UTF-8",
    b"\xff\xfe{\0": "not UTF-8",  # UTF-16
    b'{"body": "x"}': "no field 'text'",
    b"[1, 2]": "no field 'text'",
    b"null": "no field 'text'",
    b'"text"': "no field 'text'",
    b'{"text": 3}': "field 'text' is not text",
    b'{"text": null}': "field 'text' is not text",
    b'{"text": ["a"]}': "field 'text' is not text",
    b'{"text": "a", "x": {"text": 1}, "text": "b"}': "field 'text' is there twice",
    b'{"text": "' + b"x" * (1 << 20) + b'"}': "larger than corpus.max_record_mb=1",
}


@pytest.mark.parametrize("line", LINES, ids=lambda line: f"{LINES[line]} {line[:12]!r}")
def test_a_line_that_is_no_document_and_its_neighbours(line: bytes, tmp_path: Path) -> None:
    raw = lines("before") + line + b"\n" + lines("after")
    for end in (b"", b'{"text": "no newline"}'):
        found = read(source(tmp_path / "a.jsonl", raw + end))
        assert bad(found) == [(LINES[line], 2)] and texts(found) == ["before", "after"] + (["no newline"] if end else [])
        head = next(r for r in found if isinstance(r, Bad)).head.rstrip(b"\n")
        assert head in (line[:200], repr(json_of(line)).encode()[:200])


def json_of(line: bytes) -> Any:
    try:
        return json.loads(line)["text"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


SPELLINGS = [
    b'{"text": "a", "id": 7}', b'{"text": "a", "id": 123456789012345678901234567890}', b'{"text": "a", "id": 1.50}',
    b'{"text": "a", "id": 1e400}', b'{"text": "a", "id": [1, 18446744073709551616]}', b'{"text": "a", "id": {"b": -0.0}}',
    b'{"text": "a", "id": null}', b'{"text": "a", "id": true}', b'{"text": "a", "x": NaN, "y": [Infinity, -Infinity]}',
    b'{"text": "\\ud83d\\ude00 \\u0000 \\/ \\b"}', b'{"text": "\\ud800"}', b'{"text": "\xff"}', b'{"text": "tab\there"}',
    b'{"text": "a"} x', b"{'text': 'a'}", b'{"text": "a",}', b'  {"text": "a"}\r', b"[1]", b'"text"', b"1" * 5000, b"[" * 3000,
    b'{"text": "a", "text": "b"}', b'{"text": "a", "x": ' + b"[" * 1500 + b"]" * 1500 + b"}",
]  # fmt: skip


@pytest.mark.parametrize("raw", SPELLINGS, ids=lambda raw: raw[:40].decode("ascii", "backslashreplace"))
def test_the_quick_reader_of_json_is_pythons(raw: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("orjson")
    path = tmp_path / "x.jsonl"
    path.write_bytes(raw + b"\n")
    found = []
    for quick in (True, False):
        with monkeypatch.context() as patch:
            if not quick:
                patch.setattr(formats, "_quick", lambda: None)
            file = SourceFile("x.jsonl", str(path), str(path))
            found.append([(repr(r), repr(getattr(r, "id", None))) for r in reader_of(file)(file, 0, None, KEYS)])
    assert found[0] == found[1] and len(found[0]) == 2


def test_what_is_unusual_and_still_a_document(tmp_path: Path) -> None:
    good = {b'{"text": "\\ud83d\\ude00"}': "\U0001f600", b'{"text": "a\\u0000b"}': "a\0b", b'{"text": "\\"text\\""}': '"text"',
            b'{"x": NaN, "text": "a"}': "a", b'{"x": {"text": 1}, "text": "a"}': "a", b'{"text": ""}': "",
            b'\t{"text": "a"}  ': "a", b'{"id": {"text": []}, "text": "\xf4\x8f\xbf\xbf"}': "\U0010ffff"}  # fmt: skip
    found = read(source(tmp_path / "a.ndjson", b"\n".join(good)))
    assert texts(found) == list(good.values()) and bad(found) == []


def test_a_line_of_any_length_costs_the_limit(tmp_path: Path) -> None:
    """The line is 64 times the limit; what is held is a few of the limit."""
    path = tmp_path / "a.jsonl"
    with open(path, "wb") as f:
        f.write(lines("before"))
        f.truncate(1 << 26)
        f.seek(0, os.SEEK_END)
        f.write(b"\n" + lines("after"))
    tracemalloc.start()
    found = read(source(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert texts(found) == ["before", "after"] and bad(found) == [("larger than corpus.max_record_mb=1", 2)]
    assert peak < 8 * KEYS.most, peak


# streams that are cut or damaged


@pytest.mark.parametrize("suffix", PACKED)
def test_a_cut_stream_gives_its_whole_lines_and_says_where_it_ends(suffix: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    wanted = [bytes(rng.integers(97, 123, 200, dtype=np.uint8)).decode() for _ in range(2000)]
    whole = SQUEEZE[suffix](lines(*wanted))
    for cut in (1, 3, 10, len(whole) // 2, len(whole) - 9, len(whole) - 1):
        found = read(source(tmp_path / f"a.jsonl{suffix}", whole[:cut]))
        good = texts(found)
        assert good == wanted[: len(good)], cut
        ((reason, line),) = bad(found)
        assert reason.startswith("unreadable file") and line == len(good) + 1, cut


@pytest.mark.parametrize("suffix", PACKED)
def test_a_flipped_bit_is_never_read_as_text(suffix: str, tmp_path: Path) -> None:
    wanted = [f"line {i}" for i in range(3000)]
    whole = SQUEEZE[suffix](lines(*wanted))
    rng = np.random.default_rng(2)
    for at in rng.integers(len(whole) // 4, len(whole) - 16, 10).tolist():
        flipped = whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :]
        found = read(source(tmp_path / f"a.jsonl{suffix}", flipped))
        assert any(reason.startswith("unreadable file") for reason, _ in bad(found)), at


@pytest.mark.parametrize("suffix", PACKED)
def test_streams_one_after_the_other_and_rubbish_behind_them(suffix: str, tmp_path: Path) -> None:
    two = SQUEEZE[suffix](lines("a")) + SQUEEZE[suffix](b"") + SQUEEZE[suffix](lines("b"))
    assert texts(read(source(tmp_path / f"a.jsonl{suffix}", two))) == ["a", "b"]
    found = read(source(tmp_path / f"a.jsonl{suffix}", two + b"rubbish behind it"))
    assert texts(found)[:2] == ["a", "b"]
    if suffix not in (".bz2", ".xz"):  # Python's readers take no notice of what follows the last stream of these
        assert bad(found) and bad(found)[0][0].startswith("unreadable file")


def test_what_says_that_it_is_compressed_and_is_not(tmp_path: Path) -> None:
    for suffix in PACKED:
        ((reason, line),) = bad(read(source(tmp_path / f"a.jsonl{suffix}", lines("a") * 20)))
        assert reason.startswith("unreadable file") and line == 1


def test_a_zst_bomb_is_read_in_pieces(tmp_path: Path) -> None:
    """256 MiB of zeros in 8 KiB: a line beyond the limit, in bounded memory."""
    module = pytest.importorskip("zstandard")
    out = io.BytesIO()
    with module.ZstdCompressor().stream_writer(out, closefd=False) as f:
        for _ in range(256):
            f.write(bytes(1 << 20))
    file = source(tmp_path / "a.jsonl.zst", out.getvalue())
    tracemalloc.start()
    assert bad(read(file)) == [("larger than corpus.max_record_mb=1", 1)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 80 << 20, "1 KiB of a frame becomes 32 MiB at most"


def test_zstandard_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said before anything starts."""
    for name, package in (("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow.parquet")):
        monkeypatch.setitem(__import__("sys").modules, package, None)
        with pytest.raises(UserError, match=rf"needs the package {package.partition('.')[0]}; run: pip install"):
            splits(source(tmp_path / name, b"x"), 1 << 20)


# whole files


@pytest.mark.parametrize("suffix", sorted(SQUEEZE))
def test_a_file_of_text_is_one_document(suffix: str, tmp_path: Path) -> None:
    for name in ("a.txt", "a.md", "a.py", "README", "a"):
        found = read(source(tmp_path / f"{name}{suffix}", SQUEEZE[suffix](b"# t\n\nz\xc3\xb6lf\r\n")))
        assert [(r.text, r.place, r.line) for r in found] == [("# t\n\nz\u00f6lf\r\n", 0, None)], (
            "a cleaner is to change it, no reader"
        )


@pytest.mark.parametrize("name,raw,reason", [
    ("a.txt", b"", "empty file"), ("a.jsonl", b"", "empty file"), ("a.jsonl.gz", gzip.compress(b"", mtime=0), "empty file"),
    ("a.txt.gz", gzip.compress(b"", mtime=0), "empty file"), ("a.txt", b"a\0b", "binary file"), ("a.txt", b"caf\xe9", "not UTF-8"),
    ("a.txt", b"x" * (KEYS.most + 1), "larger than corpus.max_record_mb=1"),
    ("a.txt.gz", b"\x1f\x8b", "unreadable file (EOFError)"),
    ("a.parquet", b"", "unreadable file (ArrowInvalid)"), ("a.parquet", b"PAR1" * 9, "unreadable file"),
])  # fmt: skip
def test_a_file_that_is_no_document(name: str, raw: bytes, reason: str, tmp_path: Path) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    ((found, _),) = bad(read(source(tmp_path / name, raw)))
    assert found.startswith(reason)


# parquet


@pytest.fixture
def arrow() -> Any:
    module = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    return module


def table(arrow: Any, path: Path, group: int = 10, **columns: Any) -> SourceFile:
    arrow.parquet.write_table(arrow.table(columns), path, row_group_size=group)
    return source(path)


def test_rows_of_row_groups(arrow: Any, tmp_path: Path) -> None:
    wanted = [f"text {i} \u00e9" for i in range(95)]
    file = table(arrow, tmp_path / "a.parquet", text=wanted, id=list(range(95)), other=[1.0] * 95)
    assert [(r.text, r.place, r.id, r.line) for r in read(file)] == [(t, i, i, None) for i, t in enumerate(wanted)]
    for limit in (1, 1000, 1 << 30):
        ranges = splits(file, limit)
        assert [r.place for a, b in ranges for r in read(file, a, b)] == list(range(95)), limit
    assert len(splits(file, 1)) == 10 and len(splits(file, 1 << 30)) == 1


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "binary", "large_binary", "dictionary"])
def test_types_that_hold_text(kind: str, arrow: Any, tmp_path: Path) -> None:
    values = ["a", None, "z\u00f6lf"]
    column = arrow.array(values).dictionary_encode() if kind == "dictionary" else arrow.array(values).cast(getattr(arrow, kind)())
    found = read(table(arrow, tmp_path / "a.parquet", text=column))
    assert texts(found) == ["a", "z\u00f6lf"] and bad(found) == [("field 'text' is not text", None)] and found[1].place == 1


def test_columns_that_hold_none(arrow: Any, tmp_path: Path) -> None:
    for values in ([1, 2], [["a"], ["b"]], [{"text": "a"}] * 2, [True, None]):
        found = read(table(arrow, tmp_path / "a.parquet", text=values))
        assert [r.place for r in found] == [0, 1] and {r.reason for r in found} == {"field 'text' is not text"}
    file = table(arrow, tmp_path / "a.parquet", group=1, body=["a", "b"])
    assert bad([r for a, b in splits(file, 1) for r in read(file, a, b)]) == [("no field 'text'", None)], "once, however it is cut"
    assert bad(read(table(arrow, tmp_path / "a.parquet", text=arrow.array([], arrow.string())))) == [("empty file", None)]


def test_text_of_a_table_that_is_not_utf8_or_too_large(arrow: Any, tmp_path: Path) -> None:
    raw = arrow.array([b"a", b"\xff", b"x" * (KEYS.most + 1), b"d"])
    for column in (raw, raw.view(arrow.string())):  # the second claims to be text, and no writer checks it
        found = read(table(arrow, tmp_path / "a.parquet", text=column))
        assert texts(found) == ["a", "d"] and [r.place for r in found] == [0, 1, 2, 3]
        assert bad(found) == [("not UTF-8", None), ("larger than corpus.max_record_mb=1", None)]


def test_a_damaged_row_group_leaves_the_others(arrow: Any, tmp_path: Path) -> None:
    """And it is the same however the file is cut."""
    rng = np.random.default_rng(3)
    wanted = [rng.bytes(2000).hex() for _ in range(50)]
    file = table(arrow, tmp_path / "a.parquet", text=wanted)
    with arrow.parquet.ParquetFile(file.url) as opened:
        at = opened.metadata.row_group(2).column(0).data_page_offset
    raw = bytearray(Path(file.url).read_bytes())
    raw[at : at + 40] = bytes(40)
    Path(file.url).write_bytes(raw)
    pieces = [[(type(r), r.place, getattr(r, "reason", "")) for a, b in splits(file, limit) for r in read(file, a, b)]
              for limit in (1, 50_000, 1 << 30)]  # fmt: skip
    assert pieces[0] == pieces[1] == pieces[2]
    assert [p for kind, p, _ in pieces[0] if kind is Record] == [*range(20), *range(30, 50)]
    assert [(p, why.split(" (")[0]) for kind, p, why in pieces[0] if kind is Bad] == [(20, "unreadable file")]


def test_a_table_that_is_cut(arrow: Any, tmp_path: Path) -> None:
    whole = Path(table(arrow, tmp_path / "a.parquet", text=["a"] * 100).url).read_bytes()
    for cut in (3, len(whole) // 2, len(whole) - 1):
        file = source(tmp_path / "b.parquet", whole[:cut])
        assert [r.reason.split(" (")[0] for r in read(file)] == ["unreadable file"] and splits(file, 1) == [(0, None)]
