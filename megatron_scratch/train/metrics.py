"""What a person and a script see of a run: a progress line, `metrics.jsonl`, model FLOPs utilisation, memory."""

from __future__ import annotations

import resource
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from megatron_scratch.config.train import LoggingConfig, TrainConfig
from megatron_scratch.models.gemm import product

# Dense bf16 peak of one GPU in TFLOP/s (vendors' data sheets, without sparsity).
PEAK_TFLOPS = {"H100 PCIe": 756.0, "H100": 989.0, "H200": 989.0, "GH200": 989.0, "A100": 312.0, "B200": 2250.0, "L40S": 362.0}


def peak_flops(cfg: TrainConfig, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that MFU is a fraction of: as given, the GPU's data sheet, or the matmul rate that this process measures."""
    if cfg.peak_tflops is not None:
        return cfg.peak_tflops * 1e12
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = [tflops for gpu, tflops in PEAK_TFLOPS.items() if gpu in name]
        if known:
            return known[0] * 1e12
    return measured_flops(device, dtype)


def measured_flops(device: torch.device, dtype: torch.dtype, n: int = 1024, rounds: int = 12) -> float:
    """Best of a few n x n x n products by the layers' own kernel (2n^3 FLOPs each): on a CPU the only peak that means anything."""
    a = torch.ones(n, n, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(rounds):
        synchronize(device)
        start = time.perf_counter()
        product(a, a)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def synchronize(device: torch.device) -> None:
    """Wait for the device, where there is one to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: allocated on the GPU, or resident of this process (Linux counts KiB)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class View(Protocol):
    """Shows a run to a person; a `logging` entry."""

    def start(self, step: int, steps: int) -> None: ...

    def row(self, row: dict[str, Any]) -> None:
        """A row of metrics.jsonl."""

    def say(self, text: str) -> None:
        """A line above the progress bar."""

    def close(self) -> None: ...


class Console:
    """One live line in a terminal, one plain line a logged step elsewhere."""

    def __init__(self, cfg: LoggingConfig) -> None:
        self.out = RichConsole(file=sys.stdout, highlight=False, soft_wrap=True)
        self.live = self.out.is_terminal
        columns = (SpinnerColumn(), TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=24),
                   TextColumn("{task.fields[numbers]}"), TextColumn("left"), TimeRemainingColumn())  # fmt: skip
        self.progress = Progress(*columns, console=self.out)
        self.first = self.steps = 0
        self.began = time.perf_counter()

    def start(self, step: int, steps: int) -> None:
        self.first, self.steps, self.began = step, steps, time.perf_counter()
        self.task = self.progress.add_task("train", total=steps, completed=step, numbers="")
        if self.live:
            self.progress.start()

    def row(self, row: dict[str, Any]) -> None:
        if "loss" not in row:
            return self.say(line(row, self.steps))
        if self.live:
            return self.progress.update(self.task, completed=row["step"], numbers=numbers(row))
        done = row["step"] - self.first
        left = (time.perf_counter() - self.began) / max(done, 1) * (self.steps - row["step"])
        self.say(f"{line(row, self.steps)}  {left:,.0f} s left")

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
    if "loss" not in row:
        return f"step {row['step']}: validation loss {row['val_loss']:.4f}"
    return f"step {row['step']}/{steps}  {numbers(row)}"


def numbers(row: dict[str, Any]) -> str:
    """The part of a line that changes from step to step."""
    return f"loss {row['loss']:.4f}  lr {row['lr']:.2e}  norm {row['grad_norm']:.2f}  {row['tokens_per_second']:,.0f} tok/s"
