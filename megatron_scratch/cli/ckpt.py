"""`megatron-scratch ckpt ...`: what there is, is it whole, to and from Hugging Face."""

from __future__ import annotations

import json
import sys

from megatron_scratch.cli.words import named
from megatron_scratch.util.exits import FAILED, OK


def ls(words: list[str]) -> int:
    from megatron_scratch.config.compose import parse_args
    from megatron_scratch.config.verbs import CkptLsArgs

    args = parse_args(CkptLsArgs, named(words, "run"), positional="run")
    args.check()
    from megatron_scratch.checkpoint.inspect import ls, ls_table

    rows = ls(args.run, args.verify)
    for line in (json.dumps(row) for row in rows) if args.json else ls_table(rows):
        print(line)
    return OK


def inspect(words: list[str]) -> int:
    from megatron_scratch.config.compose import parse_args
    from megatron_scratch.config.verbs import CkptInspectArgs

    args = parse_args(CkptInspectArgs, named(words, "run"), positional="run")
    args.check()
    from megatron_scratch.checkpoint.inspect import inspect

    print("\n".join(inspect(args.run, args.tensor)))
    return OK


def verify(words: list[str]) -> int:
    from megatron_scratch.config.compose import parse_args
    from megatron_scratch.config.verbs import CkptVerifyArgs

    args = parse_args(CkptVerifyArgs, named(words, "run"), positional="run")
    args.check()
    from megatron_scratch.checkpoint.inspect import verify

    terminal = sys.stderr.isatty()
    try:
        verify(args.run, print, lambda line: print(f"\r\x1b[K{line}", end="", file=sys.stderr) if terminal else None)
    finally:
        print("\r\x1b[K" if terminal else "", end="", file=sys.stderr)
    return OK


def diff(words: list[str]) -> int:
    from megatron_scratch.config.compose import parse_args
    from megatron_scratch.config.verbs import CkptDiffArgs

    args = parse_args(CkptDiffArgs, named(words, "a", "b"), positional="b")
    args.check()
    from megatron_scratch.checkpoint.diff import diff

    lines, equal = diff(args.a, args.b, args.tolerance)
    print("\n".join(lines))
    return OK if equal else FAILED


def export_hf(words: list[str]) -> int:
    from megatron_scratch.config.compose import parse_args
    from megatron_scratch.config.verbs import ExportArgs

    args = parse_args(ExportArgs, named(words, "run", "out"), positional="out")
    args.check()
    from megatron_scratch.train.hf.export import export

    export(args, lambda line: print(line, flush=True))
    return OK


def import_hf(words: list[str]) -> int:
    from megatron_scratch.config.compose import parse_args
    from megatron_scratch.config.verbs import ImportArgs

    args = parse_args(ImportArgs, named(words, "src", "out"), positional="out")
    args.check()
    from megatron_scratch.train.hf.importing import import_hf

    import_hf(args, lambda line: print(line, flush=True))
    return OK
