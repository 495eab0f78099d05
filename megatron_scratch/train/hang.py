"""Who holds up a run that stands still: a judgement of all ranks' last signs of life.

A rank waits for others, or it does not. Of those that stand still, the ones that do not wait are what the others wait for. Where
all wait, they wait for each other: the numbers of their collectives say who has not arrived in which.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_scratch.train.activity import state_of
from megatron_scratch.train.heartbeat import Beat, Group

SHOWN = 8  # ranks that are described one by one

STATES = {"": "its process is gone", "Z": "its process has ended", "T": "its process is stopped by a signal",
          "t": "a debugger holds its process"}  # fmt: skip
RUNS = "its process runs, but holds Python's lock, or its disk hangs"

Beats = Sequence[Beat | None]  # by rank; None: no record


@dataclass(frozen=True)
class Hang:
    """The message of one line, and the ranks that it is about."""

    message: str
    ranks: list[int]
    silent: list[int]  # of all ranks, those that have shown no sign of life: they will not speak


def judge(before: Beats, after: Beats, now: float, limit: float, slack: float, host: str) -> Hang | None:
    """None: it is no hang: somebody works for whom the others wait.

    Args:
        before, after: two looks at the records, some beats apart: a rank whose clock is wrong is not silent if it beats.
        now: time of the second one. limit: seconds without progress that make a hang. slack: by which ranks notice it apart.
        host: where this is judged: processes there can be looked at.
    """
    silent = [r for r in range(len(after)) if _silent(before[r], after[r], now, limit)]
    heard = [beat for r, beat in enumerate(after) if beat is not None and r not in silent]
    waiting = [beat for beat in heard if beat.waits]
    working = [beat for beat in heard if not beat.waits]
    stuck = [beat.rank for beat in working if beat.idle >= limit - slack]
    if silent or stuck:
        names = [_silence(rank, after[rank], host) for rank in silent] + [_place(beat) for beat in working if beat.rank in stuck]
        return Hang(f"{_shown(names)}{_others(waiting)}", sorted(silent + stuck), silent)
    if working or any(beat.idle < limit - slack for beat in waiting):
        return None
    return _deadlock(waiting)


def _silent(before: Beat | None, after: Beat | None, now: float, limit: float) -> bool:
    if after is None:
        return True
    return before is not None and before.count == after.count and now - after.time > limit / 2


def _silence(rank: int, beat: Beat | None, host: str) -> str:
    if beat is None:
        return f"rank {rank} has never given a sign of life: its process or its host does not run"
    since = time.strftime("%H:%M:%S", time.localtime(beat.time))
    what = STATES.get(state_of(beat.pid), RUNS) if beat.host == host else "its process or its host does not run"
    seen = f"it was last seen in {beat.phase} after step {beat.step}"
    return f"rank {rank} on {beat.host} gives no sign of life since {since}: {what}; {seen}"


def _place(beat: Beat) -> str:
    return f"rank {beat.rank} on {beat.host} stands still in {beat.phase} after step {beat.step}, at {beat.at}"


def _shown(names: list[str]) -> str:
    more = len(names) - SHOWN
    return "; ".join(names[:SHOWN]) + (f"; and {more} more ranks" if more > 0 else "")


def _others(waiting: list[Beat]) -> str:
    if not waiting:
        return ""
    found = Counter(_waits_in(beat) for beat in waiting).most_common(3)
    return "; for it wait: " + ", ".join(f"{_ranks(n)} {where}" for where, n in found)


def _ranks(count: int) -> str:
    return f"{count} rank{'s' * (count > 1)}"


def _waits_in(beat: Beat) -> str:
    found = [f"{group.op} {group.open} of {group.axis}" for group in beat.groups.values() if group.open]
    return f"in {' and '.join(found) or beat.at} (after step {beat.step})"


def _deadlock(waiting: list[Beat]) -> Hang:
    """All wait, in collectives or messages between two."""
    at: dict[tuple[str, int], list[Beat]] = defaultdict(list)
    for beat in waiting:
        for name, group in beat.groups.items():
            if group.open:
                at[name, group.open].append(beat)
    absent = {key: [b for b in waiting if key[0] in b.groups and b.groups[key[0]].begun < key[1]] for key in at}
    late = sorted({beat.rank for beats in absent.values() for beat in beats})
    if not late:
        where = Counter(_waits_in(beat) for beat in waiting).most_common(3)
        return Hang("all ranks have arrived, and wait " + ", ".join(f"{place}: {_ranks(n)}" for place, n in where)
                    + "; a message does not get through: look at the network between their hosts", [], [])  # fmt: skip
    said = [
        f"{_listed(absent[key])} {'has' if len(absent[key]) == 1 else 'have'} not arrived in {_named(key, beats)}, where "
        f"{_listed(beats)} wait{'s' * (len(beats) == 1)}"
        for key, beats in at.items()
        if absent[key]
    ]
    return Hang("ranks wait for each other: " + _shown(said), late, [])


def _named(key: tuple[str, int], beats: list[Beat]) -> str:
    group: Group = beats[0].groups[key[0]]
    return f"{group.op} {group.open} of {group.axis}"


def _listed(beats: Iterable[Beat]) -> str:
    names = [f"rank {beat.rank} on {beat.host}" for beat in beats]
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
