"""One rank of a training run, from resolved config to exit code."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

from megatron_scratch import registry
from megatron_scratch.checkpoint.attempt import Attempt
from megatron_scratch.checkpoint.manifest import step_folder
from megatron_scratch.checkpoint.saver import Saver
from megatron_scratch.config import Config, compose
from megatron_scratch.config.fault import comparable
from megatron_scratch.data.loader import DataSource, open_data
from megatron_scratch.models.flops import flops_per_token
from megatron_scratch.parallel import Topology
from megatron_scratch.parallel.collectives import gather_json
from megatron_scratch.train import build
from megatron_scratch.train.batches import BatchPlan
from megatron_scratch.train.evaluate import Evaluation, Stop, evaluate
from megatron_scratch.train.fault import StopFlag
from megatron_scratch.train.guarantee import WRITTEN_BY
from megatron_scratch.train.guard import Guard
from megatron_scratch.train.heartbeat import Pulse
from megatron_scratch.train.hooks import During, Evaluate, LogMetrics, Rates, RecordVerdicts
from megatron_scratch.train.loop import Hook, train
from megatron_scratch.train.metrics import Logged, Silent, View, peak_flops
from megatron_scratch.train.mirror import Mirror
from megatron_scratch.train.objective import LanguageModel
from megatron_scratch.train.own_time import OwnTime
from megatron_scratch.train.passes import Passes
from megatron_scratch.train.plot import plot_loss
from megatron_scratch.train.replicas import CheckReplicas
from megatron_scratch.train.resume import go_back, resume
from megatron_scratch.train.rollback import Rollback
from megatron_scratch.train.rundir import RunDir
from megatron_scratch.train.saving import SaveCheckpoint
from megatron_scratch.train.scaler import loss_scaler
from megatron_scratch.train.step import StepResult, TrainStep
from megatron_scratch.train.straggler import NameStragglers
from megatron_scratch.train.watch import Watch
from megatron_scratch.util.env import Rank, node_name, read_rank
from megatron_scratch.util.errors import RunFailed, StopRequested
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
        view = Logged(registry.build("logging", cfg.logging) if topo.is_main else Silent(), run_dir.log_file(rank.rank))
        stack.callback(view.close)
        mirror = Mirror(cfg.checkpoint, attempt, topo, run_dir, view)
        stack.callback(mirror.close)
        watch = _watch(cfg, topo, run_dir, attempt, start)
        stack.enter_context(watch.running())
        try:
            return _train(cfg, topo, run_dir, attempt, view, stop, mirror, watch)
        except Exception as error:
            watch.settle()
            view.failed()
            if topo.is_main and isinstance(error, RunFailed):
                with suppress(RunFailed):  # a later start has taken over, and this one writes nothing more
                    run_dir.record("failed", reason=str(error))
            raise


def _watch(cfg: Config, topo: Topology, run_dir: RunDir, attempt: Attempt, start: Path | None) -> Watch:
    def told(message: str) -> None:
        if start is not None:
            Start(start).end(End(topo.rank, node_name(), FAILED, message))

    return Watch(cfg.fault.hang_timeout, run_dir, attempt.number, topo, Pulse(cfg.train.compile), told)


def _train(cfg: Config, topo: Topology, run_dir: RunDir, attempt: Attempt, view: View, stop: StopFlag, mirror: Mirror,
           watch: Watch) -> dict[str, Any]:  # fmt: skip
    pulse, own = watch.pulse, OwnTime(topo.device)
    pulse.enter("load")
    mirror.fetch()  # before anybody looks for a checkpoint
    data = open_data(cfg.data, cfg.train.seq_len, cfg.seed)
    models, engine = build.build_engine(cfg, topo)
    passes = build.build_passes(cfg, engine, topo, pulse, own)
    plan = BatchPlan(cfg.train)
    facts = build.facts(cfg, data)
    guard = Guard(cfg.fault, loss_scaler(cfg.precision))
    resumed = resume(cfg, run_dir, engine, plan, facts, topo, view, guard)
    first = resumed or 0
    if topo.is_main:
        _begin(cfg, topo, run_dir, data, first, attempt)
    remembered = {**facts, WRITTEN_BY: build.written_by(cfg, topo)}

    def position(step: int) -> dict[str, Any]:
        return {**remembered, "samples": plan.consumed(step), **guard.state()}

    rates = _rates(cfg, topo, plan, first)
    saver = Saver(cfg.checkpoint, attempt, topo, verified=resumed, held=mirror.held)
    saves = SaveCheckpoint(cfg.checkpoint.every, saver, mirror, run_dir, view, engine, rates, position)
    hooks: list[Hook] = [RecordVerdicts(guard, topo, run_dir, view), LogMetrics(cfg.train.log_every, topo, run_dir, view, rates)]
    if comparable(cfg.fault, cfg.engine.name, topo.size("dp")):
        hooks.append(NameStragglers(cfg.train.log_every, cfg.fault.straggler, topo, run_dir, view, own.mean, attempt.number))
    if cfg.fault.replica_check_every:
        hooks.append(CheckReplicas(cfg.fault.replica_check_every, topo, engine))
    if data.valid is not None:
        measure = partial(_evaluate, cfg, data, models, passes, topo, stop)
        hooks.append(During("evaluate", Evaluate(cfg.train.eval_every, topo, run_dir, view, rates, measure), pulse))
    hooks += [During("save", saves, pulse), mirror]
    mirror.begin()
    saves.tidy()

    dropout = cfg.seed if cfg.model.dropout > 0 else None
    rate = build.learning_rate(cfg)
    step: Callable[[int], StepResult]
    step = TrainStep(passes, build.loader(cfg, data.train, topo), plan, topo, rate, dropout, stop.asked, guard, saver.copied)
    if cfg.fault.spike == "rollback":

        def newest() -> int | None:
            with pulse.during("load"):
                saves.wait()
                return go_back(run_dir, engine, facts, topo, view, guard)

        step = Rollback(step, newest, guard, plan, topo, run_dir, view, rates)
    if first >= cfg.train.steps:
        view.say(f"already at step {first}; raise train.steps={cfg.train.steps} to go on")
    view.start(first, cfg.train.steps)
    try:
        done, stopped = train(first, cfg.train.steps, saves.listening(step), hooks)
    except RunFailed:
        with pulse.during("save"):
            saves.wait()  # all ranks are told of what ends a run: a save that is under way need not be lost with it
        raise
    finally:
        saver.close()
    watch.close()  # nobody waits for the main rank any more, and what it waits for has a limit of its own
    mirror.finish(saver.verified)
    summary = _finish(cfg, topo, run_dir, view, done, stopped, stop.reason)
    mirror.check()
    return summary


def _begin(cfg: Config, topo: Topology, run_dir: RunDir, data: DataSource, first: int, attempt: Attempt) -> None:
    """What a run directory says of the run before its first step."""
    compose.save(cfg, run_dir.config)
    if data.tokenizer is not None:
        data.tokenizer.save(run_dir.path)  # a run can write text wherever its data has gone
    run_dir.record("start", step=first, world=topo.world, tp=topo.size("tp"), pp=topo.size("pp"),
                   engine=cfg.engine.name, steps=cfg.train.steps, attempt=attempt.number)  # fmt: skip


def _evaluate(cfg: Config, data: DataSource, models: Sequence[LanguageModel], passes: Passes, topo: Topology,
              stop: StopFlag) -> Evaluation | None:  # fmt: skip
    sizes = data.tokenizer.bytes_per_id if data.tokenizer else None
    batches, asked = build.validation(cfg, data, topo), Stop(stop.stops, topo, passes.pulse.tick)
    return evaluate(models, passes.loss, batches, topo, sizes, _eval_limit(cfg, topo), asked)


def _eval_limit(cfg: Config, topo: Topology) -> int | None:
    """Microbatches of this rank in one evaluation."""
    if cfg.train.eval_batches is None:
        return None
    return max(1, cfg.train.eval_batches * cfg.train.global_batch_size // (cfg.train.micro_batch_size * topo.size("dp")))


def _rates(cfg: Config, topo: Topology, plan: BatchPlan, first: int) -> Rates:
    flops = tuple(flops_per_token(cfg.model, cfg.train.seq_len, causal=causal) for causal in (True, False))
    peak = peak_flops(cfg.train, topo.device, registry.build("precision", cfg.precision))
    return Rates(lambda step: plan.consumed(step) * cfg.train.seq_len, (flops[0], flops[1]), peak, topo, first)


def _finish(cfg: Config, topo: Topology, run_dir: RunDir, view: View, done: int, stopped: bool, reason: str) -> dict[str, Any]:
    if topo.is_main:
        run_dir.record("stop" if stopped else "finish", step=done, reason=reason or ("asked on another rank" if stopped else ""))
        plot_loss(run_dir)
    view.close()
    if stopped and done < cfg.train.steps:
        raise StopRequested(f"stopped by {reason or 'another rank'} after step {done} of {cfg.train.steps}; a checkpoint is saved, "
                            "run the same command to go on")  # fmt: skip
    return {"steps": done, "val_loss": run_dir.last("val_loss"), "dir": str(run_dir.path), "plot": str(run_dir.plot),
            "checkpoint": str(step_folder(run_dir.checkpoints, done))}  # fmt: skip


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


def report(summary: dict[str, Any]) -> None:
    """The last lines of a run: what it came to and where it lies."""
    loss = "" if summary["val_loss"] is None else f", validation loss {summary['val_loss']:.4f}"
    print(f"finished {summary['steps']} steps{loss}")
    for name, key in (("run directory", "dir"), ("checkpoint", "checkpoint"), ("loss plot", "plot")):
        print(f"{name + ':':<15}{summary[key]}")


if __name__ == "__main__":
    from megatron_scratch.util.exits import leave_with

    leave_with(main)
