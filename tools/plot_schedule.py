"""Pipeline schedules on a simulated clock, as a picture or as the table of benchmarks/schedules.md.

python tools/plot_schedule.py [schedule=NAME] [pp=4] [microbatches=8] [virtual_stages=2] [out=FILE]; or table=true
Without schedule= all below each other.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Optional

from megatron_scratch.config.compose import parse_args
from megatron_scratch.plan.bubble import FORMULAS
from megatron_scratch.plan.picture import HEAD, draw, row
from megatron_scratch.registry import get
from megatron_scratch.util.errors import UserError
from megatron_scratch.util.exits import exit_code


@dataclass
class Options:
    schedule: Optional[str] = None
    pp: int = 4
    microbatches: int = 8
    virtual_stages: Optional[int] = None  # None: as many as the schedule has by default
    out: Optional[str] = None  # None: NAME.png, or docs/schedules.png
    table: bool = False


def main(words: list[str]) -> int:
    args: Options = parse_args(Options, words, positional="schedule")
    if args.table:
        if args != Options(table=True):
            raise UserError(f"table=true is the whole table; leave out {', '.join(w for w in words if w != 'table=true')}")
        print(HEAD)
        for schedule, v, p, m in product(FORMULAS, (1, 2, 4), (2, 4, 8), (4, 8, 16, 32)):
            with suppress(UserError):  # it does not run
                print(row(schedule, p, v, m))
        return 0
    facts: dict[str, Any] = {name: get("pipeline", name) for name in ([args.schedule] if args.schedule else FORMULAS)}
    asked = args.virtual_stages  # taken by the one schedule that is named, else by those that have a choice
    chosen = [(n, asked if asked and (args.schedule or f.virtual[1] is None) else f.default) for n, f in facts.items()]
    out = args.out or (f"{args.schedule}.png" if args.schedule else "docs/schedules.png")
    print(draw(Path(out), chosen, args.pp, args.microbatches))
    return 0


if __name__ == "__main__":
    raise SystemExit(exit_code(lambda: main(sys.argv[1:])))
