"""The reader of W&B's transaction logs, on files written here; those of the real client: e2e/test_wandb_runs.py."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from wandb.proto import wandb_internal_pb2 as messages

from megatron_scratch.logs import wandb_file

BLOCK, HEADER = 32768, 7


def record(kind: str, **values: Any) -> bytes:
    out = messages.Record()
    items = [{"key": key, "value_json": json.dumps(value)} for key, value in values.items()]
    getattr(out, kind).CopyFrom(
        getattr(messages, f"{kind.capitalize()}Record")(**{"item" if kind == "history" else "update": items})
    )
    return out.SerializeToString()


def log(*records: bytes) -> bytes:
    """A file of these, cut into fragments as LevelDB's description of the format says."""
    out = bytearray(b":W&B\x68\xb3\x00")
    for content in records:
        first = True
        while first or content:
            if (left := BLOCK - len(out) % BLOCK) < HEADER:
                out += bytes(left)
                left = BLOCK
            piece, content = content[: left - HEADER], content[left - HEADER :]
            kind = (1 if not content else 2) if first else (3 if content else 4)
            out += struct.pack("<IHB", zlib.crc32(bytes([kind]) + piece), len(piece), kind) + piece
            first = False
    return bytes(out)


def rows(path: Path) -> list[dict[str, Any]]:
    return wandb_file.read(path).rows


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run-abc.wandb"


@pytest.mark.parametrize("size", [0, 1, 100, BLOCK - 60, BLOCK, 5 * BLOCK])
def test_records_of_all_sizes(size: int, path: Path) -> None:
    """Shorter than a block, longer, and such that a block has no room for another header."""
    written = [{"_step": n, "text": "x" * (size + n % 9), "loss": 0.1 + n / 3} for n in range(40)]
    path.write_bytes(log(*(record("history", **row) for row in written)))
    assert rows(path) == written
    assert wandb_file.last_row(path) == written[-1]


def test_the_last_row_is_found_wherever_it_lies(path: Path) -> None:
    """Behind it come system metrics and summaries: more of them than are looked at first."""
    for behind in (0, 10, 1000, 20_000):
        path.write_bytes(log(*[record("history", _step=n) for n in range(5)], *[record("summary", n="x" * 50)] * behind))
        assert wandb_file.last_row(path) == {"_step": 4}
    path.write_bytes(log(record("summary", n=1)))
    assert wandb_file.last_row(path) is None


@pytest.mark.parametrize("size", [10, 30_000])
def test_a_killed_writer(size: int, path: Path) -> None:
    """Whatever it had written is read, but for a record that is not whole."""
    written = [{"_step": n, "text": "x" * size} for n in range(5)]
    content = log(*(record("history", **row) for row in written))
    ends = [len(log(*(record("history", **row) for row in written[: n + 1]))) for n in range(5)]
    for cut in (HEADER, HEADER + 3, ends[0] - 1, ends[1], ends[1] + 5, ends[3] + 20, ends[4] - 1):
        path.write_bytes(content[:cut])
        whole = [row for row, end in zip(written, ends, strict=True) if end <= cut]
        assert rows(path) == whole
        assert wandb_file.last_row(path) == (whole[-1] if whole else None)


def test_changed_bytes_are_seen(path: Path) -> None:
    content = bytearray(log(*(record("history", _step=n, text="x" * 50) for n in range(5))))
    content[120] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="has changed since it was written"):
        rows(path)
    path.write_bytes(b"something else entirely")
    with pytest.raises(ValueError, match="does not begin like"):
        rows(path)


def test_nested_keys_and_what_is_given_twice(path: Path) -> None:
    nested = messages.Record()
    nested.history.item.add(nested_key=["a", "b"], value_json="1")
    path.write_bytes(
        log(record("config", lr=1, steps=5), nested.SerializeToString(), record("config", lr=2), record("summary", x=None))
    )
    found = wandb_file.read(path)
    assert found.rows == [{"a.b": 1}] and found.config == {"lr": 2, "steps": 5} and found.summary == {"x": None}
    assert found.exit_code is None


def test_files_of_a_run_in_order(tmp_path: Path) -> None:
    names = ["offline-run-20260102_000000-abc", "run-20260101_000000-abc", "run-20260103_000000-abc", "run-20260101_000000-abcd",
             "run-20260104_000000-other", "run-x-abc"]  # fmt: skip
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / f"run-{name.rpartition('-')[2]}.wandb").touch()
    (tmp_path / "run-20260105_000000-abc").mkdir()  # its file is not there yet
    (tmp_path / "latest-run").symlink_to(names[0])
    assert [path.parent.name for path in wandb_file.files(tmp_path, "abc")] == [names[1], names[0], names[2]]
