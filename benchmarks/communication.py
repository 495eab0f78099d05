"""Bytes that travel in a training step, counted beside the formulas: `python benchmarks/communication.py [--out FILE.md]`.

A two-layer Llama on forked CPU ranks takes real training steps, of one and of four microbatches, under every engine with and
without tensor parallelism. Every collective of a step is counted on every rank (`parallel/traffic.py`), the first steps, in which
buckets are still being made, left out. A collective that no formula foresees, or one that is foreseen and missing, exits with 1.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch._dynamo  # noqa: F401  (any optimizer imports it: here once, instead of 0.5 s in every forked rank)

from megatron_scratch import registry
from megatron_scratch.config import Config, check, compose
from megatron_scratch.config.pipeline import owned_stages, schedule_of, virtual_stages
from megatron_scratch.data.dataset import Sample
from megatron_scratch.models.decoder import Decoder
from megatron_scratch.models.objective import chunk_tokens
from megatron_scratch.optim.groups import param_groups
from megatron_scratch.parallel import Topology, traffic
from megatron_scratch.parallel.layout import local
from megatron_scratch.parallel.tensor import token_part
from megatron_scratch.parallel.traffic import Step, Tally, Traffic
from megatron_scratch.train import build
from megatron_scratch.train.batches import BatchPlan
from megatron_scratch.train.forked import run_ranks
from megatron_scratch.train.step import TrainStep
from megatron_scratch.util.env import Rank

# 300 words are padded to 384; none of the sizes is divisible by 3, so that dp=3 pads too.
TINY = ["model=llama_tiny", "model.vocab_size=300", "model.num_layers=2", "model.hidden_size=32", "model.ffn_size=80",
        "model.max_seq_len=32", "train.seq_len=32", "train.micro_batch_size=2", "data.check_ids=false"]  # fmt: skip
MICROBATCHES = (1, 4)
PLAIN = "parallel.sequence_parallel=false"
KEPT = "engine.reshard_after_forward=false"
COPIES = "engine=hsdp engine.replicas=2"
PIPELINE = "model.num_layers=4 parallel.pp=2 parallel.schedule"
LAYOUTS = [(2, "engine=ddp"), (4, "engine=ddp"), (2, "engine=fsdp"), (3, "engine=fsdp"), (4, f"engine=fsdp {KEPT}"), (2, COPIES),
           (4, COPIES), (4, f"{COPIES} {KEPT}"),
           (2, f"parallel.tp=2 {PLAIN}"), (2, f"parallel.tp=2 {PLAIN} parallel.overlap=true"), (2, "parallel.tp=2"),
           (2, "parallel.tp=2 parallel.overlap=true"), (4, f"parallel.tp=4 {PLAIN} model.fused_qkv=false model.qk_norm=true"),
           *((4, f"{engine} parallel.tp=2 {more}") for engine in ("engine=ddp", "engine=fsdp")
             for more in (PLAIN, "parallel.overlap=true", "precision=bf16")),
           (4, f"engine=fsdp parallel.tp=2 {KEPT} {PLAIN} precision=bf16"),
           (2, f"{PIPELINE}=gpipe"), (2, f"{PIPELINE}=gpipe model.tie_embeddings=true"), (2, f"{PIPELINE}=zbv_zero_bubble"),
           (4, f"{PIPELINE}=zbv_zero_bubble parallel.tp=2 precision=bf16"), (4, f"{PIPELINE}=gpipe engine=ddp"),
           (4, f"{PIPELINE}=gpipe engine=fsdp model.tie_embeddings=true precision=bf16"),
           (2, "engine=zero1"), (3, "engine=zero2"), (3, "engine=zero3 engine.persist=100"), (2, "engine=zero1 precision=bf16"),
           *((4, f"engine=zero{stage} parallel.tp=2 {PLAIN} precision=bf16") for stage in (2, 3))]  # fmt: skip


class Tokens:
    """Sample k: made-up tokens."""

    def __getitem__(self, k: int) -> Sample:
        return Sample(np.random.default_rng(k).integers(0, 300, 33), np.zeros(33, dtype=bool), 33)


def config(world: int, words: str) -> Config:
    """`words`: overrides of the tiny model, between spaces."""
    cfg = compose.load([*TINY, *words.split()])
    cfg.train.global_batch_size = cfg.train.micro_batch_size * world // (cfg.parallel.tp * cfg.parallel.pp)
    check(cfg, world)
    return cfg


def measure(rank: Rank, cfg: Config, counts: tuple[int, ...] = MICROBATCHES) -> tuple[list[tuple[Tally, Tally]], dict[str, int]]:
    """(counted, by the formulas) for a step of each number of microbatches; ranks on each axis."""
    topo = build.topology(cfg, rank, torch.device("cpu"))
    _, engine = build.build_engine(cfg, topo)
    passes = build.build_passes(cfg, engine, topo)

    def steps(m: int) -> TrainStep:
        train = replace(cfg.train, global_batch_size=m * cfg.train.global_batch_size)
        return TrainStep(passes, build.loader(cfg, Tokens(), topo), BatchPlan(train), topo, lambda _: 1e-3, None, lambda: False)

    for first in range(2):  # FSDP sets itself up in the first
        steps(1)(first)
    found = []
    for m in counts:
        if cfg.parallel.pp > 1:
            steps(m)(0)  # a schedule of its own, whose stages greet each other
        with Traffic(topo) as seen:
            steps(m)(0)
        found.append((seen.tally, expected(cfg, topo, m)))
    return found, {label: len(ranks) for label, ranks in traffic.labels(topo).values()}


def expected(cfg: Config, topo: Topology, microbatches: int) -> Tally:
    """What a step of this rank should send, from the config and the shapes of the parameters."""
    p, engine, tokens = cfg.parallel, cfg.engine.name, cfg.train.micro_batch_size * cfg.train.seq_len
    compute = registry.build("precision", cfg.precision).itemsize
    master, plain = max(4, compute), engine == "ddp" or engine in ("fsdp", "hsdp") and topo.size("dp") == 1
    numbers = owned_stages(schedule_of(p), p.pp, virtual_stages(p), topo.index("pp"))
    cores = [build.build_model(cfg, topo, build.stage_layers(cfg)[number]).decoder for number in numbers]
    layers = sum(len(core.layers) for core in cores)
    step = Step(layers, cfg.model.hidden_size, tokens, microbatches, compute, master, master if plain else compute)
    stages = [{name: tuple(local(x).shape) for name, x in core.named_parameters()} for core in cores]  # before an engine cuts them
    partial = [s for core, shapes in zip(cores, stages, strict=True) for n, s in shapes.items()
               if s == core.get_parameter(n).shape and (topo.sequence_parallel or of_heads(n))]  # fmt: skip
    shard, index = 1, 0
    if engine == "ddp":
        messages = [message for shapes in stages for message in traffic.ddp(step, list(shapes.values()))]
    elif engine in ("fsdp", "hsdp"):
        shard, index = topo.size("shard"), topo.index("shard" if topo.size("replicate") > 1 else "dp")
        kept = step if p.pp == 1 else replace(step, microbatches=1)
        again = p.pp == 1 and cfg.engine.reshard_after_forward is not False
        messages = [message for core, shapes in zip(cores, stages, strict=True)
                    for message in sharded(kept, core, shapes, shard, again)]  # fmt: skip
    else:
        from megatron_scratch.engine.zero import STAGES

        assert not partial, "not in these formulas: DeepSpeed decides which rank has whose gradients"
        groups = [[tuple(local(x).shape) for x in g["params"]] for g in param_groups(cores[0].named_parameters(), cfg.optim)]
        shard = topo.size("dp")
        messages = traffic.zero(step, STAGES[engine], groups, shard, getattr(cfg.engine, "persist", 0))
    chunks = -(-tokens // chunk_tokens(cfg.model.padded_vocab // p.tp))
    ends, part = (cores[0].first, cores[-1].last), token_part(tokens, topo)
    own = traffic.own(partial, shard, index)
    messages += traffic.tensor_parallel(step, p.tp, topo.sequence_parallel, p.overlap, chunks, own, ends)
    at_one_end = cfg.model.tie_embeddings and ends[0] != ends[1]
    tied = traffic.own([stages[0]["embed.weight"]], shard, index) if at_one_end else 0
    messages += traffic.pipeline(step, part.stop - part.start, numbers, p.pp * virtual_stages(p), tied)
    return traffic.tally([*messages, *traffic.once(step, cut=p.tp > 1 or shard > 1 or p.pp > 1)], topo)


def sharded(step: Step, core: Decoder, shapes: dict[str, traffic.Shape], shard: int, reshard: bool) -> list[traffic.Message]:
    """FSDP's messages of a stage, or of all of the model."""
    layers = [[s for n, s in shapes.items() if n.startswith(f"layers.{number}.")] for number in core.layers]
    return traffic.fsdp(step, layers, [s for n, s in shapes.items() if not n.startswith("layers.")], shard, reshard)


