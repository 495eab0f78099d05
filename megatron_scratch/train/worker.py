"""One rank of a training run, from resolved config to exit code."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from megatron_scratch import registry
from megatron_scratch.checkpoint.attempt import Attempt
from megatron_scratch.config import Config, compose
from megatron_scratch.parallel import Topology
from megatron_scratch.parallel.collectives import gather_json
from megatron_scratch.train import build
from megatron_scratch.train.console import Console, Logged, Silent
from megatron_scratch.train.fault import StopFlag
from megatron_scratch.train.features import Place
from megatron_scratch.train.heartbeat import Pulse
from megatron_scratch.train.mirror import Mirror
from megatron_scratch.train.phases import Phases
from megatron_scratch.train.reporter import Reporter
from megatron_scratch.train.rundir import RunDir
from megatron_scratch.train.session import report, run_session
from megatron_scratch.train.watch import Watch
from megatron_scratch.util.env import Rank, node_name, read_rank
from megatron_scratch.util.errors import RunFailed
from megatron_scratch.util.exits import FAILED, OK, STOPPED, exit_code, outcome
from megatron_scratch.util.starts import BUG, End, Start


def run(cfg: Config, rank: Rank, store_file: Path | None = None, start: Path | None = None) -> dict[str, Any]:
    """Train as one rank. Returns what the run came to: steps, losses, paths.

    Args:
        store_file: where the ranks of one machine meet; None: at the address that torchrun or Slurm gives.
        start: the folder of a Slurm job's start; a file `stop` in it asks to save and end.

    Raises:
        UserError: the run cannot start as asked. RunFailed: it cannot go on. StopRequested: it was told to stop, and saved.
    """
    os.umask(0o027)  # weights and configs are not for every user of a cluster
    registry.load_plugins(cfg.plugins)
    run_dir = RunDir(cfg.dir)
    with ExitStack() as stack:
        files = [run_dir.stop, *([start / "stop"] if start else [])] if rank.rank == 0 else []
        stop = stack.enter_context(StopFlag(files, run_dir.save if rank.rank == 0 else None).listening())
        number = 0
        if rank.rank == 0:
            run_dir.create()
            run_dir.check_stop()
            stack.enter_context(run_dir.locked(Start(start).job if start else ""))
            number = Attempt.claim(run_dir.checkpoints).number
        topo = stack.enter_context(build.process_group(cfg, rank, store_file))
        attempt = Attempt(run_dir.checkpoints, gather_json(number, topo)[0])  # and the main rank has made the folders
        run_dir.fence = attempt.check
        view = Logged(Console(cfg.checkpoint.every) if topo.is_main else Silent(), run_dir.log_file(rank.rank))
        stack.callback(view.close)
        mirror = Mirror(cfg.checkpoint, attempt, topo, run_dir, view)
        stack.callback(mirror.close)
        phases = Phases(topo.device)
        watch = _watch(cfg, topo, run_dir, attempt, start, phases)
        stack.enter_context(watch.running())
        reporter = stack.enter_context(Reporter(cfg, topo, run_dir, view))
        try:
            return run_session(Place(cfg, topo, run_dir, attempt, view, stop, mirror, watch, phases, reporter))
        except Exception as error:
            watch.settle()
            view.failed()
            if topo.is_main and isinstance(error, RunFailed):
                with suppress(RunFailed):  # a later start has taken over, and this one writes nothing more
                    run_dir.record("failed", reason=str(error))
            raise


def _watch(cfg: Config, topo: Topology, run_dir: RunDir, attempt: Attempt, start: Path | None, phases: Phases) -> Watch:
    def told(message: str) -> None:
        if start is not None:
            Start(start).end(End(topo.rank, node_name(), FAILED, message))

    return Watch(cfg.fault.hang_timeout, run_dir, attempt.number, topo, Pulse(cfg.train.compile, phases.entered), told)


def main() -> int:
    """What launchers start: `python -m megatron_scratch.train.worker CONFIG [--store FILE] [--start-folder FOLDER]`."""
    from megatron_scratch.util.machine import die_with_parent

    die_with_parent()
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--start-folder", type=Path)
    args = parser.parse_args()
    rank = read_rank()

    def work() -> None:
        summary = run(compose.load_file(args.config), rank, args.store, args.start_folder)
        if rank.rank == 0:
            report(summary)

    return exit_code(work) if args.start_folder is None else _supervised(work, Start(args.start_folder), rank)


def _supervised(work: Callable[[], None], start: Start, rank: Rank) -> int:
    """Write down how this rank ends. A stop is no failure here: torchrun would start the ranks again, Slurm end the other nodes."""
    code, message = FAILED, BUG
    try:
        code, message = outcome(work)
    finally:
        start.end(End(rank.rank, node_name(), code, message))
    return OK if code == STOPPED else code


if __name__ == "__main__":
    from megatron_scratch.util.exits import leave_with

    leave_with(main)
