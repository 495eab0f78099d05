"""`parity`: a config, shrunk, in one process and under its layout, from the same init on the same data, number by number.

Compared are the loss and the gradient norm of each step, every parameter's gradient in each step, and the weights after the last,
on every rank. The one process is the truth: plain layers, no collectives, `engine=ddp` over one rank.
"""

from __future__ import annotations

import logging
import math
from copy import deepcopy
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch

from megatron_scratch.config import Config, check
from megatron_scratch.config.engine import DDPConfig
from megatron_scratch.config.optim import SGDConfig
from megatron_scratch.config.train import ParallelConfig
from megatron_scratch.data.made_up import MadeUpSamples
from megatron_scratch.parallel import SINGLE, Topology
from megatron_scratch.parallel.collectives import all_reduce_world, gather_json
from megatron_scratch.parallel.layout import full
from megatron_scratch.train import build
from megatron_scratch.train.batches import BatchPlan
from megatron_scratch.train.forked import run_ranks
from megatron_scratch.train.guard import Guard
from megatron_scratch.train.scaler import loss_scaler
from megatron_scratch.train.step import TrainStep
from megatron_scratch.util.env import Rank
from megatron_scratch.util.errors import UserError

HALF = {"bf16": 2.0**-9, "fp16": 2.0**-12}  # rounding of the precisions that are measured by their distance from fp32
LR, EPS = 1e-2, 1e-3  # large enough that an update is far above the rounding of a weight
ALL = "all parameters"
SHOWN = 5  # rows of a quantity, where so many are too far
SMALL = 1e-2  # a parameter's error is measured against its own norm, but not against less than this part of the norm of all


