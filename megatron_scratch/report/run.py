"""A run directory as plain data: what any version has written, also while it is being written, also where lines are broken."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from megatron_scratch.util.errors import UserError

FILES = ("metrics.jsonl", "ledger.jsonl", "config.yaml")  # a folder with none of them is no run
LARGEST = 1e100  # of a number: sums and squares of what is larger are infinite
CONFIG_BYTES = 1 << 20


@dataclass
class Run:
    """One run. `rows`: a logged training step each, `evals`: an evaluation each; numbers are finite, steps ascend."""

    path: Path
    name: str
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    evals: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)  # `time` in unix seconds, or None
    layers: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what could not be read

    def newest(self, *events: str) -> dict[str, Any]:
        """The newest event of one of these names; empty where there is none."""
        return next((e for e in reversed(self.events) if e["event"] in events), {})


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Runs with names that tell them apart.

    Raises:
        UserError: a path is no run, or one is given twice.
    """
    places = [path.resolve() for path in paths]
    for path, place in zip(paths, places, strict=True):
        if places.count(place) > 1:
            raise UserError(f"{path} is given twice; give each run once")
    return [read_run(path, name) for path, name in zip(paths, _names(places), strict=True)]


def _names(places: Sequence[Path]) -> list[str]:
    """The last part of each path, and as many before it as it takes for all to differ."""
    for length in range(1, max(len(p.parts) for p in places) + 1):
        names = ["/".join(p.parts[-length:]) for p in places]
        if len(set(names)) == len(names):
            break
    return names


def read_run(path: Path, name: str = "", whole: bool = True) -> Run:
    """
    Args:
        whole: with layers and samples, which may be much.

    Raises:
        UserError: there is no run.
    """
    try:
        _check(path)
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    run = Run(path, name or path.resolve().name)
    run.config = _config(run)
    rows = [_numbers(row) for row in _lines(run, "metrics.jsonl")]
    run.rows = _by_step(row for row in rows if not _evaluation(row))
    run.evals = _by_step(row for row in rows if _evaluation(row))
    run.events = [event for row in _lines(run, "ledger.jsonl") if (event := _event(row))]
    if not whole:
        return run
    run.layers = _by_step(row for row in map(_layers, _lines(run, "layers.jsonl")) if row)
    run.samples = [row for row in map(_sample, _lines(run, "samples.jsonl")) if row]
    return run


def _check(path: Path) -> None:
    if not path.is_dir():
        raise UserError(f"{path} is {'a file' if path.exists() else 'not there'}; give the folder of a run, runs/NAME")
    if not any((path / file).is_file() for file in FILES):
        hint = f"; a sweep is shown by: megatron-scratch report --sweep {path}" if (path / "sweep.json").is_file() else ""
        raise UserError(f"{path} is no run: it has none of {', '.join(FILES)}{hint or '; give the folder of a run, runs/NAME'}")


def number(value: Any) -> float | None:
    """A finite number, or None: json.dumps writes NaN, which is none."""
    if type(value) is float and -LARGEST < value < LARGEST:  # nearly always
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return value if math.isfinite(value) and abs(value) < LARGEST else None
    except OverflowError:  # an int beyond all floats
        return None


def step_of(row: dict[str, Any], key: str = "step") -> int | None:
    value = number(row.get(key))
    return int(value) if value is not None and 0 <= value < 1 << 53 else None


def _lines(run: Run, name: str) -> Iterator[dict[str, Any]]:
    """Objects of a file of JSON lines. A last line without its end is one that is being written, or that a killed process left."""
    path, bad = run.path / name, 0
    try:
        if path.is_file():
            with open(path, "rb") as f:
                for line in f:
                    row = _object(line)
                    bad += row is None and line.endswith(b"\n") and bool(line.strip())
                    if row is not None:
                        yield row
        elif path.exists():
            run.notes.append(f"{name} is no file")
    except OSError as error:
        run.notes.append(f"{name} cannot be read: {error.strerror}")
    if bad:
        run.notes.append(f"{name}: {bad} {'line is' if bad == 1 else 'lines are'} broken and left out")


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _numbers(row: dict[str, Any]) -> dict[str, Any]:
    """What is a number of a row, and why a step was skipped."""
    kept: dict[str, Any] = {key: value for key, given in row.items() if (value := number(given)) is not None}
    if "skipped" in row:
        kept["skipped"] = str(row["skipped"])
    if any(key.partition("/")[0] == "val_loss" for key in row):
        kept.setdefault("val_loss", None)  # an evaluation that came to no number is one all the same
    return kept


def _evaluation(row: dict[str, Any]) -> bool:
    return "val_loss" in row


def _by_step(rows: Any) -> list[dict[str, Any]]:
    """Of rows of one step the last: the others were computed before a resume."""
    found = {}
    for row in rows:
        if (step := step_of(row)) is not None:
            row["step"] = step
            found[step] = row
    return [found[step] for step in sorted(found)]


def _event(row: dict[str, Any]) -> dict[str, Any] | None:
    if not isinstance(row.get("event"), str):
        return None
    event = row | {"time": _unix(row.get("time"))}
    for key in ("step", "to"):
        if key in event:
            event[key] = step_of(event, key)
    return event


def _unix(value: Any) -> float | None:
    """Of a ledger's time, or of unix seconds."""
    if not isinstance(value, str):
        return number(value)
    try:
        return datetime.strptime(value, "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except (ValueError, OverflowError):
        return None


def _layers(row: dict[str, Any]) -> dict[str, Any] | None:
    layers = row.get("layers")
    if not isinstance(layers, dict):
        return None
    read = {str(name): {key: n for key, v in told.items() if (n := number(v)) is not None}
            for name, told in layers.items() if isinstance(told, dict)}  # fmt: skip
    return {"step": row.get("step"), "layers": read}


def _sample(row: dict[str, Any]) -> dict[str, Any] | None:
    step = step_of(row)
    if step is None or not isinstance(row.get("text"), str):
        return None
    return {
        "step": step,
        "time": number(row.get("time")),
        "tokens": number(row.get("tokens")),
        "prompt": str(row.get("prompt", "")),
        "text": row["text"],
    }


def _config(run: Run) -> dict[str, Any]:
    """As it lies there: a run of another version has keys that this one does not know."""
    path = run.path / "config.yaml"
    try:
        if not path.is_file():
            return {}
        with open(path, "rb") as f:
            tree = yaml.safe_load(f.read(CONFIG_BYTES).decode("utf-8", "replace"))
    except (OSError, yaml.YAMLError, ValueError, RecursionError):
        tree = None
    if not isinstance(tree, dict):
        run.notes.append("config.yaml cannot be read")
        return {}
    return tree


def when(unix: float | None) -> str:
    """A point of time for people, UTC."""
    try:
        return "" if unix is None else time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(unix))
    except (ValueError, OverflowError, OSError):
        return ""
