"""`bench`: tokens per second and MFU of real training steps of a config, on made-up tokens, and where the time goes."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from megatron_scratch import registry
from megatron_scratch.config import Config, check
from megatron_scratch.data.loader import Batch
from megatron_scratch.models.attend import chosen, make_mask
from megatron_scratch.models.flops import count_parameters, flops_per_token
from megatron_scratch.train import build
from megatron_scratch.train.metrics import memory_gib, peak_flops, synchronize
from megatron_scratch.train.passes import to_device
from megatron_scratch.train.scaler import LossScaler, loss_scaler
from megatron_scratch.util.env import Rank
from megatron_scratch.util.errors import UserError

DEFAULT_VOCAB = 256  # bytes: the vocabulary of the published comparison


@dataclass
class Clock:
    """Seconds per named phase, over all measured steps."""

    device: torch.device
    seconds: dict[str, list[float]] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        synchronize(self.device)
        start = time.perf_counter()
        yield
        synchronize(self.device)
        self.seconds.setdefault(name, []).append(time.perf_counter() - start)


def bench(cfg: Config) -> str:
    """Measure `bench.steps` steps after `bench.warmup`; one process. Returns a report of a few lines."""
    if cfg.launcher.processes not in (None, 1):
        raise UserError(f"launcher.processes={cfg.launcher.processes}: bench measures one process; allowed: 1")
    if cfg.train.profile.steps is not None:
        raise UserError(f"train.profile.steps={cfg.train.profile.steps} has no effect on bench, which times its steps itself; "
                        "give it to train")  # fmt: skip
    if cfg.model.vocab_size is None:
        cfg.model.vocab_size = DEFAULT_VOCAB
    check(cfg, world=1)
    with build.process_group(cfg, Rank(), None) as topo:
        _, engine = build.build_engine(cfg, topo)
        rng, clock, totals, scaler = np.random.default_rng(cfg.seed), Clock(topo.device), [], loss_scaler(cfg.precision)
        for i in range(cfg.bench.warmup + cfg.bench.steps):
            if i == cfg.bench.warmup:
                clock.seconds.clear()
                totals.clear()
            start = time.perf_counter()
            batches = [_batch(cfg, rng) for _ in range(cfg.train.global_batch_size // cfg.train.micro_batch_size)]
            _step(cfg, engine, batches, clock, scaler)
            totals.append(time.perf_counter() - start)
        return _report(cfg, totals, clock, topo.device)


def _batch(cfg: Config, rng: np.random.Generator) -> Batch:
    ids = rng.integers(0, cfg.model.vocab_size, (cfg.train.micro_batch_size, cfg.train.seq_len + 1))
    return Batch(np.ascontiguousarray(ids[:, :-1]), np.ascontiguousarray(ids[:, 1:]), None, None, 0)


def _step(cfg: Config, engine: Any, batches: list[Batch], clock: Clock, scaler: LossScaler | None) -> None:
    tokens = cfg.train.global_batch_size * cfg.train.seq_len
    seed = cfg.seed if cfg.model.dropout > 0 else None
    for i, batch in enumerate(batches):
        with engine.microbatch(last=i == len(batches) - 1):
            with clock.phase("forward"):
                loss = engine.forward(*to_device(batch, clock.device), seed) * (scaler.scale if scaler else 1.0) / tokens
            with clock.phase("backward"):
                engine.backward(loss)
    with clock.phase("optimizer"):
        norm = engine.norm(scaler.scale if scaler else None)
        finite = math.isfinite(norm.item())  # the steps of a run wait here, too
        if finite:
            engine.update(cfg.optim.lr, norm)
        else:
            engine.drop()
        if scaler is not None:
            scaler.update(finite)


def _report(cfg: Config, totals: list[float], clock: Clock, device: torch.device) -> str:
    tokens = cfg.train.global_batch_size * cfg.train.seq_len
    rates = [tokens / s for s in totals]
    middle, dtype = statistics.median(rates), registry.build("precision", cfg.precision)
    peak = peak_flops(cfg.train, device, dtype)
    mfu = [middle * flops_per_token(cfg.model, cfg.train.seq_len, causal=causal) / peak for causal in (True, False)]
    parts = {name: sum(s) / sum(totals) for name, s in clock.seconds.items()}
    split = "  ".join(f"{name} {part:.0%}" for name, part in parts.items())
    which = "given" if cfg.train.peak_tflops else "data sheet" if device.type == "cuda" else "measured matmul"
    return "\n".join([
        f"{count_parameters(cfg.model).total / 1e6:.2f}M parameters, {cfg.precision.name}, "
        f"attention {_attention(cfg, device, dtype)}, compile {cfg.train.compile}, {tokens:,} tokens/step, {cfg.bench.steps} steps "
        f"on {_name(device)}",
        f"tokens/s   min {min(rates):,.0f}  median {middle:,.0f}  max {max(rates):,.0f}",
        f"MFU        {mfu[0]:.1%} (6N + 6Lhs, causal)  {mfu[1]:.1%} (6N + 12Lhs)  of {peak / 1e12:.2f} TFLOP/s ({which})",
        f"step time  {split}",
        f"memory     {memory_gib(device):.2f} GiB peak",
    ])  # fmt: skip


def _attention(cfg: Config, device: torch.device, dtype: torch.dtype) -> str:
    """The backend, and what `auto` has taken."""
    if cfg.model.attention != "auto":
        return cfg.model.attention
    mask = make_mask(cfg.train.seq_len, cfg.train.seq_len, cfg.model.sliding_window, None, device)
    return f"auto ({chosen(device, dtype, cfg.model.head_size, mask).__name__})"


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
