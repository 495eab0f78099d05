"""`megatron-scratch VERB ...`: verbs to functions. Nothing here imports torch: a wrong word is answered at once."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from megatron_scratch import __version__
from megatron_scratch.util.errors import UserError, nearest
from megatron_scratch.util.exits import FAILED, OK, exit_code, leave_with

if TYPE_CHECKING:
    from megatron_scratch.config import Config

USAGE = """megatron-scratch VERB [key=value ...]

  data prepare   raw text to an indexed dataset        corpus.input=PATHS corpus.output=DIR
  data inspect   what is in a dataset                  DIR [document=N]
  train          pretrain, or go on where it stopped   data.dir=DIR [any config key]
  eval           loss, perplexity, bits per byte       RUN [data=DIR]
  generate       text from a trained model             RUN [prompt=TEXT] [max_new_tokens=N] [temperature=T]
  parity         the same numbers under this layout?   [any config key]
  ckpt ls        which checkpoints there are           RUN|URL [verify=true] [json=true]
  ckpt inspect   what is in a checkpoint, in a tensor  RUN|CKPT|URL [tensor=NAME]
  ckpt verify    is every file as it was written?      RUN|CKPT|URL
  ckpt diff      what two checkpoints differ in        A B [tolerance=1e-6]
  ckpt export-hf a checkpoint for transformers, vLLM   RUN OUT [step=N] [dtype=bfloat16] [shard_gb=5] [tokenizer=false]
  ckpt import-hf a run from a folder of transformers   SRC OUT [dtype=bfloat16] [fused_qkv=false]
  bench          tokens/s and MFU of a training step   [any config key]
  doctor         this machine: what is here, is it right?

  train, parity, bench and data prepare take --print (show the config and stop) and --config-dir DIR (your own YAML groups).
  `python -m megatron_scratch` is the same. Exit codes: 0 finished, 2 bad input, 75 stopped with a checkpoint, 1 failed."""

LATER = ("plan", "report")


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    return exit_code(lambda: _dispatch(words))


def entry() -> NoReturn:
    """The command `megatron-scratch`."""
    leave_with(main)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE)
        return OK
    if words[0] == "--version":
        print(__version__)
        return OK
    verb, rest = words[0], words[1:]
    if verb in ("data", "ckpt"):
        verb, rest = " ".join(words[:2]), words[2:]
    if verb in LATER or verb in ("data clean", "data dedup", "data tokenizer", "data tokenize"):
        raise UserError(f"{verb!r} is not in this version; `megatron-scratch --help` lists what is")
    if verb not in VERBS:
        raise UserError(f"{verb!r} is not a verb; allowed: {', '.join(VERBS)}{nearest(verb, VERBS)}")
    if any(word in ("-h", "--help") for word in rest):
        print(USAGE)
        return OK
    return VERBS[verb](rest)


def _options(words: list[str]) -> tuple[list[str], list[str], bool]:
    """Split words into (overrides, --config-dir folders, whether --print was given)."""
    overrides, folders, show = [], [], False
    rest = iter(words)
    for word in rest:
        if word == "--print":
            show = True
        elif word == "--config-dir" or word.startswith("--config-dir="):
            folders.append(word.partition("=")[2] or next(rest, ""))
        elif word in ("-m", "--multirun"):
            raise UserError("-m (sweeps) is not in this version; run each point with its own name=")
        elif word.startswith("-"):
            raise UserError(f"{word} is not an option; allowed: --print, --config-dir DIR")
        else:
            overrides.append(word)
    return overrides, folders, show


def _composed(words: list[str]) -> Config | None:
    """The config of a verb, or None when it was only to be shown."""
    from omegaconf import OmegaConf

    from megatron_scratch.config import compose

    overrides, folders, show = _options(words)
    cfg = compose.load(overrides, folders)
    if show:
        print(OmegaConf.to_yaml(OmegaConf.structured(cfg)), end="")
        return None
    return cfg


def _train(words: list[str]) -> int:
    cfg = _composed(words)
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


def _data_prepare(words: list[str]) -> int:
    cfg = _composed(words)
    if cfg is None:
        return OK
    from megatron_scratch.corpus.pipeline import prepare

    prepare(cfg.corpus, progress=lambda text: print(text, flush=True))
    return OK


def _data_inspect(words: list[str]) -> int:
    from megatron_scratch.config.compose import parse_args
    from megatron_scratch.config.verbs import InspectArgs
    from megatron_scratch.corpus.report import inspect

    args = parse_args(InspectArgs, words, positional="data")
    if not args.data:
        raise UserError("give the dataset: `megatron-scratch data inspect DIR [document=N]`")
    print(inspect(args.data, args.document, args.sample, args.seq_len, args.seed))
    return OK


def _eval(words: list[str]) -> int:
    from megatron_scratch.config.compose import parse_args
    from megatron_scratch.config.verbs import EvalArgs

    args = parse_args(EvalArgs, words, positional="run")
    if not args.run:
        raise UserError("give the run: `megatron-scratch eval RUN [data=DIR]`")
    from megatron_scratch.train.inference import evaluate_run

    print(evaluate_run(args))
    return OK


def _generate(words: list[str]) -> int:
    from megatron_scratch.config.compose import parse_args
    from megatron_scratch.config.verbs import GenerateArgs

    args = parse_args(GenerateArgs, words, positional="run")
    args.check()
    from megatron_scratch.train.inference import generate_text

    for piece in generate_text(args):
        print(piece, end="", flush=True)
    print()
    return OK


def _bench(words: list[str]) -> int:
    cfg = _composed(words)
    if cfg is None:
        return OK
    from megatron_scratch.train.bench import bench

    print(bench(cfg))
    return OK


def _doctor(words: list[str]) -> int:
    if words:
        raise UserError(f"doctor takes no arguments, got {words[0]!r}; it looks at the machine, not at a config")
    from megatron_scratch.train.doctor import doctor

    return OK if doctor(lambda line: print(line, flush=True)) else FAILED


def _ckpt_ls(words: list[str]) -> int:
    from megatron_scratch.config.compose import parse_args
    from megatron_scratch.config.verbs import CkptLsArgs

    args = parse_args(CkptLsArgs, _named(words, "run"), positional="run")
    args.check()
    from megatron_scratch.checkpoint.inspect import ls, ls_table

    rows = ls(args.run, args.verify)
    for line in (json.dumps(row) for row in rows) if args.json else ls_table(rows):
        print(line)
    return OK


def _ckpt_inspect(words: list[str]) -> int:
    from megatron_scratch.config.compose import parse_args
    from megatron_scratch.config.verbs import CkptInspectArgs

    args = parse_args(CkptInspectArgs, _named(words, "run"), positional="run")
    args.check()
    from megatron_scratch.checkpoint.inspect import inspect

    print("\n".join(inspect(args.run, args.tensor)))
    return OK


def _ckpt_verify(words: list[str]) -> int:
    from megatron_scratch.config.compose import parse_args
    from megatron_scratch.config.verbs import CkptVerifyArgs

    args = parse_args(CkptVerifyArgs, _named(words, "run"), positional="run")
    args.check()
    from megatron_scratch.checkpoint.inspect import verify

    terminal = sys.stderr.isatty()
    try:
        verify(args.run, print, lambda line: print(f"\r\x1b[K{line}", end="", file=sys.stderr) if terminal else None)
    finally:
        print("\r\x1b[K" if terminal else "", end="", file=sys.stderr)
    return OK


def _ckpt_diff(words: list[str]) -> int:
    from megatron_scratch.config.compose import parse_args
    from megatron_scratch.config.verbs import CkptDiffArgs

    args = parse_args(CkptDiffArgs, _named(words, "a", "b"), positional="b")
    args.check()
    from megatron_scratch.checkpoint.diff import diff

    lines, equal = diff(args.a, args.b, args.tolerance)
    print("\n".join(lines))
    return OK if equal else FAILED


def _ckpt_export_hf(words: list[str]) -> int:
    from megatron_scratch.config.compose import parse_args
    from megatron_scratch.config.verbs import ExportArgs

    args = parse_args(ExportArgs, _named(words, "run", "out"), positional="out")
    args.check()
    from megatron_scratch.train.hf.export import export

    export(args, lambda line: print(line, flush=True))
    return OK


def _ckpt_import_hf(words: list[str]) -> int:
    from megatron_scratch.config.compose import parse_args
    from megatron_scratch.config.verbs import ImportArgs

    args = parse_args(ImportArgs, _named(words, "src", "out"), positional="out")
    args.check()
    from megatron_scratch.train.hf.importing import import_hf

    import_hf(args, lambda line: print(line, flush=True))
    return OK


def _named(words: list[str], *names: str) -> list[str]:
    """Bare words in their order as `name=word`."""
    bare = [word for word in words if "=" not in word]
    if len(bare) > len(names):
        allowed = " ".join(name.upper() for name in names)
        raise UserError(f"{bare[len(names)]!r} is one word too many; allowed: {allowed} and key=value words")
    return [f"{name}={word}" for name, word in zip(names, bare, strict=False)] + [word for word in words if "=" in word]


def _parity(words: list[str]) -> int:
    cfg = _composed(words)
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


VERBS: dict[str, Callable[[list[str]], int]] = {
    "data prepare": _data_prepare, "data inspect": _data_inspect, "train": _train, "eval": _eval, "generate": _generate,
    "parity": _parity, "bench": _bench, "doctor": _doctor,
    "ckpt ls": _ckpt_ls, "ckpt inspect": _ckpt_inspect, "ckpt verify": _ckpt_verify, "ckpt diff": _ckpt_diff,
    "ckpt export-hf": _ckpt_export_hf, "ckpt import-hf": _ckpt_import_hf,
}  # fmt: skip
