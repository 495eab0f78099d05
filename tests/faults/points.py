"""Named points at which a run can die, and a way to die there: the n-th time a rank comes to one, between two instructions.

A point is a function of the program: the process ends before it, after it, or, where it writes bytes, with half of them written.
Nothing in the program knows of this. `count` lets a run count how often each rank comes to each point.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_scratch.util.env import Rank

P = "megatron_scratch."


@dataclass(frozen=True)
class Point:
    where: str  # module:attribute path
    how: str = "before"  # | after | half


POINTS = {
    "claim": Point(P + "checkpoint.attempt:Attempt.claim", "after"),
    "claim.sweep": Point(P + "checkpoint.attempt:shutil.rmtree"),
    "load.manifest": Point(P + "train.resume:read"),
    "load.file": Point(P + "checkpoint.reading:_File.read"),
    "load.done": Point(P + "train.rundir:RunDir.rewind", "after"),
    "config": Point(P + "config.compose:save"),
    "data": Point(P + "data.loader:Loader.batch"),
    "forward": Point(P + "engine.ddp:DDPEngine.forward"),
    "backward": Point(P + "engine.ddp:DDPEngine.backward"),
    "backward.done": Point(P + "engine.ddp:DDPEngine.backward", "after"),
    "message": Point(P + "train.step:all_reduce_world"),
    "update": Point(P + "engine.ddp:DDPEngine.update"),
    "update.done": Point(P + "engine.ddp:DDPEngine.update", "after"),
    "evaluate": Point(P + "train.hooks:Evaluate.run"),
    "metrics": Point(P + "train.rundir:RunDir.log", "after"),
    "ledger": Point(P + "train.rundir:RunDir.record"),
    "save": Point(P + "checkpoint.saver:Saver.start"),
    "save.plan": Point(P + "checkpoint.plan:Planner.plan", "after"),
    "save.stage": Point(P + "checkpoint.attempt:Attempt.stage", "after"),
    "save.file": Point(P + "checkpoint.store:write_file"),
    "save.file.half": Point(P + "checkpoint.shard:write_all", "half"),
    "save.file.fsync": Point(P + "checkpoint.shard:os.fsync"),
    "save.file.done": Point(P + "checkpoint.store:write_file", "after"),
    "save.commit": Point(P + "checkpoint.store:commit"),
    "save.manifest": Point(P + "checkpoint.manifest:write"),
    "save.manifest.done": Point(P + "checkpoint.manifest:write", "after"),
    "save.rename": Point(P + "checkpoint.attempt:os.rename"),
    "save.renamed": Point(P + "checkpoint.attempt:os.rename", "after"),
    "save.verify": Point(P + "checkpoint.saver:Saver._share"),
    "retire": Point(P + "checkpoint.attempt:retire"),
    "retire.rename": Point(P + "checkpoint.attempt:Path.rename", "after"),
    "save.done": Point(P + "checkpoint.saver:Saver.start", "after"),
    "copy": Point(P + "checkpoint.saver:Saver._copy"),
    "copy.done": Point(P + "checkpoint.background:Background.submit", "after"),
    "poll": Point(P + "checkpoint.saver:Saver.poll"),
    "poll.answer": Point(P + "checkpoint.background:Background.answer", "after"),
}


def owner_of(where: str) -> tuple[Any, str]:
    module, _, path = where.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, name


def wrap(where: str, around: Callable[..., Any]) -> None:
    """Replace a function by `around(original, *arguments)`, in this process."""
    owner, name = owner_of(where)
    static = isinstance(owner, type) and isinstance(owner.__dict__.get(name), staticmethod)
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    setattr(owner, name, staticmethod(wrapped) if static else wrapped)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill(name: str, nth: int) -> None:
    """Arm this process to end at the n-th time that it comes to a point."""
    point, came = POINTS[name], Counter[str]()

    def around(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        came[name] += 1
        if came[name] != nth:
            return original(*args, **kwargs)
        if point.how == "after":
            original(*args, **kwargs)
        elif point.how == "half":
            fd, content = args
            os.write(fd, content[: len(content) // 2])
        die()

    wrap(point.where, around)


def count(rank: Rank, folder: Path) -> None:
    """Count how often this rank comes to each point, into a file a rank."""
    came = Counter[str]()
    for name, point in POINTS.items():

        def around(original: Callable[..., Any], *args: Any, name: str = name, **kwargs: Any) -> Any:
            came[name] += 1
            (folder / f"{rank.rank}.json").write_text(json.dumps(came))
            return original(*args, **kwargs)

        wrap(point.where, around)
