"""All that a page shows, as JSON: no NaN in it, no text without a limit."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_scratch import __version__
from megatron_scratch.report import curves, listed
from megatron_scratch.report.facts import facts
from megatron_scratch.report.mix import mix
from megatron_scratch.report.run import Run, read_runs
from megatron_scratch.report.spent import spent


def collect(paths: Sequence[Path]) -> dict[str, Any]:
    """
    Raises:
        UserError: a path is no run, or one is given twice.
    """
    runs = read_runs(paths)
    return {
        "format": 1, "version": __version__, "made": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "runs": [collected(run, len(runs)) for run in runs],
    }  # fmt: skip


def collected(run: Run, runs: int) -> dict[str, Any]:
    told = facts(run)
    axes = curves.Axes(run)
    return {
        **drawn(run, runs), "path": str(run.path), "facts": told, "events": listed.events(run, axes.at),
        "events_whole": len(run.events), "rows": len(run.rows), "layers": curves.layers(run), "samples": listed.samples(run),
        "spent": spent(run), "mix": mix(run, told["tokens"]), "config": listed.settings(run), "notes": run.notes,
    }  # fmt: skip


def drawn(run: Run, runs: int) -> dict[str, Any]:
    """What pictures need of a run, on a page of so many `runs`."""
    axes = curves.Axes(run)
    return {"name": run.name, "axes": axes.names, "curves": curves.curves(run, axes, runs), "valid": curves.evaluations(run, axes)}
