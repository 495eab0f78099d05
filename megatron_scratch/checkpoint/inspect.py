"""What a person wants to know of checkpoints: which there are, what is in one, whether they are whole. No torch, no process group.

Everything is read in pieces of a few MiB, from a folder or a URL: a login node has little memory, and the checkpoint may be larger
than any.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any

import numpy as np

from megatron_scratch.checkpoint.boxes import as_float64, numbers
from megatron_scratch.checkpoint.manifest import FORMAT, MANIFEST, CorruptCheckpoint, Manifest, itemsize
from megatron_scratch.checkpoint.place import Place, checkpoints, find_problems, open_place, reached, read_manifest
from megatron_scratch.util.errors import RunFailed, UserError, nearest

Say = Callable[[str], None]

WRITING = ("attempt", "written", "written_by")  # how it came to be; the other facts are of what it is
STAMP = "%Y-%m-%dT%H:%M:%S%z"
FIRST = 6  # numbers of a tensor that are shown
CHUNKS = 32  # chunks of a tensor that are shown


def size(n: float) -> str:
    """Bytes for a person."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            return f"{n:.0f} {unit}" if unit == "bytes" else f"{n:.1f} {unit}"
        n /= 1024
    raise AssertionError


def counted(n: int, word: str) -> str:
    return f"{n} {word}" + ("" if n == 1 else "s")


