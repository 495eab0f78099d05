"""`train -m` from its words to what it came to."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from signal import Signals

from megatron_scratch import registry
from megatron_scratch.config.launcher import ClusterConfig
from megatron_scratch.launch.sweep import record
from megatron_scratch.launch.sweep.here import Here, Stop
from megatron_scratch.launch.sweep.points import Ready, legal, name_of
from megatron_scratch.launch.sweep.record import Point, Sweep
from megatron_scratch.launch.sweep.submit import submit, wait
from megatron_scratch.launch.sweep.table import lines, report
from megatron_scratch.launch.sweep.words import Words, grid, read
from megatron_scratch.util.errors import RunFailed, StopRequested, UserError


def sweep(words: list[str], folders: list[str], show: bool = False) -> None:
    """Run a sweep; jobs of a cluster are submitted and not waited for, unless what they come to chooses the next ones.

    Args:
        words: overrides as Hydra's grammar has them, and `sweep.metric`.
        folders: `--config-dir`.
        show: only tell the points.

    Raises:
        UserError: nothing was started. RunFailed: a point failed; the others ran. StopRequested: told to stop, and did.
    """
    asked = read(words, folders)
    if asked.sweeper == "basic":
        _grid(asked, folders, show)
    elif show:
        raise UserError("--print cannot tell the points of hydra/sweeper=optuna, which chooses as it goes; leave --print out")
    else:
        _study(asked, folders)


def _grid(asked: Words, folders: list[str], show: bool) -> None:
    """All combinations, checked before the first is started."""
    points = grid(asked.swept)
    name = name_of(asked.fixed, points, folders)
    while True:
        found = Sweep(record.free(name, asked.folder), name, asked.fixed)
        found.points = [Point(number, overrides) for number, overrides in enumerate(points)]
        ready = legal(found, found.points, asked, folders)
        only_shown = show or any(isinstance(cfg.launcher, ClusterConfig) and cfg.launcher.print_only for _, cfg, _ in ready)
        if only_shown or not ready or record.take(found.path):
            break
    _say_dropped(found.points)
    if not ready:
        raise _all_illegal(found)
    if only_shown:
        _show(ready, scripts=not show)
        return
    with _kept_if_begun(found), Stop().listening() as stop:
        found.save()
        _run(found, ready, asked, stop)
        _end(found, stop)


def _study(asked: Words, folders: list[str]) -> None:
    """Points as optuna asks for them; the best one is said last. A point that fails is a failed trial, not a failed sweep."""
    from megatron_scratch.launch.sweep.study import Study

    name = name_of(asked.fixed, [[]], folders)
    while not record.take(path := record.free(name, asked.folder)):
        pass
    found = Sweep(path, name, asked.fixed, asked.metric)
    with _kept_if_begun(found), Stop().listening() as stop:

        def train(batch: list[Point]) -> None:
            ready = legal(found, batch, asked, folders)
            found.save()
            _say_dropped(batch)
            _run(found, ready, asked, stop)
            if stop.times:
                raise StopRequested(f"{Signals(stop.number).name}, after {len(found.points)} points of the study")
            wait(found, batch, stop)

        try:
            best = Study(found, asked, train).run()
        finally:
            if found.begun:
                print("\n".join(lines(path, report(path))), flush=True)
        print(best, flush=True)


def _run(found: Sweep, ready: Ready, asked: Words, stop: Stop) -> None:
    if ready and isinstance(ready[0][1].launcher, ClusterConfig):
        submit(found, ready, stop)
        _say_dropped([point for point, _, _ in ready])
    else:
        Here(found, asked.at_once, stop).run([(point, cfg) for point, cfg, _ in ready])


def _end(found: Sweep, stop: Stop) -> None:
    """What a grid came to, and the exit code."""
    for point in found.points:
        if point.state == "planned":
            found.mark(point, "not started", "the sweep was stopped before its turn")
    count = Counter(point.state for point in found.points)
    if not found.begun and not stop.times:
        raise _all_illegal(found)
    if count["submitted"]:
        print(f"{count['submitted']} of {len(found.points)} points submitted; see megatron-scratch report --sweep {found.path}")
    else:
        print("\n".join(lines(found.path, report(found.path))), flush=True)
    if stop.times:
        raise StopRequested(f"{Signals(stop.number).name}, {count['not started']} points were not started")
    if count["failed"]:
        first = next(point for point in found.points if point.state == "failed")
        raise RunFailed(f"{count['failed']} of {len(found.points)} points failed, point {first.number}: {first.reason}")


@contextmanager
def _kept_if_begun(found: Sweep) -> Iterator[None]:
    """A folder in which nothing was started goes again, with the error."""
    try:
        yield
    except UserError:
        if not found.begun:
            shutil.rmtree(found.path, ignore_errors=True)
        raise


def _show(ready: Ready, scripts: bool) -> None:
    for point, cfg, world in ready:
        print(f"# point {point.number}: {' '.join(point.overrides)} as {cfg.name}, {world} processes, in {cfg.dir}", flush=True)
        if scripts:
            registry.get("launcher", cfg.launcher.name)(cfg, world)


def _say_dropped(points: list[Point]) -> None:
    for point in points:
        if point.state == "dropped":
            print(f"point {point.number} dropped: {' '.join(point.overrides)}: {point.reason}", file=sys.stderr, flush=True)


def _all_illegal(found: Sweep) -> UserError:
    return UserError(f"all {len(found.points)} points are illegal, the first: {found.points[0].reason}")
