"""What pages list of a run: its events, its texts, its settings."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from megatron_scratch.report.run import Run, when
from megatron_scratch.util.page import flat

EVENTS = 1000  # that a page lists
TEXT = 400  # characters of an event
SAID = ("time", "event", "step", "reason",  # columns of their own
        "path", "hosts", "versions", "commit", "parameters", "flops_per_token", "seq_len", "device")  # fmt: skip
"""What an event's text leaves out: it stands elsewhere on the page."""
SAMPLES, SAMPLE_TEXT = 120, 4000  # texts, and characters of each
KEYS, VALUE = 3000, 300  # keys of a config, characters of a value


def events(run: Run, at: Callable[[np.ndarray], dict[str, list[float]]]) -> list[dict[str, Any]]:
    """The newest events: {"event", "when", "step", "about": the step is a guess by time, "text"} and, as `at` tells, x axes."""
    seen, rows = run.events[-EVENTS:], [(row["time"], row["step"]) for row in run.rows if "time" in row]
    times = np.array([t for t, _ in rows])
    out, before = [], 0
    for event in seen:
        step = event.get("step")
        about = step is None
        if about:
            place = int(np.searchsorted(times, event["time"])) if len(rows) and event["time"] is not None else -1
            step = rows[place - 1][1] if place > 0 else 0 if place == 0 else before
        before = step
        out.append({"event": event["event"][:60], "when": when(event["time"]), "step": step, "about": about, "text": _said(event)})
    for name, values in at(np.array([e["step"] for e in out], float)).items() if out else ():
        for event, value in zip(out, values, strict=True):
            event.setdefault("x", {})[name] = value
    return out


def _said(event: dict[str, Any]) -> str:
    """The reason, and all else that an event tells."""
    told = {key: value for key, value in event.items() if key not in SAID and value not in ("", [], None)}
    rest = ", ".join(f"{key} {_value(value)}" for key, value in told.items())
    reason = str(event.get("reason") or "")
    return f"{reason}{'; ' if reason and rest else ''}{rest}"[:TEXT]


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    try:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError, TypeError):  # a tree that holds itself
        return "…"


def samples(run: Run) -> dict[str, Any]:
    """{"shown": texts of the newest, and of steps evenly before them, "whole": how many there are}."""
    steps = list(dict.fromkeys(row["step"] for row in run.samples))
    each = max(1, len(run.samples) // max(1, len(steps)))
    kept = (
        {steps[i] for i in np.linspace(0, len(steps) - 1, min(len(steps), max(1, SAMPLES // each))).astype(int)} if steps else set()
    )
    shown = [
        row | {"prompt": row["prompt"][:SAMPLE_TEXT], "text": row["text"][:SAMPLE_TEXT]}
        for row in run.samples
        if row["step"] in kept
    ]
    return {"shown": shown[-SAMPLES:], "whole": len(run.samples)}


def settings(run: Run) -> dict[str, str]:
    """The config as key -> value, in words."""
    out: dict[str, str] = {}
    for key, value in _limited(flat(run.config)):
        out[str(key)[:VALUE]] = _value(value)[:VALUE] if not isinstance(value, bool) else str(value).lower()
    return out


def _limited(pairs: Iterable[tuple[str, Any]]) -> Iterable[tuple[str, Any]]:
    """A file of few lines can name a tree without end."""
    try:
        for _, pair in zip(range(KEYS), pairs, strict=False):
            yield pair
    except RecursionError:
        return


def differences(configs: list[dict[str, str]]) -> list[tuple[str, list[str]]]:
    """Keys whose values are not the same in all runs, without those that name a run."""
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = [(key, [config.get(key, "–") for config in configs]) for key in keys if key not in ("name", "dir")]
    return [(key, values) for key, values in rows if len(set(values)) > 1]
