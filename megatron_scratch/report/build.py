"""From run directories to a page and its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_scratch.report.collect import collect
from megatron_scratch.report.page import page
from megatron_scratch.report.pictures import pictures
from megatron_scratch.util.errors import UserError
from megatron_scratch.util.page import write_page

PAGE = "report.html"


def write_report(paths: Sequence[Path], out: Path | None = None) -> list[Path]:
    """The page and the pictures of one run or of several side by side.

    Args:
        out: the folder for them; None: `report` in the run's own folder, or here where there are several.

    Returns:
        what was written, the page first.

    Raises:
        UserError: a path is no run, or `out` cannot be written to.
    """
    report = collect(paths)
    folder = out or (paths[0] if len(paths) == 1 else Path()) / "report"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        made = pictures(folder, report["runs"])
        write_page(folder / PAGE, page(report, made[0] if made else None))
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}; give another folder with out=DIR") from error
    return [folder / PAGE, *made]
