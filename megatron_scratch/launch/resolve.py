"""From a composed config to one that can run, or a refusal: everything that can be known before a process is started."""

from __future__ import annotations

from megatron_scratch import registry
from megatron_scratch.config import Config, check
from megatron_scratch.config.data import fill_samples
from megatron_scratch.config.launcher import ClusterConfig, check_launcher
from megatron_scratch.config.train import check_parallel
from megatron_scratch.data.loader import open_data
from megatron_scratch.util.errors import UserError
from megatron_scratch.util.machine import local_gpus


def world_size(cfg: Config) -> int:
    """Processes of a run: of the cluster's nodes; here as given, all local GPUs, or the fewest that the layout needs."""
    check_parallel(cfg.parallel)
    check_launcher(cfg.launcher)
    if isinstance(cfg.launcher, ClusterConfig):
        return cfg.launcher.nodes * cfg.launcher.gpus_per_node
    need = cfg.parallel.tp * cfg.parallel.pp * cfg.parallel.cp * (getattr(cfg.engine, "replicas", None) or 1)
    if cfg.launcher.processes is not None:
        return cfg.launcher.processes
    return max(need, local_gpus() // need * need)


def resolve(cfg: Config, world: int, nodes: int = 1) -> Config:
    """Check the config against itself, the world and the data; fill in the vocabulary. Returns the same object."""
    registry.load_plugins(cfg.plugins)
    check(cfg, world, nodes)
    fill_samples(cfg.data, cfg.train.steps * cfg.train.global_batch_size)
    data = open_data(cfg.data, cfg.train.seq_len, cfg.seed)
    if cfg.model.vocab_size is None:
        if data.vocab_size is None:
            raise UserError(
                "model.vocab_size is not given and the dataset has no tokenizer to take it from; give model.vocab_size=N"
            )
        cfg.model.vocab_size = data.vocab_size
    elif data.vocab_size is not None and data.vocab_size > cfg.model.vocab_size:
        raise UserError(f"model.vocab_size={cfg.model.vocab_size} is smaller than the dataset's vocabulary of {data.vocab_size}; "
                        "leave model.vocab_size out to take the dataset's")  # fmt: skip
    return cfg
