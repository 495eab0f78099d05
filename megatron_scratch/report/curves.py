"""Curves of a run: against steps, tokens, wall clock and training time, thinned so that a page of 100,000 rows stays small.

Of each piece of a long curve its lowest and its highest point stay, so no spike is lost; what is stacked is averaged instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_scratch.report.run import Run

MOST = 3000  # points of a curve, for all runs of a page together
FEWEST = 300  # of one run
SPLIT = ("data_seconds", "forward_backward_seconds", "optimizer_seconds", "checkpoint_seconds")
SINGLE = ("tokens_per_second", "mfu", "memory_gib", "grad_norm", "lr", "spike_score", "loss_scale")  # a curve each
LAYER_STEPS = 160  # columns of the picture of the layers
LAYER_CELLS = 24_000


class Axes:
    """What lies along the x axis at a step. `names`: which of them this run can tell."""

    def __init__(self, run: Run) -> None:
        rows = [row for row in run.rows if row.get("step_seconds") is not None or row.get("tokens") is not None]
        self.known = {"step": np.array([row["step"] for row in rows], float)}
        self.began = began(run)
        self.known["tokens"] = _column(rows, "tokens")
        self.known["wall"] = _column(rows, "time") - (self.began if self.began is not None else np.nan)
        self.known["train"] = np.cumsum(_column(rows, "step_seconds") * passed(self.known["step"]))
        self.names = ["step", *(name for name in ("tokens", "wall", "train") if self._tells(name))]

    def _tells(self, name: str) -> bool:
        return bool(len(self.known[name])) and not np.isnan(self.known[name]).any()

    def at(self, steps: np.ndarray) -> dict[str, list[float]]:
        """Between logged steps on a straight line; it never turns back, whatever a clock did."""
        out = {"step": [int(s) for s in steps]}
        for name in self.names[1:]:
            known = np.maximum.accumulate(self.known[name])
            first = (0.0, 0.0) if name != "wall" else (self.known["step"][0], known[0])
            at = np.interp(steps, np.r_[first[0], self.known["step"]], np.r_[first[1], known])
            out[name] = [int(v) for v in at] if name == "tokens" else _rounded(at)
        return out


def began(run: Run) -> float | None:
    """When a run started first, in unix seconds."""
    times = [t for t in [*(e["time"] for e in run.events[:1]), *(r.get("time") for r in run.rows[:1])] if t is not None]
    return min(times, default=None)


def passed(steps: np.ndarray) -> np.ndarray:
    """Steps since the row before."""
    return np.diff(steps, prepend=0.0)


def curves(run: Run, axes: Axes, runs: int) -> dict[str, Any]:
    """Chart -> x axes and columns. `whole` says for how many rows they stand, where these are more."""
    most = max(FEWEST, MOST // runs)
    found = {"loss": _thin(run, axes, "loss", most, mean=True), "split": _split(run, axes, most // 4)}
    found |= {key: _thin(run, axes, key, most // 2) for key in SINGLE}
    return {name: curve for name, curve in found.items() if curve}


def _thin(run: Run, axes: Axes, key: str, most: int, mean: bool = False) -> dict[str, Any] | None:
    rows = [row for row in run.rows if row.get(key) is not None]
    if not rows:
        return None
    values = np.array([row[key] for row in rows], float)
    kept = lowest_and_highest(values, most)
    curve: dict[str, Any] = axes.at(np.array([rows[i]["step"] for i in kept], float)) | {key: _rounded(values[kept])}
    if len(kept) < len(rows):
        curve["whole"] = len(rows)
        if mean:  # what a smooth line is drawn from: of lowest and highest alone it would lie wrong
            pieces = np.linspace(0, len(rows), most // 2 + 1).astype(int)
            means = np.add.reduceat(values, pieces[:-1]) / np.diff(pieces)
            curve["mean"] = _rounded(means[np.searchsorted(pieces, kept, side="right").clip(1, len(means)) - 1])
    return curve


def lowest_and_highest(values: np.ndarray, most: int) -> np.ndarray:
    """Places of the lowest and the highest value in each of most / 2 equal pieces, ascending; all where they are few."""
    if len(values) <= most:
        return np.arange(len(values))
    pieces = np.array_split(np.arange(len(values)), most // 2)
    return np.unique([piece[f(values[piece])] for piece in pieces for f in (np.argmin, np.argmax)])


def _split(run: Run, axes: Axes, most: int) -> dict[str, Any] | None:
    """Seconds a step in each part, and what none of them has; means over pieces."""
    rows = [row for row in run.rows if row.get("step_seconds") is not None and any(row.get(key) is not None for key in SPLIT)]
    if not rows:
        return None
    columns = {key: np.nan_to_num(_column(rows, key)) for key in SPLIT}
    total = _column(rows, "step_seconds") + columns["checkpoint_seconds"]
    columns["other_seconds"] = np.maximum(0.0, total - sum(columns.values()))
    steps = _column(rows, "step")
    pieces = np.unique(np.linspace(0, len(rows), min(most, len(rows)) + 1).astype(int))
    curve: dict[str, Any] = axes.at(steps[pieces[1:] - 1])
    weight = np.add.reduceat(passed(steps), pieces[:-1])
    for key, column in columns.items():
        curve[key] = _rounded(np.add.reduceat(column * passed(steps), pieces[:-1]) / np.maximum(weight, 1.0))
    if len(pieces) - 1 < len(rows):
        curve["whole"] = len(rows)
    return curve


def evaluations(run: Run, axes: Axes) -> dict[str, dict[str, Any]]:
    """Set -> its points; the set of the run itself is named ""."""
    sets: dict[str, list[tuple[int, float]]] = {}
    for row in run.evals:
        for key, value in row.items():
            kind, _, name = key.partition("/")
            if kind == "val_loss" and value is not None:
                sets.setdefault(name, []).append((row["step"], value))
    out = {}
    for name, points in sorted(sets.items())[:40]:
        kept = lowest_and_highest(np.array([value for _, value in points]), MOST // 2)
        out[name] = axes.at(np.array([points[i][0] for i in kept], float)) | {
            "loss": _rounded(np.array([points[i][1] for i in kept]))
        }
    return out


def layers(run: Run) -> dict[str, Any] | None:
    """Values of modules over steps: {"step", "names", "values": {kind: a list of columns}}."""
    names = list(dict.fromkeys(name for row in run.layers for name in row["layers"]))
    if not names:
        return None
    most = max(20, min(LAYER_STEPS, LAYER_CELLS // len(names)))
    every = np.unique(np.linspace(0, len(run.layers) - 1, min(most, len(run.layers))).astype(int))
    kept = [run.layers[i] for i in every]
    kinds = list(dict.fromkeys(kind for row in kept for told in row["layers"].values() for kind in told))
    values = {kind: [[_short(row["layers"].get(name, {}).get(kind)) for name in names] for row in kept] for kind in kinds[:8]}
    return {"step": [row["step"] for row in kept], "names": names, "values": values, "whole": len(run.layers)}


def _column(rows: Sequence[dict[str, Any]], key: str) -> np.ndarray:
    return np.array([np.nan if row.get(key) is None else row[key] for row in rows], float)


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{v:.6g}") for v in values]


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}")
