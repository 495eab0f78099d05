"""What work costs. It goes beside the results, never into them: they are the same bytes however long they took."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

CLOCK = "clock.jsonl"


@contextmanager
def measured() -> Iterator[list[float]]:
    """[when the block began in seconds since 1970, wall seconds, CPU seconds of this process's threads]; whole when it ends."""
    spent = [time.time(), 0.0, 0.0]
    wall, cpu = time.perf_counter(), time.process_time()
    yield spent
    spent[1:] = time.perf_counter() - wall, time.process_time() - cpu


@contextmanager
def clocked(work: Path, name: str) -> Iterator[None]:
    """Note in `work` what a block outside of the stages cost."""
    with measured() as spent:
        yield
    with open(work / CLOCK, "a") as f:
        f.write(json.dumps([name, *spent]) + "\n")


def noted(work: Path) -> dict[str, list[list[float]]]:
    """What `clocked` noted, by name."""
    found: dict[str, list[list[float]]] = {}
    if (work / CLOCK).is_file():
        for line in (work / CLOCK).read_text().splitlines():
            name, *spent = json.loads(line)
            found.setdefault(name, []).append(spent)
    return found


def wall(spent: Iterable[list[float]]) -> float:
    """Seconds in which at least one of these ran: tasks beside each other count once, the pause before a restart does not count."""
    total, until = 0.0, 0.0
    for began, seconds, _ in sorted(spent):
        total += max(0.0, began + seconds - max(began, until))
        until = max(until, began + seconds)
    return total
