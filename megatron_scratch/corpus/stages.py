"""A stage is a list of tasks, a task a pure function over files. Whoever runs them, in whatever order, gives the same bytes.

A task writes `FOLDER/NNNNN.suffix` through `Outputs`: each file appears whole. When all are there its marker `NNNNN.done` does:
what the task depended on (`key`, `args`), what it returned, and size and sha256 of every file. A marker with another key, or
whose files are gone or cut, does not count: the task runs again. So a kill at any instant costs the tasks that were running.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_scratch import registry
from megatron_scratch.corpus.clock import measured
from megatron_scratch.util.files import atomic_write, write_json

STAGE = "stage.json"


@dataclass(frozen=True)
class Stage:
    """name: of its folder; function: "module:function" under `megatron_scratch.corpus`, called with `Outputs`, `common` and its
    task. tasks: the arguments of each, as JSON; common: those that all share; key: a hash of all that decides the bytes besides a
    task's own arguments; plugins: modules to import first."""

    name: str
    function: str
    tasks: list[dict[str, Any]]
    common: dict[str, Any]
    key: str
    plugins: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Done:
    """A finished stage: its folder, what each task returned, and a hash of all that was written."""

    folder: Path
    results: list[dict[str, Any]]
    digest: str

    def path(self, index: int, suffix: str) -> str:
        return str(self.folder / f"{index:05d}.{suffix}")

    @property
    def stems(self) -> list[str]:
        """What the paths of each task's files begin with."""
        return [str(self.folder / f"{i:05d}") for i in range(len(self.results))]

    def paths(self, suffix: str) -> list[str]:
        return [self.path(i, suffix) for i in range(len(self.results))]

    def total(self, name: str) -> int:
        return sum(result[name] for result in self.results)


class Outputs:
    """Where one task writes. `files` tells size and sha256 of what is there."""

    def __init__(self, folder: Path, index: int):
        self.folder, self.index = folder, index
        self.files: dict[str, tuple[int, str]] = {}

    def path(self, suffix: str) -> Path:
        return self.folder / f"{self.index:05d}.{suffix}"

    @contextmanager
    def open(self, suffix: str) -> Iterator[_Hashed]:
        """A binary file to write to; it gets its name when the block ends without an exception."""
        path = self.path(suffix)
        with atomic_write(path) as f:
            hashed = _Hashed(f)
            yield hashed
            hashed.flush()
        self.files[path.name] = (hashed.size, hashed.digest.hexdigest())

    def save(self, suffix: str, array: np.ndarray) -> None:
        """An array as .npy; `np.load(path, mmap_mode="r")` reads it."""
        with self.open(suffix) as f:
            np.lib.format.write_array_header_1_0(f, np.lib.format.header_data_from_array_1_0(np.ascontiguousarray(array)))
            f.write(memoryview(np.ascontiguousarray(array)).cast("B") if array.size else b"")


class _Hashed:
    """A file that hashes what goes through it, a MiB at a time: many writes are of one document."""

    def __init__(self, f: Any):
        self.f, self.size, self.digest = f, 0, hashlib.sha256()
        self.waiting: list[Any] = []
        self.held = 0

    def write(self, data: Any) -> None:
        """Bytes, or a view of bytes that do not change."""
        self.waiting.append(data)
        self.held += len(data)
        if self.held >= 1 << 20:
            self.flush()

    def flush(self) -> None:
        data = b"".join(self.waiting)
        self.f.write(data)
        self.digest.update(data)
        self.size, self.waiting, self.held = self.size + len(data), [], 0


class Engine(Protocol):
    """Runs tasks somewhere. `run` yields the index of each as it ends, and raises if one fails. `done` looks for its marker."""

    def run(self, folder: Path, pending: list[int], done: Callable[[int], bool]) -> Iterator[int]: ...


def hash_of(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def execute(work: Path, stage: Stage, engine: Engine, say: Callable[[str], Any]) -> Done:
    """Run what is unfinished of a stage; returns when all of it is there. Progress goes to `say`, a line per task."""
    folder = work / stage.name
    wanted = json.loads(json.dumps(asdict(stage)))
    if not (folder / STAGE).is_file() or json.loads((folder / STAGE).read_text("utf-8")) != wanted:
        if (folder / STAGE).is_file() and json.loads((folder / STAGE).read_text("utf-8"))["key"] != stage.key:
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / STAGE, wanted)
    pending = [i for i in range(len(stage.tasks)) if finished(folder, wanted, i) is None]
    for scrap in folder.glob(".*.tmp") if pending else ():  # of tasks that were killed
        scrap.unlink(missing_ok=True)
    left = len(pending)
    for index in engine.run(folder, pending, lambda i: finished(folder, wanted, i) is not None) if pending else ():
        left -= 1
        say(f"{stage.name}: {len(stage.tasks) - left} of {len(stage.tasks)} (task {index})")
    markers = [finished(folder, wanted, i) for i in range(len(stage.tasks))]
    missing = [i for i, marker in enumerate(markers) if marker is None]
    assert not missing, f"{folder}: tasks {missing} have no marker"
    results = [marker["result"] for marker in markers if marker is not None]
    return Done(folder, results, hash_of([marker and marker["files"] for marker in markers], results))


def finished(folder: Path, stage: dict[str, Any], index: int) -> dict[str, Any] | None:
    """The marker of a task, if it is of this stage's key and arguments and its files are whole."""
    try:
        marker = json.loads((folder / f"{index:05d}.done").read_text("utf-8"))
        same = marker["key"] == stage["key"] and marker["args"] == stage["tasks"][index]
        whole = all((folder / name).stat().st_size == size for name, (size, _) in marker["files"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return marker if same and whole else None


def run_task(folder: Path, index: int) -> None:
    """Run one task of the stage whose description lies in `folder`, unless it is finished: what every engine calls."""
    stage = json.loads((folder / STAGE).read_text("utf-8"))
    if finished(folder, stage, index) is not None:
        return
    registry.load_plugins(stage["plugins"])
    outputs = Outputs(folder, index)
    with measured() as spent:
        result = _function(stage["function"])(outputs, **stage["common"], **stage["tasks"][index])
    write_json(folder / f"{index:05d}.done",
               {"key": stage["key"], "args": stage["tasks"][index], "result": result, "files": outputs.files,
                "spent": spent})  # fmt: skip


def _function(name: str) -> Callable[..., dict[str, Any]]:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(f"megatron_scratch.corpus.{module}"), attribute)


def batches(sizes: Iterable[int], limit: int) -> list[tuple[int, int]]:
    """Ranges [first, end) of items whose sizes add up to at most `limit`, or that hold one item."""
    ranges, first, total = [], 0, 0
    i = -1
    for i, size in enumerate(sizes):
        if i > first and total + size > limit:
            ranges.append((first, i))
            first, total = i, 0
        total += size
    if i >= first:
        ranges.append((first, i + 1))
    return ranges
