"""A training run between its process group and its exit code: all is built, the loop runs, what it came to is written down."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_scratch import registry
from megatron_scratch.checkpoint.manifest import step_folder
from megatron_scratch.checkpoint.saver import Saver
from megatron_scratch.config import Config, compose
from megatron_scratch.data.loader import open_data
from megatron_scratch.models.flops import flops_per_token
from megatron_scratch.train import build
from megatron_scratch.train.batches import BatchPlan
from megatron_scratch.train.features import Built, Place, hooks_of, step_of
from megatron_scratch.train.guarantee import WRITTEN_BY
from megatron_scratch.train.guard import Guard
from megatron_scratch.train.loop import train
from megatron_scratch.train.metrics import peak_flops
from megatron_scratch.train.own_time import OwnTime
from megatron_scratch.train.plot import plot_loss
from megatron_scratch.train.profile import Profile
from megatron_scratch.train.rates import Rates
from megatron_scratch.train.resume import resume
from megatron_scratch.train.saving import SaveCheckpoint
from megatron_scratch.train.scaler import loss_scaler
from megatron_scratch.util.errors import RunFailed, StopRequested


def run_session(at: Place) -> dict[str, Any]:
    """Build, resume, train, finish. Returns what the run came to: steps, losses, paths.

    Raises:
        UserError: the run cannot start as asked. RunFailed: it cannot go on. StopRequested: it was told to stop, and saved.
    """
    cfg, topo, view, pulse = at.cfg, at.topo, at.view, at.watch.pulse
    pulse.enter("load")
    at.mirror.fetch()  # before anybody looks for a checkpoint
    built, facts = _build(at)
    resumed = resume(cfg, at.run_dir, built.engine, built.plan, facts, topo, view, built.guard, at.reporter.load)
    first = resumed or 0
    _begin(at, built, first)
    saver = Saver(cfg.checkpoint, at.attempt, topo, verified=resumed, held=at.mirror.held)
    saves = SaveCheckpoint(cfg.checkpoint.every, saver, at.mirror, at.run_dir, view, built.engine, built.rates,
                           _remembered(at, built, facts))  # fmt: skip
    profile = Profile(cfg.train.profile, topo, at.run_dir, view, built.rates, built.models, pulse)
    step, hooks = step_of(at, built, saves, facts), [*hooks_of(at, built, saves), profile]
    at.mirror.begin()
    saves.tidy()
    if first >= cfg.train.steps:
        view.say(f"already at step {first}; raise train.steps={cfg.train.steps} to go on")
    view.start(first, cfg.train.steps)
    built.rates.restart(first)
    profile.begin(first)
    try:
        done, stopped = train(first, cfg.train.steps, step, hooks)
    except RunFailed:
        with pulse.during("save"):
            saves.wait()  # all ranks are told of what ends a run: a save that is under way need not be lost with it
        raise
    finally:
        profile.close()
        saver.close()
    at.watch.close()  # nobody waits for the main rank any more, and what it waits for has a limit of its own
    at.mirror.finish(saver.verified)
    summary = _finish(at, done, stopped)
    at.mirror.check()
    return summary


def _build(at: Place) -> tuple[Built, dict[str, Any]]:
    """What trains, and the facts by which a checkpoint knows its run."""
    cfg, topo, pulse = at.cfg, at.topo, at.watch.pulse
    data, own = open_data(cfg.data, cfg.train.seq_len, cfg.seed), OwnTime(topo.device)
    models, engine = build.build_engine(cfg, topo)
    passes = build.build_passes(cfg, engine, topo, pulse, own)
    plan, guard = BatchPlan(cfg.train), Guard(cfg.fault, loss_scaler(cfg.precision))
    rates = _rates(at, plan)
    return Built(data, models, engine, passes, plan, guard, rates, own), build.facts(cfg, data)


def _rates(at: Place, plan: BatchPlan) -> Rates:
    cfg, topo = at.cfg, at.topo
    peak = peak_flops(cfg.train, topo.device, registry.build("precision", cfg.precision))
    return Rates(lambda step: plan.consumed(step) * cfg.train.seq_len, flops(cfg), peak, topo, 0, at.phases)


def flops(cfg: Config) -> tuple[float, float]:
    """Floating-point operations of a token: (causal attention, full attention)."""
    causal, full = (flops_per_token(cfg.model, cfg.train.seq_len, causal=causal) for causal in (True, False))
    return causal, full


def _begin(at: Place, built: Built, first: int) -> None:
    """What a run directory says of the run before its first step."""
    cfg, topo, tokenizer = at.cfg, at.topo, built.data.tokenizer
    facts = at.reporter.facts(flops(cfg))  # collective
    if not topo.is_main:
        return
    compose.save(cfg, at.run_dir.config)
    if tokenizer is not None:
        tokenizer.save(at.run_dir.path)  # a run can write text wherever its data has gone
    at.run_dir.record("start", step=first, world=topo.world, tp=topo.size("tp"), pp=topo.size("pp"),
                      engine=cfg.engine.name, steps=cfg.train.steps, attempt=at.attempt.number, **facts)  # fmt: skip
    at.reporter.begin(first)


def _remembered(at: Place, built: Built, facts: dict[str, Any]) -> Callable[[int], dict[str, Any]]:
    """Step -> what a checkpoint remembers beside numbers."""
    constant = {**facts, WRITTEN_BY: build.written_by(at.cfg, at.topo)}

    def position(step: int) -> dict[str, Any]:
        return {**constant, "samples": built.plan.consumed(step), **built.guard.state(), **at.reporter.state(step)}

    return position


def _finish(at: Place, done: int, stopped: bool) -> dict[str, Any]:
    cfg, run_dir, reason = at.cfg, at.run_dir, at.stop.reason
    if at.topo.is_main:
        run_dir.record("stop" if stopped else "finish", step=done, reason=reason or ("asked on another rank" if stopped else ""))
        plot_loss(run_dir)
    at.view.close()
    if stopped and done < cfg.train.steps:
        raise StopRequested(f"stopped by {reason or 'another rank'} after step {done} of {cfg.train.steps}; a checkpoint is saved, "
                            "run the same command to go on")  # fmt: skip
    return {"steps": done, "val_loss": run_dir.last("val_loss"), "dir": str(run_dir.path), "plot": str(run_dir.plot),
            "checkpoint": str(step_folder(run_dir.checkpoints, done))}  # fmt: skip


def report(summary: dict[str, Any]) -> None:
    """The last lines of a run: what it came to and where it lies."""
    loss = "" if summary["val_loss"] is None else f", validation loss {summary['val_loss']:.4f}"
    print(f"finished {summary['steps']} steps{loss}")
    for name, key in (("run directory", "dir"), ("checkpoint", "checkpoint"), ("loss plot", "plot")):
        print(f"{name + ':':<15}{summary[key]}")