def of_heads(name: str) -> bool:
    """Whether a parameter that every tp rank has whole is used for that rank's heads: norms of heads, copied key/value heads."""
    return any(word in name for word in ("q_norm", "k_norm", "attention.k.", "attention.v."))


def rows(world: int, words: str) -> tuple[list[str], bool]:
    """Rows of the table for one layout, by rank 0, and whether every rank's counts are the formulas'."""
    ranks = run_ranks(world, measure, config(world, words))
    steps, sizes = ranks[0]
    wrong = [f"{words}, rank {r}, m={m}: counted {seen}, by the formulas {want}" for r, (found, _) in enumerate(ranks)
             for m, (seen, want) in zip(MICROBATCHES, found, strict=True) if seen != want]  # fmt: skip
    print("".join(f"WRONG {line}\n" for line in wrong), end="", file=sys.stderr)
    found = []
    for axis, operation in sorted(set().union(*(tally for step in steps for tally in step))):
        pairs = [[tally.get((axis, operation), (0, 0)) for tally in step] for step in steps]
        cells = [f"{seen[i]:,} / {want[i]:,}" for seen, want in pairs for i in (0, 1)]
        sent = traffic.ring_bytes(operation, pairs[-1][0][1], sizes.get(axis, world))
        found.append(f"| {world}: {words} | {axis} | {operation} | {' | '.join(cells)} | {sent:,.0f} |")
    return found, not wrong


