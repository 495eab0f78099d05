"""A pipeline's timeline as a picture (a row for each rank, a box for each action, white where it waits) and as a row of a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_scratch.plan.bubble import EVEN, FORMULAS, Action, Cost, Timeline, activations, expected, order, simulate

COLOURS = {"F": "#4c83c3", "B": "#3f9c72", "I": "#72b36a", "W": "#e0a13c"}
LONG = Cost(2, 3, 1)  # attention takes as long as the matrices with weights: 1 + 1 forward, 1 + 2 for the input, 1 for the weights
HEAD = (
    "| schedule | p | v | m | 1:1:1 idle / ideal | formula | idle / total | inside | 2:3:1 idle / ideal | formula | idle / total "
)
HEAD += "| held, most | least |\n" + "|---" * 13 + "|"
LABELS = {"F": "forward", "B": "backward, whole", "I": "backward for the input", "W": "backward for the weights"}


def draw(path: Path, schedules: Sequence[tuple[str, int]], pp: int, microbatches: int) -> Path:
    """Timelines of (schedule, virtual stages) below each other, on one scale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(17, 0.8 + len(schedules) * (0.75 + 0.3 * pp)), dpi=100, layout="constrained")
    axes = figure.subplots(len(schedules), sharex=True, squeeze=False)[:, 0]
    for ax, (schedule, virtual) in zip(axes, schedules, strict=True):
        actions = order(schedule, pp, virtual, microbatches)
        timeline = simulate(actions)
        _rows(ax, timeline, virtual)
        ax.set_title(_title(schedule, pp, virtual, microbatches, timeline, actions), loc="left", fontsize=11)
    axes[-1].set_xlabel("time; 1 is a forward pass of one microbatch through all layers of a rank, forward = input = weight part")
    handles = [Patch(color=COLOURS[kind], label=LABELS[kind]) for kind in COLOURS]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False,
                  title="number: microbatch; pale: the first of a rank's stages, dark: the last")  # fmt: skip
    FigureCanvasAgg(figure).print_png(str(path))
    return path


def _rows(ax: Any, timeline: Timeline, virtual: int) -> None:
    for rank, spans in enumerate(timeline.ranks):
        owned = sorted({span.action.stage for span in spans})
        for start, end, (kind, stage, microbatch) in spans:
            shade = 0.55 + 0.45 * owned.index(stage) / (virtual - 1) if virtual > 1 else 1.0
            ax.barh(rank, float(end - start), left=float(start), height=0.9, color=COLOURS[kind], alpha=shade,
                    edgecolor="white", linewidth=0.6)  # fmt: skip
            ax.text(float(start + end) / 2, rank, str(microbatch), ha="center", va="center_baseline", fontsize=7)
    ax.set(yticks=range(len(timeline.ranks)), yticklabels=[f"rank {r}" for r in range(len(timeline.ranks))])
    ax.invert_yaxis()
    ax.tick_params(length=0, labelsize=8)
    ax.spines[:].set_visible(False)
    ax.margins(x=0, y=0.02)


def _title(schedule: str, pp: int, virtual: int, m: int, timeline: Timeline, actions: list[list[Action]]) -> str:
    held = [activations(a) for a in actions]
    holds = expected(schedule, pp, virtual, m, EVEN) is not None
    formula = f" = {FORMULAS[schedule].text}" if holds else f", no formula for m = {m}"
    return (f"{schedule}   p={pp} v={virtual} m={m}:   idle {float(timeline.bubble):g} of {float(timeline.total):g} = "
            f"{float(timeline.bubble / timeline.total):.1%};   idle / ideal {timeline.bubble / timeline.ideal}{formula};   "
            f"microbatches held {float(max(held)):g}")  # fmt: skip


def row(schedule: str, pp: int, virtual: int, m: int) -> str:
    """Of the table: what is simulated for both costs, the formula, and the microbatches held by the ranks with most and least."""
    actions, cells = order(schedule, pp, virtual, m), []
    for cost in (EVEN, LONG):
        timeline, formula = simulate(actions, cost), expected(schedule, pp, virtual, m, cost)
        bounds = sorted({bubble / timeline.ideal for bubble in formula or ()})
        cells += [timeline.bubble / timeline.ideal, " to ".join(map(str, bounds)) or "none"]
        cells += [f"{float(timeline.bubble / timeline.total):.1%}", *([timeline.inside / timeline.ideal] if cost is EVEN else [])]
    held = [float(activations(a)) for a in actions]
    return f"| {schedule} | {pp} | {virtual} | {m} | {' | '.join(map(str, cells))} | {max(held):.4g} | {min(held):.4g} |"
