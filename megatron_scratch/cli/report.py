"""`report`: what runs came to."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from megatron_scratch.util.errors import UserError
from megatron_scratch.util.exits import OK

USAGE = "megatron-scratch report --sweep DIR [json=true]"


@dataclass
class ReportArgs:
    """`report --sweep DIR`: a table of a sweep's points."""

    sweep: str = ""  # its folder
    json: bool = False  # a line of JSON for each point instead of a table


def report(words: list[str]) -> int:
    from megatron_scratch.config.compose import parse_args

    plain = []
    rest = iter(words)
    for word in rest:
        plain.append(
            f"sweep={next(rest, '')}" if word == "--sweep" else word.removeprefix("--") if word.startswith("--sweep=") else word
        )
    other = [word for word in plain if "=" not in word or word.startswith("-")]
    if other:
        raise UserError(f"report shows sweeps, and {other[0]!r} is none of its words: {USAGE}")
    given = [word for word in plain if word != "sweep="]
    args = parse_args(ReportArgs, given, positional="sweep")
    if not args.sweep:
        raise UserError(f"give the folder of the sweep: {USAGE}")
    from megatron_scratch.launch.sweep.table import lines, report

    rows = report(Path(args.sweep))
    for line in (json.dumps(row) for row in rows) if args.json else lines(Path(args.sweep), rows):
        print(line)
    return OK