def table(head: list[str], rows: Iterable[list[Any]], right: tuple[int, ...] = ()) -> list[str]:
    """Columns as wide as what is in them; `right`: those with numbers."""
    lines = [head, *([("-" if v is None else str(v)) for v in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return ["  ".join(v.rjust(w) if i in right else v.ljust(w) for i, (v, w) in enumerate(zip(line, widths, strict=True))).rstrip()
            for line in lines]  # fmt: skip


def ls(where: str, verify: bool = False) -> list[dict[str, Any]]:
    """What lies in a run, a folder of checkpoints, or behind a URL: a row for each checkpoint, and for what is none.

    Args:
        verify: read every file.
    """
    with reached(where):
        return _ls(open_place(where), verify)


def _ls(place: Place, verify: bool) -> list[dict[str, Any]]:
    entries = place.entries()
    if MANIFEST in entries:
        return [_row(place, verify, set())]
    root = place / "checkpoints" if "checkpoints" in entries else place
    uploaded = _uploaded(place) if "ledger.jsonl" in entries else set()
    rows = [row for name in root.entries() for row in _rows(root / name, verify, uploaded)]
    if not rows:
        raise UserError(f"{place} has no checkpoints; give a run directory, a folder of checkpoints, or one checkpoint")
    return rows


def _rows(place: Place, verify: bool, uploaded: set[int]) -> list[dict[str, Any]]:
    """One of what lies in a folder of checkpoints. An attempt's folder is there as long as the run, and empty between saves."""
    name = place.name
    if name.startswith("step_"):
        return [_row(place, verify, uploaded)]
    if name.startswith("corrupt_step_"):
        return [{**_row(place, False, set()), "state": "set aside"}]
    if name.startswith(".attempt_"):
        return [_left_over(place / inner, "being written, or left by a killed save") for inner in place.entries()]
    return [_left_over(place, "left by a killed save")] if name.startswith(".") else []


def _row(place: Place, verify: bool, uploaded: set[int]) -> dict[str, Any]:
    entries = place.entries()
    facts = {"name": place.name, "path": str(place), "where": "local" if place.is_local else "remote", "state": "committed",
             "bytes": sum(e["size"] or 0 for e in entries.values()), "files": len(entries)}  # fmt: skip
    if MANIFEST not in entries and not place.is_local:
        return {**facts, "state": "no manifest: an upload that did not end"}
    try:
        manifest = read_manifest(place)
    except CorruptCheckpoint as error:
        return {**facts, "state": f"damaged: {error}"}
    problems = {n: "its size" for n, f in manifest.files.items() if entries.get(n, {}).get("size") != f.bytes}
    if verify and not problems:
        problems = find_problems(place, manifest)
    state = f"damaged: {', '.join(problems)}" if problems else "verified" if verify else "committed"
    return {**facts, "step": manifest.step, "tensors": len(manifest.tensors), "written": manifest.extra.get("written"),
            "modified": _modified(entries[MANIFEST]), "attempt": manifest.extra.get("attempt"), **layout(manifest),
            "uploaded": manifest.step in uploaded, "state": state}  # fmt: skip


def _left_over(place: Place, why: str) -> dict[str, Any]:
    entries = place.entries()
    name = place.path.rpartition("/checkpoints/")[2] or place.name
    return {"name": name, "path": str(place), "where": "local" if place.is_local else "remote", "state": why,
            "bytes": sum(e["size"] or 0 for e in entries.values()), "files": len(entries)}  # fmt: skip


def _modified(entry: Mapping[str, Any]) -> str | None:
    """For information only: no clock decides anything here."""
    at = next((entry[key] for key in ("mtime", "LastModified", "updated") if key in entry), None)
    if isinstance(at, datetime):
        return at.strftime(STAMP)
    return time.strftime(STAMP, time.localtime(at)) if isinstance(at, (int, float)) else at


def _uploaded(run: Place) -> set[int]:
    """Steps that the ledger says are on the remote storage."""
    found: set[int] = set()
    for line in run.read("ledger.jsonl").decode(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # a killed process may leave half a line
        if row.get("event") == "uploaded":
            found = (found | {row["step"]}) - set(row.get("retired", ()))
    return found


def layout(manifest: Manifest) -> dict[str, Any]:
    """How many processes wrote a checkpoint, and under which layout, if it says."""
    order = manifest.extra.get("written_by", {}).get("order", {})
    degrees = {axis: order[axis] for axis in ("pp", "dp", "cp", "ep", "tp") if axis in order}
    if not degrees:
        return {"world": None, "layout": None}
    axes = " x ".join(f"{axis} {n}" for axis, n in degrees.items() if n > 1)
    engine = order.get("engine", {}).get("name", "")
    return {"world": math.prod(degrees.values()), "layout": ", ".join(word for word in (axes, engine) if word)}


def ls_table(rows: list[dict[str, Any]]) -> list[str]:
    """`ls` for a person."""
    head = ["step", "written", "size", "files", "tensors", "ranks", "layout", "attempt", "where", "state"]
    return table(head, ([row.get("step", row["name"]), row.get("written") or row.get("modified"), size(row["bytes"]), row["files"],
                         row.get("tensors"), row.get("world"), row.get("layout"), row.get("attempt"),
                         row["where"] + (", uploaded" if row.get("uploaded") else ""), row["state"]] for row in rows),
                 right=(2, 3, 4, 5, 7))  # fmt: skip


def inspect(where: str, tensor: str | None = None) -> list[str]:
    """What is in a checkpoint (of a run: in its newest), or in one of its tensors, as lines."""
    try:
        with reached(where):
            place = checkpoints(open_place(where))[-1]
            manifest = read_manifest(place)
            return _contents(place, manifest) if tensor is None else _tensor(place, _named(manifest, tensor), manifest)
    except CorruptCheckpoint as error:
        raise RunFailed(str(error)) from error


def _named(manifest: Manifest, name: str) -> str:
    for full in (name, f"model.{name}"):
        if full in manifest.tensors:
            return full
    raise UserError(f"tensor={name} is not in the checkpoint{nearest(name, manifest.tensors)}; leave tensor= out to see all "
                    f"{len(manifest.tensors)}")  # fmt: skip


def _contents(place: Place, manifest: Manifest) -> list[str]:
    model = {name: saved for name, saved in manifest.tensors.items() if name.startswith("model.")}
    total = sum(math.prod(saved.shape) for saved in model.values())
    by = layout(manifest)
    written = [f"{FORMAT}, step {manifest.step}"]
    written += [f"written {manifest.extra['written']}"] if "written" in manifest.extra else []
    written += [f"by {by['world']} process{'es' if by['world'] > 1 else ''} ({by['layout']})"] if by["world"] else []
    written += [f"attempt {manifest.extra['attempt']}"] if "attempt" in manifest.extra else []
    bytes, files = sum(f.bytes for f in manifest.files.values()), counted(len(manifest.files), "file")
    chunks = sum(len(s.chunks) for s in manifest.tensors.values())
    lines = [str(place), "  " + ", ".join(written),
             f"  {size(bytes)} in {files}, {counted(len(manifest.tensors), 'tensor')} in {counted(chunks, 'chunk')}",
             f"  {total:,} parameters", f"  optimizer {manifest.extra.get('optim', '-')}: {_optimizer(manifest)}"]  # fmt: skip
    lines += [f"  {key}: {_fact(value)}" for key, value in manifest.extra.items() if key not in (*WRITING, "optim")]
    rows = ([name, s.dtype, list(s.shape), s.bytes, len(s.chunks)] for name, s in sorted(manifest.tensors.items()))
    return lines + [""] + table(["tensor", "dtype", "shape", "bytes", "chunks"], rows, right=(3, 4))


def _optimizer(manifest: Manifest) -> str:
    """What it remembers of how many parameters."""
    keys = Counter(name.rpartition(".")[2] for name in manifest.tensors if name.startswith("optim."))
    return ", ".join(f"{key} of {count}" for key, count in sorted(keys.items())) or "no state"


def _fact(value: Any) -> str:
    """A section on one line; a long list by its length."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_fact(item)}" for key, item in value.items()) or "-"
    if isinstance(value, list) and len(value) > 8:
        return f"({len(value)} items)"
    return json.dumps(value) if isinstance(value, (list, bool)) or value is None else str(value)


def _tensor(place: Place, name: str, manifest: Manifest) -> list[str]:
    saved = manifest.tensors[name]
    stats = Statistics()
    first: list[float] = []
    for (offset, _), stored in numbers(place, saved):
        values = as_float64(stored, saved.dtype).reshape(-1)
        stats.add(values)
        if not any(offset):
            first = [float(v) for v in values[: min(FIRST, saved.shape[-1] if saved.shape else 1)]]
    lines = [f"{place}: {name}", f"  {saved.dtype} {list(saved.shape)}, {math.prod(saved.shape):,} numbers, {size(saved.bytes)}",
             f"  {stats}", f"  begins with {', '.join(f'{v:.6g}' for v in first)}", ""]  # fmt: skip
    rows = ([chunk.file, chunk.at, list(chunk.offset), list(chunk.shape), math.prod(chunk.shape) * itemsize(saved.dtype)]
            for chunk in saved.chunks[:CHUNKS])  # fmt: skip
    lines += table(["file", "at byte", "offset", "shape", "bytes"], rows, right=(1, 4))
    return lines + ([f"... and {len(saved.chunks) - CHUNKS} chunks more"] if len(saved.chunks) > CHUNKS else [])


class Statistics:
    """Smallest, largest, mean and standard deviation of the finite numbers, piece by piece (Chan, Golub, LeVeque 1979: sums of
    squares of a large mean would cancel)."""

    def __init__(self) -> None:
        self.count, self.bad, self.mean, self.squares = 0, 0, 0.0, 0.0
        self.low, self.high = math.inf, -math.inf

    def add(self, values: np.ndarray) -> None:
        """Count in some float64 numbers."""
        finite = values[np.isfinite(values)]
        self.bad += values.size - finite.size
        if not finite.size:
            return
        mean, total = float(finite.mean()), self.count + finite.size
        apart = mean - self.mean
        self.squares += float(((finite - mean) ** 2).sum()) + apart**2 * self.count * finite.size / total
        self.mean += apart * finite.size / total
        self.count = total
        self.low, self.high = min(self.low, float(finite.min())), max(self.high, float(finite.max()))

    def __str__(self) -> str:
        if not self.count:
            return f"no finite number; {self.bad} are not finite"
        deviation = math.sqrt(self.squares / self.count)
        return (f"min {self.low:.6g}, max {self.high:.6g}, mean {self.mean:.6g}, standard deviation {deviation:.6g}, "
                f"{self.bad} not finite")  # fmt: skip


def verify(where: str, say: Say, progress: Say = lambda line: None) -> None:
    """Read every file of one checkpoint, or of all of a run, and say in one line that they are whole.

    Args:
        progress: told how far it is.

    Raises:
        RunFailed: some are not; every one of their files has been said.
    """
    with reached(where):
        _verify_all(where, say, progress)


def _verify_all(where: str, say: Say, progress: Say) -> None:
    places = checkpoints(open_place(where))
    steps, files, total, damaged = [], 0, 0, 0
    for place in places:
        problems, manifest = _verify(place, progress)
        for problem in problems:
            say(f"damaged: {problem}")
        damaged += bool(problems)
        if manifest is not None:
            steps.append(manifest.step)
            files, total = files + len(manifest.files) + 1, total + sum(f.bytes for f in manifest.files.values())
    if damaged:
        raise RunFailed(f"{damaged} of {counted(len(places), 'checkpoint')} in {where} damaged")
    say(f"whole: {counted(len(places), 'checkpoint')} (step {', '.join(map(str, steps))}), {files} files, {size(total)}, every "
        "one of the size and sha256 that its manifest says")  # fmt: skip


def _verify(place: Place, progress: Say) -> tuple[list[str], Manifest | None]:
    try:
        manifest = read_manifest(place)
    except CorruptCheckpoint as error:
        return [str(error)], None
    done, total = [0], sum(f.bytes for f in manifest.files.values())

    def told(n: int) -> None:
        done[0] += n  # two threads may lose a count between them: it is only shown
        progress(f"{place}: {size(done[0])} of {size(total)}")

    return list(find_problems(place, manifest, told).values()), manifest
