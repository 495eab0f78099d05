"""`megatron-scratch data ...`."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

from megatron_scratch.cli.progress import Progress
from megatron_scratch.cli.steps import print_steps
from megatron_scratch.cli.words import composed, named
from megatron_scratch.util.errors import RunFailed, StopRequested, UserError
from megatron_scratch.util.exits import OK
from megatron_scratch.util.signals import handled


def prepare(words: list[str]) -> int:
    return _write("prepare", words)


def clean(words: list[str]) -> int:
    return _write("clean", words)


def dedup(words: list[str]) -> int:
    return _write("dedup", words)


def tokenizer(words: list[str]) -> int:
    return _write("tokenizer", words)


def tokenize(words: list[str]) -> int:
    """Nothing is deduplicated unless a word says so."""
    asked = any(_key(word) == "corpus.dedup" for word in words)
    return _write("tokenize", words if asked else ["corpus.dedup=none", *words])


def _write(verb: str, words: list[str]) -> int:
    """What the verbs that write a folder have in common."""
    cfg = composed(words)
    if cfg is None:
        return OK
    from megatron_scratch.corpus import verbs
    from megatron_scratch.corpus.report_page import read_report

    _refuse_unread(verb, words, verbs.UNREAD[verb], str(cfg.corpus.tokenizer))
    progress = Progress(sys.stdout)
    try:
        with handled(_stop):
            manifest = getattr(verbs, verb)(cfg.corpus, progress=progress, plugins=cfg.plugins, launcher=cfg.launcher)
    except KeyboardInterrupt as asked:
        raise StopRequested(f"{asked}; what is finished is kept, the same command goes on where this one stopped") from None
    except BrokenPipeError:  # `... | head`
        raise
    except OSError as error:
        raise RunFailed(f"{type(error).__name__}: {error}; what is finished is kept, the same command goes on") from error
    finally:
        progress.close()
    if verb == "tokenizer":
        print("\n".join(_facts(manifest["tokenizer"])))
    if report := read_report(Path(cfg.corpus.output) / "report.html"):
        print_steps(report, sys.stdout)
        print(f"the whole report: {Path(cfg.corpus.output) / 'report.html'}")
    return OK


def _key(word: str) -> str:
    return word.lstrip("+~").partition("=")[0]


def _refuse_unread(verb: str, words: list[str], unread: tuple[str, ...], tokenizer: str) -> None:
    """A word that cannot take effect is a mistake. A config file serves all verbs: it may say more."""
    for word in words:
        section, _, name = _key(word).partition(".")
        name = name.partition(".")[0]
        if section == "corpus" and name in unread and word not in ("corpus.dedup=none", "corpus.dedup=false"):
            raise UserError(f"{word!r} has no effect: data {verb} does not read corpus.{name}; leave it out, or run data prepare")
        if section == "corpus" and name in ("vocab_size", "tokenizer_bytes") and tokenizer.endswith((".model", ".json")):
            raise UserError(f"{word!r} has no effect: it is for a tokenizer to train, and corpus.tokenizer={tokenizer} is given; "
                            "leave it out")  # fmt: skip


def _facts(told: dict[str, Any], prefix: str = "") -> list[str]:
    """A line for each number and word."""
    lines = []
    for name, value in told.items():
        label = f"{prefix}{name.replace('_', ' ')}"
        if isinstance(value, dict):
            lines += _facts(value, f"{label}, ")
        else:
            lines.append(f"{label}: {value:.4g}" if isinstance(value, float) else f"{label}: {value}")
    return lines


def _stop(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt(signal.Signals(number).name)  # no `except Exception` on the way takes it for its own


def inspect(words: list[str]) -> int:
    from megatron_scratch.config.compose import parse_args
    from megatron_scratch.config.verbs import InspectArgs

    args = parse_args(InspectArgs, named(words, "data"), positional="data")
    args.check()
    from megatron_scratch.corpus.view import inspect

    print(inspect(args.data, args.document, args.sample, args.seq_len, args.seed, args.order, args.megatron_samples,
                  args.megatron_split))  # fmt: skip
    return OK


def verify(words: list[str]) -> int:
    from megatron_scratch.config.compose import parse_args
    from megatron_scratch.config.verbs import VerifyArgs

    args = parse_args(VerifyArgs, named(words, "data"), positional="data")
    args.check()
    from megatron_scratch.corpus.verify import verify

    terminal = sys.stderr.isatty()
    try:
        wrong = verify(args.data, print, lambda line: print(f"\r\x1b[K{line}", end="", file=sys.stderr) if terminal else None)
    finally:
        print("\r\x1b[K" if terminal else "", end="", file=sys.stderr)
    if wrong:
        raise RunFailed(f"{args.data} is not as it was written ({len(wrong)} differences); copy it again, or prepare it again")
    return OK
