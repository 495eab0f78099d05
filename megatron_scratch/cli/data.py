"""`megatron-scratch data ...`."""

from __future__ import annotations

from megatron_scratch.cli.words import composed
from megatron_scratch.util.errors import UserError
from megatron_scratch.util.exits import OK


def prepare(words: list[str]) -> int:
    cfg = composed(words)
    if cfg is None:
        return OK
    from megatron_scratch.corpus.pipeline import prepare

    prepare(cfg.corpus, progress=lambda text: print(text, flush=True))
    return OK


def inspect(words: list[str]) -> int:
    from megatron_scratch.config.compose import parse_args
    from megatron_scratch.config.verbs import InspectArgs
    from megatron_scratch.corpus.report import inspect

    args = parse_args(InspectArgs, words, positional="data")
    if not args.data:
        raise UserError("give the dataset: `megatron-scratch data inspect DIR [document=N]`")
    print(inspect(args.data, args.document, args.sample, args.seq_len, args.seed))
    return OK