@dataclass
class Trace:
    """What a run came to, in full tensors. Lists have an entry per step."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)
    updates: dict[str, torch.Tensor] = field(default_factory=dict)  # weights after the last step, less those before the first

    def of(self, names: set[str]) -> Trace:
        """What concerns some parameters only: those of a pipeline stage."""
        gradients = [{name: g for name, g in step.items() if name in names} for step in self.gradients]
        return replace(self, gradients=gradients, updates={name: u for name, u in self.updates.items() if name in names})


@dataclass(frozen=True)
class Tolerance:
    """Largest relative error, and why not less."""

    value: float
    reason: str


TOLERANCES = {
    "fp64": Tolerance(
        1e-10, "fp64 rounds at 1.1e-16; sums of some 10^3 terms, 3 steps: 1e-10 leaves room for nothing but rounding"
    ),
    "fp32": Tolerance(1e-5, "fp32 rounds at 6e-8; sums of 10^2 to 10^3 terms in another order, twice through each layer"),
    "bf16": Tolerance(
        2.0,
        "the distance from fp32, at most twice that of one process in bf16: both round at 2^-9, in other places (for one "
        "parameter, a small sample of roundings, four times)",
    ),
    "fp16": Tolerance(2.0, "as bf16's: the distance from fp32, at most twice that of one process in fp16; both round at 2^-12"),
}


def single(cfg: Config, precision: str | None = None) -> Config:
    """The same training in one process."""
    one = deepcopy(cfg)
    one.parallel, one.engine, one.launcher.processes = ParallelConfig(), DDPConfig(), 1
    one.train.canonical_reduction = False  # or a mistake in it would be on both sides
    one.precision = replace(one.precision, name=precision or one.precision.name)
    return one


def comparable(cfg: Config) -> tuple[Config, str]:
    """The config with an optimizer whose updates are smooth in the gradient, and what was changed.

    AdamW divides by sqrt(v) + eps: where a gradient is nearly 0 its first updates are +-lr by the last bit of a rounding, and no
    tolerance can be derived. With eps = 1e-3 an update changes by at most 1/eps of what a gradient does. Optimizers that take signs
    are smooth nowhere, and are compared in fp64 only.
    """
    small, was = deepcopy(cfg), cfg.optim.name
    small.optim.lr = LR
    if hasattr(small.optim, "eps"):
        small.optim.eps = EPS
    if was == "adamw":
        return small, f"{was} with eps={EPS:g}, so that rounding stays rounding"
    if was == "sgd" or cfg.precision.name == "fp64":
        return small, was
    shared = {key: getattr(small.optim, key) for key in ("lr", "weight_decay", "clip_grad_norm", "groups")}
    small.optim = SGDConfig(**shared)
    how = "engine=fsdp precision=fp64" if cfg.engine.name.startswith("zero") else "precision=fp64"
    return small, f"sgd in place of {was}, whose updates turn rounding into signs; {how} compares {was} itself"


def trace(cfg: Config, topo: Topology, steps: int) -> Trace:
    """Train `steps` steps and keep everything; collective."""
    _, engine = build.build_engine(cfg, topo)
    loader = build.loader(cfg, MadeUpSamples(cfg.model.vocab_size or 0, cfg.train.seq_len, cfg.seed), topo)
    dropout = cfg.seed if cfg.model.dropout > 0 else None
    passes, guard = build.build_passes(cfg, engine, topo), Guard(cfg.fault, loss_scaler(cfg.precision))
    step = TrainStep(passes, loader, BatchPlan(cfg.train), topo, lambda s: cfg.optim.lr, dropout, lambda: False, guard)
    out, before = Trace(), _weights(engine)
    for number in range(steps):
        loss, _, _ = step.gradients(number)
        out.losses.append(float(all_reduce_world(loss.double().cpu(), topo)))
        gradients = {k.removeprefix("grad."): v for k, v in engine.state().items() if k.startswith("grad.")}
        out.gradients.append({name: full(gradient) / (guard.scale or 1.0) for name, gradient in gradients.items()})
        norm = engine.norm(guard.scale)
        engine.update(cfg.optim.lr, norm)
        out.norms.append(float(norm))
    out.updates = {name: after - before[name] for name, after in _weights(engine).items()}
    return out


def _weights(engine: Any) -> dict[str, torch.Tensor]:
    return {k.removeprefix("model."): full(v).clone() for k, v in engine.state().items() if k.startswith("model.")}


@dataclass(frozen=True)
class Row:
    """The worst of one quantity over ranks, steps and parameters."""

    quantity: str
    error: float
    where: str


def distances(a: Trace, truth: Trace) -> dict[str, dict[str, float]]:
    """quantity -> where -> relative distance."""
    found: dict[str, dict[str, float]] = {"loss": {}, "gradient norm": {}, "gradient": {}, "update of weights": {}}
    for i, (loss, norm) in enumerate(zip(truth.losses, truth.norms, strict=True)):
        found["loss"][f"step {i + 1}"] = _ratio(abs(a.losses[i] - loss), abs(loss))
        found["gradient norm"][f"step {i + 1}"] = _ratio(abs(a.norms[i] - norm), norm)
        for name, error in _tensors(a.gradients[i], truth.gradients[i]).items():
            found["gradient"][f"{name}, step {i + 1}"] = error
    found["update of weights"] = _tensors(a.updates, truth.updates)
    return found


def _tensors(a: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> dict[str, float]:
    """|a - b| / max(|b|, SMALL |all of b|) for each name and for all together; infinite for what is not on both sides."""
    errors = {name: float("inf") for name in set(a) ^ set(truth)}
    both = sorted(set(a) & set(truth))
    sizes = {name: float(truth[name].double().norm()) for name in both}
    apart = {name: float((a[name].double() - truth[name].double()).norm()) for name in both}
    every = math.hypot(*sizes.values())
    errors |= {name: _ratio(apart[name], max(sizes[name], SMALL * every)) for name in both}
    errors[ALL] = _ratio(math.hypot(*apart.values()), every)
    return errors


def _ratio(error: float, size: float) -> float:
    return error / size if size > 0 and error == error else 0.0 if error == 0 else float("inf")  # noqa: PLR0124  (nan)


def _relative_to(
    found: dict[str, dict[str, float]], one: dict[str, dict[str, float]], rounding: float
) -> dict[str, dict[str, float]]:
    """Distances as multiples of what one process has in the same place.

    The distance of all parameters together hardly varies: layouts come to 1.0 to 1.2. A bias of 16 numbers is a sample of 16
    roundings, so for one parameter the measure is twice its own distance in one process, or the median parameter's where that is
    more. A gradient norm can be as far off as the gradients (triangle inequality); a loss, a mean over some 10^2 tokens, is given a
    quarter of a rounding at least, as that of one process may be right by chance.
    """
    middle = {quantity: median(errors.values()) for quantity, errors in one.items()}

    def size(quantity: str, where: str) -> float:
        own = one[quantity].get(where, 0.0)
        if quantity == "loss":
            return max(own, rounding / 4)
        if quantity == "gradient norm":
            return max(own, one["gradient"][f"{ALL}, {where}"])
        return own if where.startswith(ALL) else 2 * max(own, middle[quantity])

    return {q: {where: _ratio(error, size(q, where)) for where, error in errors.items()} for q, errors in found.items()}


def reference(cfg: Config, steps: int) -> list[Trace]:
    """What a layout is compared with: the run of one process; in bf16 [fp32, bf16], in fp16 likewise."""
    names = ["fp32", cfg.precision.name] if cfg.precision.name in HALF else [cfg.precision.name]
    return [trace(single(cfg, name), SINGLE, steps) for name in names]


def _rank(rank: Rank, cfg: Config, steps: int, truths: list[Trace]) -> list[list[Row]]:
    """One rank of the layout: its own comparison, so that ranks that drift apart are seen. Per quantity, the worst rows first."""
    # A full tensor of a parameter that two axes cut takes two gathers; torch warns that this is slow. It is a proof, not a step.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    topo = build.topology(cfg, rank, torch.device("cpu"))
    mine = trace(cfg, topo, steps)
    absent = set(truths[0].updates) - {name for stage in gather_json(sorted(mine.updates), topo, "pp") for name in stage}
    truths = [truth.of(set(mine.updates) | absent) for truth in truths]
    found = distances(mine, truths[0])
    if len(truths) > 1:
        found = _relative_to(found, distances(truths[1], truths[0]), HALF[cfg.precision.name])
    rows = []
    for quantity, errors in found.items():
        worst = sorted(errors, key=errors.__getitem__, reverse=True)[:SHOWN]
        rows.append([Row(quantity, errors[where], where) for where in worst])
    return rows


def compare(cfg: Config, world: int, steps: int, truths: list[Trace] | None = None) -> list[Row]:
    """The worst of each quantity over all ranks of a shrunk config, and what else is too far.

    `truths`: the config's `reference`, where it is at hand.
    """
    torch.set_num_threads(1)
    truths = reference(cfg, steps) if truths is None else truths
    ranks = run_ranks(world, _rank, cfg, steps, truths)
    limit, out = tolerance(cfg).value, []
    for i in range(len(ranks[0])):
        worst: dict[str, Row] = {}
        for row in sorted((row for rank in ranks for row in rank[i]), key=lambda row: row.error):
            worst[row.where] = row
        rows = sorted(worst.values(), key=lambda row: row.error, reverse=True)
        out += [row for n, row in enumerate(rows[:SHOWN]) if n == 0 or row.error > limit]
    return out


def tolerance(cfg: Config) -> Tolerance:
    """
    Raises:
        UserError: there is none that could be derived.
    """
    name = cfg.precision.name
    if name not in TOLERANCES:
        raise UserError(f"precision={name} has no parity, as its products need a GPU; compare the layout with one of "
                        f"precision={', '.join(TOLERANCES)}")  # fmt: skip
    return TOLERANCES[name]


def passed(rows: list[Row], limit: Tolerance) -> bool:
    return all(row.error <= limit.value for row in rows)


def parity(small: Config, world: int, steps: int) -> tuple[str, bool]:
    """The report of the verb, and whether all is equal. `small` has been shrunk and vetted."""
    limit = tolerance(small)
    check(small, world)
    small, optimizer = comparable(small)
    rows = compare(small, world, steps)
    ok = passed(rows, limit)
    m = small.model
    layout = "  ".join(f"{key}={value}" for key, value in _layout(small, world).items())
    unit = f"x one process in {small.precision.name}" if small.precision.name in HALF else "relative"
    wide, t = max(len(row.where) for row in rows), small.train
    lines = [
        f"layout     {layout}",
        f"shrunk to  {m.num_layers} layers, width {m.hidden_size}, {m.num_heads} heads ({m.kv_heads} key/value), ffn {m.ffn}, "
        f"vocabulary {m.vocab_size}, {t.seq_len} tokens, {t.global_batch_size} sequences in microbatches of {t.micro_batch_size}",
        f"optimizer  {optimizer}",
        f"{steps} steps in {small.precision.name}, {world} processes against one; worst error ({unit}) over all ranks:",
        *(
            f"  {'ok  ' if row.error <= limit.value else 'FAIL'} {row.quantity:<18} {row.where:<{wide}}  {row.error:.1e}"
            for row in rows
        ),
        f"tolerance  {limit.value:g}: {limit.reason}",
        f"{'equal' if ok else 'NOT equal'}: {world} processes and one compute {'the same' if ok else 'different numbers'}",
    ]
    return "\n".join(lines), ok


def _layout(cfg: Config, world: int) -> dict[str, Any]:
    p = cfg.parallel
    out: dict[str, Any] = {"engine": cfg.engine.name, "tp": p.tp, "dp": world // (p.tp * p.pp * p.cp)}
    if p.tp > 1:
        out |= {"sequence_parallel": p.sequence_parallel is not False, "overlap": p.overlap}
    if p.pp > 1:
        out |= {"pp": p.pp, "schedule": p.schedule, "stages": [len(layers) for layers in build.stage_layers(cfg)]}
    if p.recompute != "none":
        out["recompute"] = p.recompute
    return out
