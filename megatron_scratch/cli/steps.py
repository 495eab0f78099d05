"""The report of a `data` verb as a table in the terminal."""

from __future__ import annotations

from typing import IO, Any

WIDTH = 120  # where the output is no terminal


def print_steps(report: dict[str, Any], stream: IO[str]) -> None:
    """One row a step: what went in, what it took out, what it cost; then what was dropped most."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", show_footer=False)
    table.add_column("step", no_wrap=True)
    for name in ("documents in", "MB in", "removed", "share", "documents out", "MB out", "seconds", "CPU s", "MB/CPU s"):
        table.add_column(name, justify="right", no_wrap=True)
    for step in report["steps"]:
        table.add_row(*_row(step))
    total = report["total"]
    table.add_row(
        "all", *[""] * 6, f"{total['seconds']:.2f}", f"{total['cpu_seconds']:.2f}", _rate(report["steps"][0], total), style="bold"
    )
    console = Console(file=stream, width=None if stream.isatty() else WIDTH, highlight=False)
    console.print(table)
    drops = sorted(report["dropped"], key=lambda d: -d["count"])[:8]
    if drops:
        console.print("dropped: " + ", ".join(f"{d['count']} {d['reason']}" for d in drops), markup=False, soft_wrap=True)


def _row(step: dict[str, Any]) -> list[str]:
    before, after = step["documents_in"], step["documents_out"]
    return [
        step["label"],
        f"{before}",
        _mb(step["bytes_in"]),
        f"{before - after}",
        f"{(before - after) / max(1, before):.2%}",
        f"{after}",
        _mb(step["bytes_out"]),
        *(f"{step[name]:.2f}" for name in ("seconds", "cpu_seconds")),
        _rate(step, step),
    ]


def _mb(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:.1f}"


def _rate(step: dict[str, Any], cost: dict[str, Any]) -> str:
    size = step["bytes_in"] if step["bytes_in"] is not None else step["bytes_out"]
    return f"{size / 1e6 / cost['cpu_seconds']:.1f}" if cost["cpu_seconds"] >= 0.01 else ""
