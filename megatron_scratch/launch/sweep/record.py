"""The folder of a sweep, and sweep.json in it: what was asked, each point, and how far the sweep itself has come with it.

It is written before anything is done to a point, so whatever kills the sweep, the file is not behind.
"""

from __future__ import annotations

import json
import os
import re
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

from megatron_scratch.config.launcher import fits
from megatron_scratch.util.errors import UserError
from megatron_scratch.util.files import write_json

FILE = "sweep.json"
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,55}"  # a point's number is added, and 64 are what a job's name may have


@dataclass
class Point:
    """One run of a sweep."""

    number: int
    overrides: list[str]  # what makes it differ from the others
    state: str = (
        "planned"  # as the sweep saw it last: started, submitting, submitted, finished, stopped, failed, dropped, not started
    )
    reason: str = ""

    def drop(self, error: object) -> None:
        self.state, self.reason = "dropped", str(error)

    def fail(self, error: object) -> None:
        self.state, self.reason = "failed", str(error)


class Sweep:
    """What a sweep writes down. `fixed`: the words that all points share."""

    def __init__(self, path: Path, name: str, fixed: list[str], metric: str | None = None) -> None:
        self.path, self.name, self.fixed, self.metric = path, name, fixed, metric
        self.points: list[Point] = []

    @property
    def begun(self) -> bool:
        """Has anything been started, or submitted?"""
        return any(point.state not in ("planned", "dropped", "not started") for point in self.points)

    def home(self, point: Point) -> Path:
        """The run directory of a point."""
        return self.path / str(point.number)

    def name_of(self, point: Point) -> str:
        return f"{self.name}_{point.number}"

    def save(self) -> None:
        points = [{**asdict(p), "dir": str(p.number), "name": self.name_of(p)} for p in self.points]
        facts = {
            "name": self.name,
            "fixed": self.fixed,
            "metric": self.metric,
            "process": os.getpid(),
            "host": socket.gethostname(),
        }
        write_json(self.path / FILE, {**facts, "points": points})

    def mark(self, point: Point, state: str, reason: object = "") -> None:
        """A point has come to a state; written before the caller goes on."""
        point.state, point.reason = state, str(reason)
        self.save()


def check_name(name: str) -> None:
    """A sweep's name is part of paths and of jobs' names."""
    fits("name", name, NAME, "llama-lr")


def free(name: str, folder: str | None) -> Path:
    """Where a sweep may lie: in the folder given, or the first of runs/sweeps/NAME, NAME_2, ... that nobody has."""
    if folder is None:
        names = (name if number == 1 else f"{name}_{number}" for number in count(1))
        return next(path for path in (Path("runs/sweeps") / name for name in names) if not path.exists())
    if Path(folder).exists():
        raise UserError(f"hydra.sweep.dir={folder} is there already; a sweep wants a new folder, give another one")
    return Path(folder)


def take(path: Path) -> bool:
    """Make the folder; False where another sweep has just done so."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir()
    except OSError as error:
        if path.exists():
            return False
        raise UserError(f"hydra.sweep.dir={path} cannot be made: {error.strerror}; give another one") from error
    return True


def read(path: Path) -> dict[str, Any]:
    """What `Sweep.save` wrote. UserError: there is no sweep."""
    try:
        found = json.loads((path / FILE).read_text(encoding="utf-8"))
        if isinstance(found, dict) and all(isinstance(p, dict) and "number" in p for p in found["points"]):
            return found
    except OSError as error:
        raise UserError(f"{path / FILE} cannot be read: {error.strerror}; give the folder of a sweep") from error
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{path / FILE} is not what a sweep writes; give the folder of a sweep")


def alive(host: object, process: object) -> bool:
    """Is a process of this machine there? False for other machines', of which this one knows nothing."""
    if host != socket.gethostname() or not re.fullmatch(r"\d{1,9}", str(process)):
        return False
    with suppress(PermissionError):  # it is there, and somebody else's
        try:
            os.kill(int(str(process)), 0)
        except ProcessLookupError:
            return False
    return True
