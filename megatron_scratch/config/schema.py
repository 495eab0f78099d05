"""The whole config as types, and the one function for rules that cross sections."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_scratch import registry
from megatron_scratch.config.attention import check_attention
from megatron_scratch.config.corpus import CorpusConfig, check_corpus
from megatron_scratch.config.data import DataConfig, check_data
from megatron_scratch.config.engine import EngineConfig, check_engine, check_reduction, replicas
from megatron_scratch.config.fault import FaultConfig, check_fault, check_replicas
from megatron_scratch.config.launcher import LauncherConfig, check_launcher
from megatron_scratch.config.layers import check_layers
from megatron_scratch.config.logging import check_logging
from megatron_scratch.config.model import ModelConfig, check_model
from megatron_scratch.config.optim import OptimConfig, ScheduleConfig, check_optim, check_schedule
from megatron_scratch.config.pipeline import check_pipeline
from megatron_scratch.config.precision import PrecisionConfig, check_precision
from megatron_scratch.config.profile import check_profile
from megatron_scratch.config.recompute import check_recompute
from megatron_scratch.config.samples import check_samples
from megatron_scratch.config.train import (
    BenchConfig,
    CheckpointConfig,
    ParallelConfig,
    ParityConfig,
    TrainConfig,
    check_batch,
    check_canonical,
    check_checkpoint,
    check_parallel,
    check_tensor,
    microbatches,
)
from megatron_scratch.util.errors import UserError, choice


@dataclass
class Config:
    """One run. `engine`, `optim`, `schedule` and `launcher` hold the dataclass of the entry they name, `logging` one a sink."""

    name: str = "run"
    dir: str = "runs/${name}"
    seed: int = 1234
    plugins: list[str] = field(default_factory=list)  # modules that register parts of your own
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: Any = field(default_factory=EngineConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: Any = field(default_factory=OptimConfig)
    schedule: Any = field(default_factory=ScheduleConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    fault: FaultConfig = field(default_factory=FaultConfig)
    logging: dict[str, Any] = field(default_factory=dict)  # sink -> its settings: those that are on
    launcher: Any = field(default_factory=LauncherConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)
    parity: ParityConfig = field(default_factory=ParityConfig)


def check(cfg: Config, world: int, nodes: int = 1) -> None:
    """Refuse what cannot run on `world` processes. Sections check themselves; below them, the rules between sections."""
    check_model(cfg.model)
    check_attention(cfg.model, cfg.precision.name, cfg.data.mask_documents, here=cfg.launcher.name == "local")
    check_parallel(cfg.parallel)
    check_data(cfg.data)
    check_optim(cfg.optim)
    check_schedule(cfg.schedule, cfg.train.steps)
    check_checkpoint(cfg.checkpoint)
    check_fault(cfg.fault, cfg.train.steps, cfg.checkpoint.every)
    check_corpus(cfg.corpus)
    for section in ("engine", "precision", "launcher"):
        choice(section, getattr(cfg, section).name, registry.names(section))
    check_launcher(cfg.launcher)
    check_logging(cfg.logging, here=cfg.launcher.name == "local")
    model_ranks = cfg.parallel.tp * cfg.parallel.pp * cfg.parallel.cp
    if world % model_ranks:
        raise UserError(f"the world of {world} processes is not divisible by parallel.tp x pp x cp = {model_ranks}; "
                        f"give launcher.processes={-(-world // model_ranks) * model_ranks}, or leave it out")  # fmt: skip
    dp = world // model_ranks
    check_batch(cfg.train, dp)
    check_canonical(cfg.train, cfg.parallel, cfg.engine.name, dp)
    check_engine(cfg.engine, cfg.precision.name, cfg.optim, cfg.parallel.tp, cfg.parallel.pp, cfg.train.compile)
    check_pipeline(cfg.parallel, cfg.model.num_layers, microbatches(cfg.train, dp), cfg.train.compile)
    check_precision(cfg.precision, cfg.engine.name, dp, cfg.parallel, cfg.model, cfg.train.micro_batch_size * cfg.train.seq_len)
    check_recompute(cfg.parallel, cfg.model, cfg.engine.name, cfg.train.compile)
    check_reduction(cfg.engine, dp)
    check_replicas(cfg.fault, cfg.engine.name, dp)
    replicas(cfg.engine, dp, nodes)
    check_tensor(cfg.model, cfg.train, cfg.parallel)
    check_layers(cfg.train.layers_every)
    check_samples(cfg.train.samples, cfg.train.seq_len)
    check_profile(cfg.train.profile, cfg.train.steps, world)
    if cfg.train.seq_len > cfg.model.max_seq_len:
        raise UserError(f"train.seq_len={cfg.train.seq_len} is beyond model.max_seq_len={cfg.model.max_seq_len}; "
                        "shorten one or lengthen the other")  # fmt: skip
