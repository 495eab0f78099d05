"""Points of a sweep on this machine, each a process of its own, some at a time; and that process.

`python -m megatron_scratch.launch.sweep.here CONFIG LAST`: train by a resolved config, write the last words into the file LAST.

`hydra/launcher=joblib hydra.launcher.n_jobs=N` is understood without joblib: its workers would only wait for these processes, they
would load a pickled function to do so, and the kernel, which ends a process when the thread that started it is gone, takes no
worker's end for the sweep's.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from megatron_scratch import registry
from megatron_scratch.config import Config, compose
from megatron_scratch.launch.resolve import world_size
from megatron_scratch.launch.sweep.record import Point, Sweep
from megatron_scratch.util.env import everything
from megatron_scratch.util.errors import UserError
from megatron_scratch.util.exits import OK, STOPPED, outcome
from megatron_scratch.util.machine import die_with_parent, local_gpus
from megatron_scratch.util.signals import handled

POLL = 0.1
INTERRUPTED = (130, -signal.SIGINT, -signal.SIGTERM, -signal.SIGUSR1)  # told to stop before there was anything to save


class Stop:
    """How often this process was told to stop; each time is passed on once to every point that runs."""

    def __init__(self) -> None:
        self.times, self.number = 0, 0

    def _on(self, number: int, frame: FrameType | None) -> None:
        self.times, self.number = self.times + 1, number

    @contextmanager
    def listening(self) -> Iterator[Stop]:
        with handled(self._on):
            yield self


@dataclass
class Running:
    """A point that trains. `slot`: which part of the machine's GPUs it has."""

    point: Point
    process: subprocess.Popen[bytes]
    last: Path
    slot: int
    told: int = 0


class Here:
    """Runs points, `at_once` of them at a time. One that fails stops no other."""

    def __init__(self, sweep: Sweep, at_once: int, stop: Stop) -> None:
        self.sweep, self.at_once, self.stop = sweep, at_once, stop

    def run(self, ready: list[tuple[Point, Config]]) -> None:
        """Run all of them, in order, unless told to stop."""
        waiting, running = list(reversed(ready)), list[Running]()
        with tempfile.TemporaryDirectory(prefix="megatron_scratch_") as tmp:
            while running or (waiting and not self.stop.times):
                while waiting and len(running) < self.at_once and not self.stop.times:
                    slot = min(set(range(self.at_once)) - {child.slot for child in running})
                    running += self._try(*waiting.pop(), Path(tmp), slot)
                for child in running:
                    self._pass_on(child)
                for child in [child for child in running if child.process.poll() is not None]:
                    running.remove(child)
                    self._ended(child)
                time.sleep(POLL if running else 0)

    def _try(self, point: Point, cfg: Config, tmp: Path, slot: int) -> list[Running]:
        try:
            return [self._start(point, cfg, tmp, slot)]
        except UserError as error:  # its folder cannot be written
            self.sweep.mark(point, "failed", error)
            return []

    def _start(self, point: Point, cfg: Config, tmp: Path, slot: int) -> Running:
        from megatron_scratch.train.rundir import RunDir

        home = self.sweep.home(point)
        RunDir(home).create()
        compose.save(cfg, tmp / f"{point.number}.yaml")
        last = tmp / f"{point.number}.txt"
        self.sweep.mark(point, "started")
        print(f"point {point.number}: {' '.join(point.overrides)} in {home}", flush=True)
        words = command(tmp / f"{point.number}.yaml", last)
        # A session of its own: Ctrl-C reaches this process alone, which passes it on once.
        if self.at_once == 1:
            return Running(point, subprocess.Popen(words, start_new_session=True), last, slot)
        with open(home / "logs" / "console.log", "ab") as log:  # side by side they would write over each other
            process = subprocess.Popen(words, env={**everything(), **gpus_of(slot, self.at_once)}, stdout=log,
                                       stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
        return Running(point, process, last, slot)

    def _pass_on(self, child: Running) -> None:
        while child.told < self.stop.times:
            child.told += 1
            child.process.send_signal(self.stop.number)

    def _ended(self, child: Running) -> None:
        code = child.process.returncode
        gone = (STOPPED, *(INTERRUPTED if child.told else ()))
        state = "finished" if code == OK else "stopped" if code in gone else "failed"
        reason = "" if state == "finished" else last_words(child.last, self.sweep.home(child.point), code)
        self.sweep.mark(child.point, state, reason)
        print(f"point {child.point.number} {state}{': ' if reason else ''}{reason}", flush=True)


def command(config: Path, last: Path) -> list[str]:
    """What trains a point."""
    return [sys.executable, "-m", "megatron_scratch.launch.sweep.here", str(config), str(last)]


def last_words(file: Path, home: Path, code: int) -> str:
    """Why a point did not finish: what its process said, what the run's ledger says, or only the exit code."""
    from megatron_scratch.launch.sweep.table import ended

    if file.exists() and (said := file.read_text(encoding="utf-8").strip()):
        return said
    event = ended(home)
    if event.get("event") in ("failed", "stop") and event.get("reason"):
        return str(event["reason"])
    return f"ended with {code}; see {home / 'logs'}"


def check_gpus(world: int, at_once: int) -> None:
    """UserError: points side by side would share GPUs."""
    gpus = len(visible_gpus()) if at_once > 1 else 0
    if gpus and world * at_once > gpus:
        raise UserError(f"{world} processes are more than the {gpus // at_once} of {gpus} GPUs that hydra.launcher.n_jobs="
                        f"{at_once} leaves a point; give launcher.processes=N, or fewer n_jobs")  # fmt: skip


def visible_gpus() -> list[str]:
    """The GPUs that a run started here would see, as CUDA_VISIBLE_DEVICES names them."""
    given = everything().get("CUDA_VISIBLE_DEVICES")
    return [str(n) for n in range(local_gpus())] if given is None else [gpu for gpu in given.split(",") if gpu]


def gpus_of(slot: int, slots: int) -> dict[str, str]:
    """The part of the GPUs that one of several points at a time gets; empty where there are none."""
    gpus = visible_gpus()
    each = len(gpus) // slots
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[slot * each : (slot + 1) * each])} if gpus else {}


def main() -> int:
    die_with_parent()
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("last", type=Path)
    args = parser.parse_args()

    def work() -> int:
        cfg = compose.load_file(args.config)
        return registry.get("launcher", cfg.launcher.name)(cfg, world_size(cfg))

    code, message = outcome(work)
    args.last.write_text(message, encoding="utf-8")
    return code


if __name__ == "__main__":
    from megatron_scratch.util.exits import leave_with

    leave_with(main)
