"""What a run came to, as few numbers: state, steps, tokens, losses, speed, layout, hosts, versions."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from megatron_scratch.report.curves import began
from megatron_scratch.report.run import Run, number, when

ENDS = {"finish": "finished", "stop": "stopped", "failed": "failed", "hang": "hung"}
FRESH = 600  # seconds: a run whose last sign is younger goes on, as far as its files can tell
LAYOUT = ("tp", "pp", "dp", "cp", "ep")


def facts(run: Run) -> dict[str, Any]:
    """None where the run's version, or its youth, does not tell."""
    start, train = run.newest("start"), run.config.get("train")
    train = train if isinstance(train, dict) else {}
    losses = [row["loss"] for row in run.rows if "loss" in row]
    valid = [row["val_loss"] for row in run.evals if row["val_loss"] is not None]
    last = run.rows[-1] if run.rows else {}
    world, layout = _layout(run, start)
    flops = start.get("flops_per_token")
    flops = [number(n) for n in flops] if isinstance(flops, list) and len(flops) == 2 else [None, None]
    tokens = last.get("tokens")
    hosts = start.get("hosts")
    return {
        "state": _state(run), "last_sign": when(_last_sign(run)), "began": when(began(run)),
        "step": max([row["step"] for row in run.rows + run.evals], default=None),
        "steps": number(start.get("steps", train.get("steps"))),
        "tokens": tokens, "loss": _smooth(losses), "val_loss": valid[-1] if valid else None,
        "best_val_loss": min(valid, default=None), "val_perplexity": _last(run.evals, "val_perplexity"),
        "val_bits_per_byte": _last(run.evals, "val_bits_per_byte"), "sets": _sets(run),
        "tokens_per_second": _median(run, "tokens_per_second"), "mfu": _median(run, "mfu"),
        "memory_gib": max((row["memory_gib"] for row in run.rows if "memory_gib" in row), default=None),
        "parameters": number(start.get("parameters")), "flops_per_token": flops[0],
        "flops": tokens * flops[0] if tokens and flops[0] else None,
        "world": world, "layout": layout, "engine": _text(start.get("engine")), "device": _text(start.get("device")),
        "hosts": [str(h) for h in hosts[:4096]] if isinstance(hosts, list) else [], "commit": _text(start.get("commit")),
        "versions": {str(k): str(v) for k, v in versions.items()} if isinstance(versions := start.get("versions"), dict) else {},
    }  # fmt: skip


def _state(run: Run) -> str:
    """By the newest event that begins or ends it; a killed run has written none."""
    event = run.newest("start", *ENDS)
    if event.get("event") in ENDS:
        return ENDS[event["event"]]
    sign = _last_sign(run)
    return "running" if sign is not None and time.time() - sign < FRESH else "no end recorded"


def _last_sign(run: Run) -> float | None:
    times = [e["time"] for e in run.events[-20:]] + [row.get("time") for row in (run.rows[-1:] + run.evals[-1:])]
    return max((t for t in times if t is not None), default=None)


def _layout(run: Run, start: dict[str, Any]) -> tuple[float | None, dict[str, int]]:
    world = number(start.get("world"))
    degrees = {name: int(n) for name in LAYOUT if (n := number(start.get(name))) and n >= 1}
    if world and "dp" not in degrees and {"tp", "pp"} <= set(degrees):
        degrees["dp"] = max(1, int(world) // (degrees["tp"] * degrees["pp"] * degrees.get("cp", 1)))
    return world, degrees


def _text(value: Any) -> str:
    return value[:200] if isinstance(value, str) else ""


def _smooth(losses: list[float]) -> float | None:
    """Of the last twentieth of all rows, up to 50 of them: one batch is noise."""
    return float(np.mean(losses[-max(1, min(50, len(losses) // 20)) :])) if losses else None


def _median(run: Run, key: str) -> float | None:
    values = [row[key] for row in run.rows if key in row]
    return float(np.median(values)) if values else None


def _last(rows: list[dict[str, Any]], key: str) -> float | None:
    return next((row[key] for row in reversed(rows) if key in row), None)


def _sets(run: Run) -> dict[str, float]:
    """Named validation set -> its newest loss."""
    found: dict[str, float] = {}
    for row in run.evals:
        found |= {key[9:]: value for key, value in row.items() if key.startswith("val_loss/") and value is not None}
    return dict(sorted(found.items())[:40])
