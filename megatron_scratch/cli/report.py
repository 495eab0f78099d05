"""`report`: what runs came to."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from megatron_scratch.util.errors import UserError
from megatron_scratch.util.exits import OK

USAGE = "megatron-scratch report RUN... [out=DIR], or: megatron-scratch report --sweep DIR [json=true]"
KEYS = ("sweep", "json", "out")


@dataclass
class ReportArgs:
    """`report RUN...`: a page; `report --sweep DIR`: a table of a sweep's points."""

    sweep: str = ""  # its folder
    json: bool = False  # of a sweep: a line of JSON for each point instead of a table
    out: str = ""  # of runs: where the page goes; "": RUN/report for one run, ./report for several


def report(words: list[str]) -> int:
    from megatron_scratch.config.compose import parse_args

    plain = []
    rest = iter(words)
    for word in rest:
        plain.append(
            f"sweep={next(rest, '')}" if word == "--sweep" else word.removeprefix("--") if word.startswith("--sweep=") else word
        )
    runs = [word for word in plain if _is_run(word)]
    other = [word for word in runs if word.startswith("-")]
    if other:
        raise UserError(f"{other[0]!r} is none of the words of report: {USAGE}")
    keys = [word for word in plain if word not in runs]
    args = parse_args(ReportArgs, [word for word in keys if word not in ("sweep=", "out=")], positional="sweep")
    _check(args, keys, runs)
    return _pages(runs, args) if runs else _sweep(args)


def _is_run(word: str) -> bool:
    """A folder, also one whose name has a `=` in it, as those of sweeps may."""
    key, equals, _ = word.partition("=")
    return not equals or key not in KEYS and Path(word).is_dir()


def _check(args: ReportArgs, keys: list[str], runs: list[str]) -> None:
    if runs and (args.sweep or "sweep=" in keys):
        raise UserError(f"{runs[0]!r} and --sweep are two reports; give one of them: {USAGE}")
    if runs and any(word.startswith("json=") for word in keys):
        raise UserError(f"json= is of --sweep; the page of {runs[0]!r} holds its numbers as JSON: {USAGE}")
    if not runs and args.out:
        raise UserError(f"out={args.out} is the folder for the page of runs, and none is given: {USAGE}")
    if "out=" in keys:
        raise UserError(f"out= names no folder: {USAGE}")
    if not runs and not args.sweep:
        raise UserError(f"give the folder of a run, or of the sweep: {USAGE}")


def _pages(runs: list[str], args: ReportArgs) -> int:
    from megatron_scratch.report.build import write_report

    made = write_report([Path(run) for run in runs], Path(args.out) if args.out else None)
    print(f"page:     {made[0]}")
    if made[1:]:
        print(f"pictures: {', '.join(path.name for path in made[1:])} beside it")
    return OK


def _sweep(args: ReportArgs) -> int:
    from megatron_scratch.launch.sweep.table import lines, report

    rows = report(Path(args.sweep))
    for line in (json.dumps(row) for row in rows) if args.json else lines(Path(args.sweep), rows):
        print(line)
    return OK
