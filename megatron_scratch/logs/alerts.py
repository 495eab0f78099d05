"""Which events of the ledger somebody should be told of, and in what words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

WARN, ERROR = "WARN", "ERROR"  # as Weights & Biases calls them


@dataclass(frozen=True)
class Alert:
    title: str
    text: str
    level: str
    step: int | None  # None: the event has none


# event -> (title, level); what goes wrong and is not mended by itself is an error
TITLES = {
    "spike": ("Loss spike", WARN),
    "skip": ("Step skipped", WARN),
    "rollback": ("Rolled back", WARN),
    "hang": ("Run hangs", ERROR),
    "straggler": ("Slow rank", WARN),
    "requeue": ("Job requeued", WARN),
    "requeued": ("Job requeued", WARN),
    "resubmitted": ("Job resubmitted", WARN),
    "job_failed": ("Job failed, starting again", WARN),
    "bad_node": ("Bad node", WARN),
    "failed": ("Run failed", ERROR),
    "corrupt_checkpoint": ("Corrupt checkpoint", ERROR),
    "upload_failed": ("Checkpoint not uploaded", WARN),
}
SCALE = "loss scale"  # in the reason of a step that fp16 skips in search of one, as it does every few hundred steps
NONFINITE = "not finite"


def alert(event: dict[str, Any]) -> Alert | None:
    """What to say of a row of ledger.jsonl; None: nothing."""
    kind = str(event.get("event"))
    if kind not in TITLES or not _counts(kind, event):
        return None
    title, level = TITLES[kind]
    if kind == "skip" and NONFINITE in str(event.get("reason")):
        title, level = "NaN or infinity: step skipped", ERROR
    step = event.get("step")
    return Alert(title, _text(kind, event), level, step if isinstance(step, int) else None)


def _counts(kind: str, event: dict[str, Any]) -> bool:
    if kind == "straggler":
        return bool(event.get("slow", True))
    return not (kind == "skip" and SCALE in str(event.get("reason")))


def _text(kind: str, event: dict[str, Any]) -> str:
    where = f"step {event['step']}: " if "step" in event else ""
    if kind == "straggler":
        return f"{where}rank {event.get('rank')} on {event.get('host')} takes {event.get('ratio')} x the median's time"
    if kind == "rollback":
        return f"{where}{event.get('reason', '')}; back to step {event.get('to')}"
    said = [str(event[key]) for key in ("reason", "problem") if event.get(key)]
    if kind == "bad_node":
        said.insert(0, str(event.get("node")))
    if kind == "resubmitted":
        said.append(f"job {event.get('as_job')}, without {', '.join(map(str, event.get('without', [])))}")
    if event.get("moved_to"):
        said.append(f"moved to {event['moved_to']}")
    return where + ("; ".join(said) or "see ledger.jsonl")
