"""The one place where everything meets: from a resolved config to objects that train."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

from megatron_scratch import registry
from megatron_scratch.config import Config
from megatron_scratch.config.engine import replicas
from megatron_scratch.config.fault import FaultConfig
from megatron_scratch.config.pipeline import owned_stages, schedule_of, virtual_stages
from megatron_scratch.config.precision import PrecisionConfig, takes
from megatron_scratch.data.dataset import EvalWindows
from megatron_scratch.data.loader import Batch, DataSource, Loader
from megatron_scratch.engine import Engine, Parts, Staged
from megatron_scratch.engine.canonical import CanonicalEngine
from megatron_scratch.models.decoder import Decoder
from megatron_scratch.models.flops import layers_of_stages
from megatron_scratch.models.fp8 import refuse_device, use_fp8
from megatron_scratch.optim.groups import param_groups
from megatron_scratch.optim.schedules import lr_at
from megatron_scratch.parallel import Topology, materialize, recompute
from megatron_scratch.parallel.deferred import WeightGradients
from megatron_scratch.parallel.layout import layouts
from megatron_scratch.parallel.pipeline import Pipeline, Plan
from megatron_scratch.parallel.tensor import token_part
from megatron_scratch.train import activations, guarantee
from megatron_scratch.train.heartbeat import Pulse
from megatron_scratch.train.objective import LanguageModel
from megatron_scratch.train.own_time import OwnTime
from megatron_scratch.train.passes import Canonical, Passes, Stages, WholeModel
from megatron_scratch.util.env import Rank, agent_store, master, prepare_recorder, restart_count
from megatron_scratch.util.memory import keep_freed_memory

TIMEOUT = timedelta(minutes=10)  # without a `fault.hang_timeout`: torch's default of 30 leaves a hung job unseen for half an hour
RECORDED = 64  # collectives that torch remembers for the hang verdict: a look at them takes 1 ms
FREE_MODEL_FIELDS = {"attention", "dropout", "norm_kernel"}  # may change between a checkpoint and the run that resumes it


def fp32(cfg: PrecisionConfig) -> torch.dtype:
    return torch.float32


def bf16(cfg: PrecisionConfig) -> torch.dtype:
    """fp8's too: its activations are bf16, and what is not a product of a layer is computed as in bf16."""
    return torch.bfloat16


def fp16(cfg: PrecisionConfig) -> torch.dtype:
    return torch.float16


def fp64(cfg: PrecisionConfig) -> torch.dtype:
    return torch.float64


def gradient_dtype(cfg: PrecisionConfig) -> torch.dtype | None:
    """What gradients are added up in, where it is not the dtype of the masters."""
    return torch.bfloat16 if cfg.gradients == "bf16" and takes(cfg, "gradients") else None


