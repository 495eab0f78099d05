"""Reads what W&B's client writes on disk, RUN/wandb/*run-*/run-ID.wandb: its transaction log, also one that is still written to, or
whose writer was killed. With the public messages of the wandb package alone; no process is started, nothing is sent.

The format is that of LevelDB's log (https://github.com/google/leveldb/blob/main/doc/log_format.md) with a header of its own: blocks
of 32 KiB, and in them fragments of records (CRC-32, length, type; a record that does not fit is cut into first, middle, last).
"""

from __future__ import annotations

import json
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK = 32768
MAGIC = b":W&B"
HEADER = 7  # bytes of the file's own, and as many before each fragment
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class Recorded:
    """What a file says of a run. `rows`: of its history, as they were logged; of what was given several times, the newest."""

    id: str = ""
    name: str = ""
    group: str = ""
    job_type: str = ""
    notes: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)  # name or glob -> {"step": its x axis, "summary": [min, ...]}
    alerts: list[dict[str, str]] = field(default_factory=list)
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    exit_code: int | None = None  # None: nobody has ended it


def files(folder: Path, run_id: str) -> list[Path]:
    """The files of a run below its `wandb` folder, oldest first."""
    found = (re.fullmatch(rf"(?:offline-)?run-(\d{{8}}_\d{{6}})-{re.escape(run_id)}(.*)", p.name) for p in folder.glob("*run-*"))
    names = sorted((m.group(1), m.group(2), m.group(0)) for m in found if m)
    return [path for *_, name in names if (path := folder / name / f"run-{run_id}.wandb").is_file()]


def records(path: Path, start: int = 0) -> Iterator[Any]:
    """Messages (`wandb_internal_pb2.Record`) up to the end, or to where a killed writer stopped.

    Args:
        start: a number of bytes; records that begin in the block after it, and later ones.

    Raises:
        ValueError: the file is none of W&B's, or has changed since it was written.
    """
    from wandb.proto import wandb_internal_pb2

    for content in _contents(path, start // BLOCK * BLOCK):
        yield wandb_internal_pb2.Record.FromString(content)


def _contents(path: Path, at: int) -> Iterator[bytes]:
    """Records, put together from their fragments. One whose beginning lies before `at` is left out."""
    whole: bytes | None = None
    with open(path, "rb") as f:
        if f.read(HEADER)[: len(MAGIC)] != MAGIC:
            raise ValueError(f"{path} does not begin like a file of W&B's")
        at = f.seek(max(at, HEADER))
        while True:
            if (left := BLOCK - at % BLOCK) < HEADER:
                at = f.seek(at + left)
            if len(header := f.read(HEADER)) < HEADER:
                return
            crc, size, kind = struct.unpack("<IHB", header)
            if kind == size == 0 or len(content := f.read(size)) < size:
                return
            if zlib.crc32(content, zlib.crc32(bytes([kind]))) != crc:
                raise ValueError(f"{path} has changed since it was written: at byte {at}")
            at += HEADER + size
            if kind in (FULL, FIRST):
                whole = content
            elif whole is not None:
                whole += content
            if kind in (FULL, LAST) and whole is not None:
                yield whole
                whole = None


def last_row(path: Path) -> dict[str, Any] | None:
    """The newest row of a file's history. Only the end of it is read: what else is in a long run's is not worth waiting for."""
    start, step = path.stat().st_size, 4 * BLOCK
    while start > 0:
        start, step = max(0, start - step), 4 * step
        found = None
        for record in records(path, start):
            found = record if record.WhichOneof("record_type") == "history" else found
        if found is not None:
            return _row(found.history.item)
    return None


def read(path: Path) -> Recorded:
    """All of a file."""
    out = Recorded()
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            out.rows.append(_row(record.history.item))
        elif kind == "summary":
            out.summary |= _row(record.summary.update)
        elif kind == "config":
            out.config |= _row(record.config.update)
        elif kind == "run":
            _run(out, record.run)
        elif kind == "metric":
            out.metrics[record.metric.name or record.metric.glob_name] = _metric(record.metric)
        elif kind == "alert":
            out.alerts.append({"title": record.alert.title, "text": record.alert.text, "level": record.alert.level})
        elif kind == "artifact":
            out.artifacts.append(_artifact(record.artifact))
        elif kind == "exit":
            out.exit_code = record.exit.exit_code
    return out


def _row(items: Any) -> dict[str, Any]:
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def _run(out: Recorded, run: Any) -> None:
    out.id, out.name, out.group, out.job_type = run.run_id, run.display_name, run.run_group, run.job_type
    out.notes, out.tags = run.notes, list(run.tags)
    out.config |= _row(run.config.update)


def _metric(metric: Any) -> dict[str, Any]:
    kept = [name for name in ("last", "min", "max", "mean", "best", "first") if getattr(metric.summary, name, False)]
    return {"step": metric.step_metric, "summary": kept}


def _artifact(artifact: Any) -> dict[str, Any]:
    entries = {entry.path: {"ref": entry.ref, "size": entry.size} for entry in artifact.manifest.contents}
    return {"name": artifact.name, "type": artifact.type, "aliases": list(artifact.aliases), "entries": entries,
            "metadata": json.loads(artifact.metadata or "{}")}  # fmt: skip
