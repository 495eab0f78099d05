"""Where the time of a run went, from its first start to its last sign of life.

computing         step time of the rows that are left, less the wait for data        measured
waiting for data  of these steps                                                     measured, where the version tells it
saving            seconds that training stood still for checkpoints                  measured
evaluating        from the row of a step to the row of its evaluation                estimated: times of rows
starting          from a start to its first row, less the steps between              estimated: times of rows
lost in rewinds   steps that were computed and thrown away                           measured, where the version tells it
down              from the last sign of life to the next start, less what was lost   estimated: nobody writes while nothing runs
other             what is left
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_scratch.report.run import Run

SIGNS = ("save", "retired", "spike", "skip", "rollback", "straggler", "stop", "finish", "failed", "hang", "uploaded")
"""Events of a run that is alive. Others are written by what starts it, or before the first step."""
MEASURED = ("computing", "waiting for data", "saving", "lost in rewinds")


@dataclass
class Attempt:
    """One start of the run: when it began, its last sign of life, its rows that are left."""

    began: float
    ended: float
    step: int
    rows: list[dict[str, Any]]


def spent(run: Run) -> dict[str, Any]:
    """{"parts": [{"name", "seconds", "measured"}], "total", "starts", "goodput": computing / total or None}."""
    attempts = _attempts(run)
    gaps = [max(0.0, b.began - a.ended) for a, b in zip(attempts, attempts[1:], strict=False)]
    rewinds = [place for place, event in enumerate(run.events) if event["event"] == "rewind"]
    lost = sum(_seconds(run.events[place]) for place in rewinds)
    in_gaps = sum(_seconds(run.events[place]) for place in rewinds if _of_a_resume(run, place))
    data, steps = _of_rows(run, "data_seconds"), _of_rows(run, "step_seconds")
    parts = {"computing": steps - data, "waiting for data": data, "saving": _saving(run),
             "evaluating and sampling": _evaluating(run), "starting": sum(map(_starting, attempts)), "lost in rewinds": lost,
             "down": max(0.0, sum(gaps) - in_gaps)}  # fmt: skip
    known = sum(parts.values())
    total = max(attempts[-1].ended - attempts[0].began, known) if attempts else known
    parts["other"] = total - known
    told = [{"name": name, "seconds": seconds, "measured": name in MEASURED} for name, seconds in parts.items() if seconds > 0]
    return {"parts": told, "total": total, "starts": len(attempts), "rewinds_told": bool(rewinds) or len(attempts) < 2,
            "goodput": parts["computing"] / total if total and attempts else None}  # fmt: skip


def _attempts(run: Run) -> list[Attempt]:
    starts = sorted((e["time"], e.get("step") or 0) for e in run.events if e["event"] == "start" and e["time"] is not None)
    timed = [row["time"] for row in [*run.rows, *run.evals, *run.samples] if row.get("time") is not None]
    signs = sorted(timed + [e["time"] for e in run.events if e["event"] in SIGNS and e["time"] is not None])
    if not starts and signs:
        starts = [(signs[0], 0)]
    ends = [*(start for start, _ in starts[1:]), float("inf")][: len(starts)]
    attempts = []
    for (began, step), end in zip(starts, ends, strict=True):
        ended = max((sign for sign in signs if began <= sign < end), default=began)
        attempts.append(Attempt(began, ended, step, [r for r in run.rows if "time" in r and began <= r["time"] < end]))
    return attempts


def _of_a_resume(run: Run, place: int) -> bool:
    """Whether the rewind at a place of the ledger threw away steps of a start that had ended. A rollback's stands before it."""
    return place + 1 == len(run.events) or run.events[place + 1]["event"] != "rollback"


def _seconds(event: dict[str, Any]) -> float:
    value = event.get("seconds")
    return float(value) if isinstance(value, (int, float)) and 0 <= value < 1e12 else 0.0


def _of_rows(run: Run, key: str) -> float:
    total, before = 0.0, 0
    for row in run.rows:
        total += max(0.0, row.get(key, 0.0)) * (row["step"] - before)
        before = row["step"]
    return total


def _saving(run: Run) -> float:
    saves = [event for event in run.events if event["event"] == "save"]
    told = sum(_seconds({"seconds": event.get("blocked", event.get("seconds"))}) for event in saves)
    return told or _of_rows(run, "checkpoint_seconds")


def _evaluating(run: Run) -> float:
    """A row is written, then its step's evaluation and samples; without such a row, the steps in between are taken off."""
    rows, late = [row for row in run.rows if "time" in row], {}
    for found in [*run.evals, *run.samples]:
        if found.get("time") is not None:
            late[found["step"]] = max(found["time"], late.get(found["step"], 0.0))
    total, place = 0.0, 0
    for step, ended in sorted(late.items()):
        while place < len(rows) and rows[place]["step"] <= step:
            place += 1
        if place:
            before = rows[place - 1]
            steps = (step - before["step"]) * (rows[place] if place < len(rows) else before).get("step_seconds", 0.0)
            total += max(0.0, ended - before["time"] - steps)
    return total


def _starting(attempt: Attempt) -> float:
    if not attempt.rows:
        return 0.0
    first = attempt.rows[0]
    return max(0.0, first["time"] - attempt.began - first.get("step_seconds", 0.0) * max(0, first["step"] - attempt.step))