@contextmanager
def process_group(cfg: Config, rank: Rank, store_file: Path | None) -> Iterator[Topology]:
    """Join the other ranks, if there are any, and say who is where. Leaves them on the way out."""
    device = torch.device("cuda", rank.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
        if threads := cpu_threads(cfg, rank.world):
            torch.set_num_threads(threads)
    if rank.world > 1:
        # CPU tensors travel over gloo even in a GPU job: counts and flags need no device sync.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        prepare_recorder(RECORDED)
        meet, wait = timeouts(cfg.fault)
        dist.init_process_group(backend, store=_store(rank, store_file, meet), rank=rank.rank, world_size=rank.world, timeout=meet)
    try:
        topo = topology(cfg, rank, device)
        if rank.world > 1:
            _set_timeouts(topo, wait)
        yield topo
    finally:
        if rank.world > 1:
            dist.destroy_process_group()


def timeouts(cfg: FaultConfig) -> tuple[timedelta, timedelta]:
    """(how long ranks wait for each other to meet, how long one waits in a message afterwards).

    The second one is for what the watch cannot end (`train/watch.py`), which knows whether the others still work: a checkpoint may
    take the main rank longer than `fault.hang_timeout`, and those that wait for it must not end that.
    """
    limit = timedelta(seconds=cfg.hang_timeout) or TIMEOUT
    return limit + timedelta(seconds=30), max(2 * limit, limit + timedelta(minutes=1)) if cfg.hang_timeout else limit


def _set_timeouts(topo: Topology, timeout: timedelta) -> None:
    """Of all groups: those of a mesh have torch's default of 30 minutes over gloo, whatever the world has (torch 2.13)."""
    set_timeout = getattr(dist.distributed_c10d, "_set_pg_timeout", None)
    for group in (None, *topo.groups.values()) if set_timeout else ():
        set_timeout(timeout, group)


def cpu_threads(cfg: Config, world: int) -> int | None:
    """Threads of this process; None: as torch chooses. Their number changes how products are cut, and so the last bits: where dp
    must not change these, it must not choose the threads."""
    if cfg.train.threads or cfg.train.canonical_reduction:
        return cfg.train.threads or 1
    return max(1, (os.cpu_count() or 1) // world) if world > 1 else None


def topology(cfg: Config, rank: Rank, device: torch.device) -> Topology:
    """The mesh of a config's layout; the process group exists."""
    p = cfg.parallel
    copies = replicas(cfg.engine, rank.world // (p.tp * p.pp * p.cp), rank.nodes)
    degrees = {"pp": p.pp, "cp": p.cp, "tp": p.tp, "replicate": copies}
    deferred = WeightGradients() if p.pp > 1 and schedule_of(p).splits else None
    return Topology.build(degrees, rank.rank, rank.world, device, p.sequence_parallel is not False, p.overlap, deferred)


def _store(rank: Rank, store_file: Path | None, timeout: timedelta) -> dist.Store:
    """Where ranks find each other: our launcher's file, or torchrun's store under a prefix of its own for each restart
    (without it, restarted gloo ranks read the addresses of the dead ones)."""
    if store_file is not None:
        return dist.FileStore(str(store_file), rank.world)
    address, port = master()
    hosted = agent_store()
    store = dist.TCPStore(address, port, rank.world, is_master=rank.rank == 0 and not hosted, timeout=timeout)
    # A store of our own is new. And with c10d the agents of several machines count restarts each for itself.
    return dist.PrefixStore(f"megatron_scratch/{restart_count() if hosted else 0}", store)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New floating-point tensors are of `dtype` inside."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build_model(cfg: Config, topo: Topology, layers: range | None = None) -> LanguageModel:
    """The model, or the stage of it with some layers, on the meta device, with its compute precision; nothing has memory yet."""
    dtype = registry.build("precision", cfg.precision)
    with default_dtype(torch.promote_types(dtype, torch.float32)):  # of the masters
        decoder = Decoder(cfg.model, topo, layers)
    decoder.compute_dtype = dtype
    return LanguageModel(decoder, cfg.train.z_loss)


def stage_layers(cfg: Config) -> list[range]:
    """The layers of each stage of the pipeline, first to last; one stage without a pipeline."""
    count = cfg.parallel.pp * virtual_stages(cfg.parallel)
    sizes = cfg.parallel.stages or layers_of_stages(cfg.model, cfg.train.seq_len, count)
    stops = list(accumulate(sizes))
    return [range(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]


def build_engine(cfg: Config, topo: Topology) -> tuple[tuple[LanguageModel, ...], Engine]:
    """This rank's stages of the model (one without a pipeline: all of it), and the engine that holds them.

    The order in which a model is taken apart, once and for all: layout -> recompute -> compile -> data parallel -> memory ->
    optimizer. The layout is in the parameters from birth (`shard_param`); the engine does the last three.
    """
    stages, p = stage_layers(cfg), cfg.parallel
    mine = owned_stages(schedule_of(p), p.pp, virtual_stages(p), topo.index("pp"))
    models = tuple(build_model(cfg, topo, stages[number]) for number in mine)
    cores = tuple(model.decoder for model in models)
    blocks = [block for core in cores for block in core.layers.values()]
    if takes(cfg.precision, "recipe"):
        refuse_device(topo.device)
        use_fp8(blocks, cfg.precision.recipe)
    for core in cores:
        recompute.apply(core.layers, p, partial(activations.costs, core, cfg), cfg.train.compile)
    if cfg.train.compile:
        for block in blocks:
            block.compile()
    tables = [layouts(core) for core in cores]  # engines make new parameters before there is memory

    def fill() -> None:
        for core, table in zip(cores, tables, strict=True):
            materialize(core, cfg.seed, topo.device, table)

    def make_optimizer(named: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
        return registry.build("optim", cfg.optim, groups=param_groups(named.items(), cfg.optim))

    tied = "embed.weight" if cfg.model.tie_embeddings and p.pp > 1 else ""
    parts = Parts(models, cores, fill, make_optimizer, topo, cfg.optim.clip_grad_norm, cores[0].compute_dtype, tied,
                  gradient_dtype(cfg.precision))  # fmt: skip
    if cfg.train.canonical_reduction:  # ddp by another order of its sums: `config.train.check_canonical` lets nothing else pass
        return models, CanonicalEngine(cfg.engine, parts)
    return models, registry.build("engine", cfg.engine, parts=parts)


def build_passes(cfg: Config, engine: Engine, topo: Topology, pulse: Pulse | None = None, own: OwnTime | None = None) -> Passes:
    """How the microbatches of this run pass through its model.

    Args:
        pulse: is told of each one. own: measures their forward passes.
    """
    pulse, own = pulse or Pulse(), own or OwnTime(topo.device)
    if isinstance(engine, CanonicalEngine):
        return Canonical(engine, topo, pulse, own)
    if cfg.parallel.pp == 1:
        return WholeModel(engine, topo, pulse, own)
    assert cfg.model.vocab_size is not None
    tokens = cfg.train.micro_batch_size * cfg.train.seq_len
    part = token_part(tokens, topo)
    shape, dtype = (part.stop - part.start, cfg.model.hidden_size), registry.build("precision", cfg.precision)
    plan = Plan(schedule_of(cfg.parallel), virtual_stages(cfg.parallel), shape, dtype)
    staged = cast(Staged, engine)

    def accumulate(stage: int) -> None:
        pulse.tick()
        staged.accumulate(stage)

    pipeline = Pipeline(plan, topo, [own.around(call) for call in staged.calls], accumulate, staged.reduce)
    return Stages(pipeline, staged, topo, cfg.model.vocab_size, pulse)


def learning_rate(cfg: Config) -> Callable[[int], float]:
    """Step from 0 -> learning rate."""
    return lambda step: cfg.optim.lr * lr_at(cfg.schedule, step, cfg.train.steps)


def loader(cfg: Config, dataset: Any, topo: Topology) -> Loader:
    """Batches of this rank by sample number."""
    vocab = cfg.model.vocab_size if cfg.data.check_ids else None
    return Loader(dataset, cfg.train.micro_batch_size, topo.index("dp"), topo.size("dp"), mask_documents=cfg.data.mask_documents,
                  mask_eod=cfg.data.mask_eod, vocab_size=vocab, contiguous=cfg.train.canonical_reduction)  # fmt: skip


def validation(cfg: Config, dataset: EvalWindows, topo: Topology) -> Iterator[Batch]:
    """This rank's share of a set's windows, from the start; past the last one a batch is filled up with padding.

    Every rank gets the same number of batches: engines that gather parameters in forward need all ranks to take part.
    """
    mine, micro = loader(cfg, dataset, topo), cfg.train.micro_batch_size
    for first in range(0, len(dataset), topo.size("dp") * micro):
        yield mine.batch(first + topo.index("dp") * micro)


def written_by(cfg: Config, topo: Topology) -> dict[str, Any]:
    """What a checkpoint remembers of how its numbers came about, to say at a resume what is the same from there on."""
    degrees = {axis: topo.size(axis) for axis in ("dp", "tp", "pp", "cp", "replicate")}
    if topo.device.type == "cuda":
        machine = {"threads": None, "device": torch.cuda.get_device_name(topo.device)}
    else:
        machine = {"threads": torch.get_num_threads(), "device": f"cpu {torch.backends.cpu.get_cpu_capability()}"}
    return guarantee.facts(cfg, degrees, {**machine, "torch": torch.__version__})


def facts(cfg: Config, data: DataSource) -> dict[str, Any]:
    """What a checkpoint remembers of its run, to refuse a resume that would change the meaning of its numbers."""
    model = {k: v for k, v in asdict(cfg.model).items() if k not in FREE_MODEL_FIELDS}
    tokenizer = data.tokenizer.sha256 if data.tokenizer else None
    return {
        "model": model,
        "seed": cfg.seed,
        "seq_len": cfg.train.seq_len,
        "optim": cfg.optim.name,
        "order": cfg.data.order,
        "mask_documents": cfg.data.mask_documents,
        "mask_eod": cfg.data.mask_eod,
        "data": data.fingerprint,
        "tokenizer": tokenizer,
    }
