"""The loss of a run as a picture."""

from __future__ import annotations

from pathlib import Path

from megatron_scratch.report.collect import drawn
from megatron_scratch.report.pictures import loss
from megatron_scratch.report.run import read_run
from megatron_scratch.train.rundir import RunDir


def plot_loss(run: RunDir) -> Path | None:
    """Draw training and validation loss against steps, and tokens on top, into `loss.png`; None without any rows."""
    return loss(run.plot, [drawn(read_run(run.path, whole=False), 1)])
