"""`train`, and what is done with a layout or a trained run."""

from __future__ import annotations

import re

from megatron_scratch.cli.words import MULTIRUN, composed
from megatron_scratch.util.errors import UserError
from megatron_scratch.util.exits import FAILED, OK


def train(words: list[str]) -> int:
    if any(word in MULTIRUN for word in words):
        from megatron_scratch.cli.sweep import sweep

        return sweep(words)
    cfg = composed(words)
    if cfg is None:
        return OK
    from megatron_scratch import registry
    from megatron_scratch.launch.resolve import resolve, world_size
    from megatron_scratch.util.env import read_rank

    rank = read_rank()
    world = rank.world if rank.launched else world_size(cfg)
    if rank.launched and cfg.launcher.processes not in (None, world):
        raise UserError(f"launcher.processes={cfg.launcher.processes}, but torchrun or srun has started {world}; leave it out")
    cfg = resolve(cfg, world, rank.nodes)
    if rank.launched:  # torchrun or srun started us: this process is a rank
        from megatron_scratch.train.worker import report, run

        summary = run(cfg, rank)
        if rank.rank == 0:
            report(summary)
        return OK
    return registry.get("launcher", cfg.launcher.name)(cfg, world)


def parity(words: list[str]) -> int:
    cfg = composed(words)
    if cfg is None:
        return OK
    from megatron_scratch import registry
    from megatron_scratch.config.shrink import shrink, small_world, vet

    registry.load_plugins(cfg.plugins)
    world = small_world(cfg)
    vet(cfg, world)
    small = shrink(cfg, world)
    from megatron_scratch.train.parity import parity

    text, equal = parity(small, world, cfg.parity.steps)
    print(text)
    return OK if equal else FAILED


def bench(words: list[str]) -> int:
    cfg = composed(words)
    if cfg is None:
        return OK
    from megatron_scratch.train.bench import bench

    print(bench(cfg))
    return OK


def doctor(words: list[str]) -> int:
    if words:
        raise UserError(f"doctor takes no arguments, got {words[0]!r}; it looks at the machine, not at a config")
    from megatron_scratch.train.doctor import doctor

    return OK if doctor(lambda line: print(line, flush=True)) else FAILED


def evaluate(words: list[str]) -> int:
    from megatron_scratch.config.compose import parse_args
    from megatron_scratch.config.verbs import EvalArgs

    listed = [re.sub(r"^tasks=([^\[].*)$", r"tasks=[\1]", word) for word in words]  # tasks=hellaswag,arc_easy is meant as a list
    args = parse_args(EvalArgs, listed, positional="run")
    args.check()
    if args.tasks is not None:
        from megatron_scratch.train.harness import run_tasks

        for line in run_tasks(args):
            print(line, flush=True)
        return OK
    from megatron_scratch.train.inference import evaluate_run

    print(evaluate_run(args))
    return OK


def generate(words: list[str]) -> int:
    from megatron_scratch.config.compose import parse_args
    from megatron_scratch.config.verbs import GenerateArgs

    args = parse_args(GenerateArgs, words, positional="run")
    args.check()
    from megatron_scratch.train.inference import generate_text

    for piece in generate_text(args):
        print(piece, end="", flush=True)
    print()
    return OK
