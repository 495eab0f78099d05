"""Memory of a CPU over the time of a profile, from its trace: as numbers and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

POINTS = 4000  # at most; of each stretch of time the highest


def memory(trace: dict[str, Any]) -> list[tuple[float, int]]:
    """(milliseconds since the first step began, bytes) as they change.

    Bytes are counted from the start of the profile: what was there before is 0, and freeing it goes unseen.
    """
    events = trace["traceEvents"]
    marks = [e["ts"] for e in events if e.get("ph") == "X" and e["name"].startswith("step ")]
    changes = sorted((e["ts"], e["args"]["Total Allocated"]) for e in events
                     if e["name"] == "[memory]" and e["args"]["Device Type"] == 0)  # fmt: skip
    if not changes or not marks:
        return []
    first, last = min(marks), changes[-1][0]
    width, highest = max(0.001, (last - first) / POINTS), dict[int, int]()
    for at, total in changes:
        slot = int(max(0.0, at - first) / width)
        highest[slot] = max(total, highest.get(slot, total))
    return [(slot * width / 1e3, total) for slot, total in sorted(highest.items())]


def draw(points: list[tuple[float, int]], path: Path) -> None:
    """A picture of them, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.fill_between([ms for ms, _ in points], [held / 2**20 for _, held in points], step="post", color="#3b6ea8", linewidth=0)
    axes.set(xlabel="milliseconds", ylabel="MiB allocated since the start of the profile", title=path.name, ylim=(0, None))
    axes.grid(alpha=0.3)
    FigureCanvasAgg(figure).print_png(str(path))
