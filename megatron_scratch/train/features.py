"""What happens in a step and around it: the step function of a run, and its hooks in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_scratch.checkpoint.attempt import Attempt
from megatron_scratch.config import Config
from megatron_scratch.config.fault import comparable
from megatron_scratch.data.dataset import EvalWindows
from megatron_scratch.data.loader import DataSource
from megatron_scratch.engine import Engine
from megatron_scratch.parallel import Topology
from megatron_scratch.train import build
from megatron_scratch.train.batches import BatchPlan
from megatron_scratch.train.console import View
from megatron_scratch.train.evaluate import Evaluation, Stop, evaluate
from megatron_scratch.train.fault import StopFlag
from megatron_scratch.train.guard import Guard
from megatron_scratch.train.hooks import During, Evaluate, LogMetrics, RecordVerdicts
from megatron_scratch.train.layers import LayerStatistics
from megatron_scratch.train.loop import Hook
from megatron_scratch.train.mirror import Mirror
from megatron_scratch.train.objective import LanguageModel
from megatron_scratch.train.own_time import OwnTime
from megatron_scratch.train.passes import Passes
from megatron_scratch.train.phases import Phases
from megatron_scratch.train.rates import Rates
from megatron_scratch.train.replicas import CheckReplicas
from megatron_scratch.train.reporter import Reporter
from megatron_scratch.train.resume import go_back
from megatron_scratch.train.rollback import Rollback
from megatron_scratch.train.rundir import RunDir
from megatron_scratch.train.samples import Writer, WriteSamples
from megatron_scratch.train.saving import SaveCheckpoint
from megatron_scratch.train.step import StepResult, TrainStep
from megatron_scratch.train.straggler import NameStragglers
from megatron_scratch.train.watch import Watch

StepFunction = Callable[[int], StepResult]


@dataclass(frozen=True)
class Place:
    """What a rank has around it before anything is built."""

    cfg: Config
    topo: Topology
    run_dir: RunDir
    attempt: Attempt
    view: View
    stop: StopFlag
    mirror: Mirror
    watch: Watch
    phases: Phases
    reporter: Reporter


@dataclass(frozen=True)
class Built:
    """What trains."""

    data: DataSource
    models: Sequence[LanguageModel]
    engine: Engine
    passes: Passes
    plan: BatchPlan
    guard: Guard
    rates: Rates
    own: OwnTime


def step_of(at: Place, built: Built, saves: SaveCheckpoint, facts: dict[str, Any]) -> StepFunction:
    """Step number -> what it came to; with what listens to it, from the inside out: layers, the rollback, requests for a save."""
    cfg, topo, pulse, guard = at.cfg, at.topo, at.watch.pulse, built.guard
    dropout = cfg.seed if cfg.model.dropout > 0 else None
    loader = build.loader(cfg, built.data.train, topo)

    cores = [model.decoder for model in built.models]
    layers = LayerStatistics(cfg.train.layers_every, built.engine, cores, topo, built.rates.tokens_at, at.run_dir.log_layers)

    def before_update() -> None:
        layers.take_gradients()
        with pulse.during("save"):
            saves.saver.copied()

    plain = TrainStep(
        built.passes, loader, built.plan, topo, build.learning_rate(cfg), dropout, at.stop.asked, guard, before_update
    )
    step = layers.listening(plain)
    if cfg.fault.spike == "rollback":

        def newest() -> int | None:
            with pulse.during("load"):
                saves.wait()
                return go_back(at.run_dir, built.engine, facts, topo, at.view, guard)

        step = Rollback(step, newest, guard, built.plan, topo, at.run_dir, at.view, built.rates)
    return saves.listening(step)


def hooks_of(at: Place, built: Built, saves: SaveCheckpoint) -> list[Hook]:
    """What happens after steps, in this order."""
    cfg, topo, run_dir, view, pulse, t = at.cfg, at.topo, at.run_dir, at.view, at.watch.pulse, at.cfg.train
    hooks: list[Hook] = [
        RecordVerdicts(built.guard, topo, run_dir, view),
        LogMetrics(t.log_every, topo, run_dir, view, built.rates),
    ]
    if comparable(cfg.fault, cfg.engine.name, topo.size("dp")):
        hooks.append(NameStragglers(t.log_every, cfg.fault.straggler, topo, run_dir, view, built.own.mean, at.attempt.number))
    if cfg.fault.replica_check_every:
        hooks.append(CheckReplicas(cfg.fault.replica_check_every, topo, built.engine))
    if built.data.evaluated:
        evaluation = Evaluate(t.eval_every, topo, run_dir, view, built.rates, lambda: measure(at, built))
        hooks.append(During("evaluate", evaluation, pulse))
    if t.samples.every:
        writer = Writer(built.models, built.passes, topo, t)
        samples = WriteSamples(t.samples, cfg.seed, built.data.tokenizer, writer, run_dir, view, built.rates)
        hooks.append(During("evaluate", samples, pulse))
    return [*hooks, During("save", saves, pulse), at.mirror, at.reporter]


def measure(at: Place, built: Built) -> dict[str, Evaluation] | None:
    """Loss on the run's validation set; None: it was broken off."""
    found = {}
    for name, dataset in built.data.evaluated.items():
        one = _measure(at, built, dataset)
        if one is None:
            return None
        found[name] = one
    return found


def _measure(at: Place, built: Built, dataset: EvalWindows) -> Evaluation | None:
    cfg, topo, tokenizer = at.cfg, at.topo, built.data.tokenizer
    sizes = tokenizer.bytes_per_id if tokenizer else None
    asked = Stop(at.stop.stops, topo, built.passes.pulse.tick)
    batches = build.validation(cfg, dataset, topo)
    return evaluate(built.models, built.passes.loss, batches, topo, sizes, _eval_limit(cfg, topo), asked)


def _eval_limit(cfg: Config, topo: Topology) -> int | None:
    """Microbatches of this rank in one evaluation."""
    if cfg.train.eval_batches is None:
        return None
    return max(1, cfg.train.eval_batches * cfg.train.global_batch_size // (cfg.train.micro_batch_size * topo.size("dp")))