def available() -> list[tuple[int, str]]:
    """The layouts, those of DeepSpeed only where it is installed; it is then imported here, once for all ranks."""
    zero = "zero1" in registry.names("engine") and find_spec("deepspeed") is not None
    if zero:
        from megatron_scratch.engine.zero import import_deepspeed

        import_deepspeed("zero1", torch.device("cpu"))
    return [(world, words) for world, words in LAYOUTS if zero or "zero" not in words]


def main() -> int:
    """Count all, print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    start = time.perf_counter()
    torch.set_num_threads(1)
    heads = " | ".join(f"m={m}: calls | bytes" for m in MICROBATCHES)
    table = [f"| ranks: layout | axis | operation | {heads} | sent, m={MICROBATCHES[-1]} |"]
    table += ["|---" * (4 + 2 * len(MICROBATCHES)) + "|"]
    right = True
    for world, words in available():
        found, as_expected = rows(world, words)
        table += found
        right &= as_expected
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    head = f"`python benchmarks/communication.py --out benchmarks/communication.md`, commit {commit}, {time.strftime('%Y-%m-%d')}, "
    head += f"torch {torch.__version__}, Python {platform.python_version()}, gloo, {time.perf_counter() - start:.0f} s. "
    head += "One optimizer step of m microbatches, rank 0, counted / by the formulas of `megatron_scratch/parallel/traffic.py`; "
    head += f"on every rank {'all counts are' if right else 'NOT ALL COUNTS ARE'} those of the formulas. `{' '.join(TINY)}`. "
    head += "`sent`: bytes that the rank has to send over a ring. Axes of the same ranks count together: `dp=world`."
    text = "\n\n".join(["# What travels", head, "\n".join(table)]) + "\n"
    print(text, end="")
    if args.out:
        args.out.write_text(text)
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(main())
