"""What a person sees of a run: one live line in a terminal, plain lines elsewhere, and the same in a log file for each rank."""

from __future__ import annotations

import sys
import time
import traceback
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text


class View(Protocol):
    """Shows a run to a person."""

    def start(self, step: int, steps: int) -> None: ...

    def row(self, row: dict[str, Any]) -> None:
        """A row of metrics.jsonl."""

    def say(self, text: str) -> None:
        """A line above the progress bar."""

    def close(self) -> None: ...


class Left(ProgressColumn):
    """Time that is left, by the step time of the last logged interval: rich's own counts updates, which come every `log_every`."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["left"])


class Console:
    """One live line in a terminal, one plain line a logged step elsewhere."""

    def __init__(self, save_every: int = 0) -> None:
        """`save_every`: steps between checkpoints, to say when the next one comes; 0: only at the end."""
        self.out = RichConsole(file=sys.stdout, highlight=False, soft_wrap=True)
        self.live, self.save_every = self.out.is_terminal, save_every
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=16), TextColumn("{task.fields[numbers]}"), Left())
        self.progress = Progress(*columns, console=self.out)
        self.steps = 0

    def start(self, step: int, steps: int) -> None:
        self.steps = steps
        self.task = self.progress.add_task("train", total=steps, completed=step, numbers="", left="")
        if self.live:
            self.progress.start()

    def row(self, row: dict[str, Any]) -> None:
        if "loss" not in row:
            return self.say(line(row, self.steps))
        left = self._left(row)
        if self.live:
            return self.progress.update(self.task, completed=row["step"], numbers=numbers(row), left=left)
        self.say(f"{line(row, self.steps)}  {left}")

    def _left(self, row: dict[str, Any]) -> str:
        """Time to the end, and to the next checkpoint where that comes before it."""
        step, seconds = row["step"], row["step_seconds"]
        end = f"{duration((self.steps - step) * seconds)} left"
        away = self.save_every - step % self.save_every if self.save_every else 0
        if not away or step + away >= self.steps:
            return end
        return f"{end}, saves in {duration(away * seconds)}"

    def say(self, text: str) -> None:
        self.out.print(text, markup=False)

    def close(self) -> None:
        if self.live:
            self.progress.stop()


class Silent:
    """What every rank but the main one shows."""

    def start(self, step: int, steps: int) -> None: ...

    def row(self, row: dict[str, Any]) -> None: ...

    def say(self, text: str) -> None: ...

    def close(self) -> None: ...


class Logged:
    """A view, and the same as plain lines with the time of day in this rank's log file, which outlives the terminal."""

    def __init__(self, view: View, path: Path) -> None:
        self.view, self.path, self.steps = view, path, 0

    def start(self, step: int, steps: int) -> None:
        self.steps = steps
        self._write(f"start after step {step} of {steps}")
        self.view.start(step, steps)

    def row(self, row: dict[str, Any]) -> None:
        self._write(line(row, self.steps))
        self.view.row(row)

    def say(self, text: str) -> None:
        self._write(text)
        self.view.say(text)

    def close(self) -> None:
        self.view.close()

    def failed(self) -> None:
        """Write the exception that is being handled, with its traceback."""
        self._write(traceback.format_exc().rstrip())

    def _write(self, text: str) -> None:
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")


def line(row: dict[str, Any], steps: int) -> str:
    """A row of metrics as a line for people."""
    if "loss" in row:
        return f"step {row['step']}/{steps}  {numbers(row)}"
    losses = [(key.partition("/")[2], value) for key, value in row.items() if key.partition("/")[0] == "val_loss"]
    told = ", ".join(f"{value:.4f}" + (f" on {name}" if name else "") for name, value in losses)
    return f"step {row['step']}: validation loss {told}"


def numbers(row: dict[str, Any]) -> str:
    """The part of a line that changes from step to step."""
    return (f"loss {row['loss']:.4f}  lr {row['lr']:.2e}  norm {row['grad_norm']:.2f}  {row['tokens_per_second']:,.0f} tok/s  "
            f"mfu {100 * row['mfu']:.1f} %")  # fmt: skip


def duration(seconds: float) -> str:
    """`9 s`, `3 min 20 s`, `5 h 12 min`, `3 d 4 h`."""
    whole = round(seconds)
    for big, large, small, unit in ((86400, "d", "h", 3600), (3600, "h", "min", 60), (60, "min", "s", 1)):
        if whole >= big:
            rest = whole % big // unit
            return f"{whole // big} {large} {rest} {small}" if rest else f"{whole // big} {large}"
    return f"{whole} s"
