"""What watching costs: the quickstart's model with everything on; and what a bad server can delay.

python benchmarks/watching.py            # in one run, log_every=1, logging=[wandb,tensorboard]: the rank's time, the followers' CPU
python benchmarks/watching.py --turns    # whole runs with everything and with nothing, in turn; machines are noisier than this
python benchmarks/watching.py --server   # how much later a run ends whose server is slow, failing, or not there
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from megatron_scratch.util.machine import descendants, process

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

QUICKSTART = ["experiment=quickstart", "schedule.warmup_steps=5", "checkpoint.every=0", "train.eval_batches=1"]
EVERYTHING = ["logging=[wandb,tensorboard]", "logging.wandb.mode=offline", "train.log_every=1"]
NOTHING = ["train.log_every=20"]
MISHAPS: dict[str, dict[str, Any]] = {
    "a server that answers": {},
    "a closed port": {},
    "500 to all": {"fail": 500},
    "500 after 20 requests": {"fail": 500, "after": 20},
    "never an answer": {"silent": True},
    "no answer after 20 requests": {"silent": True, "after": 20},
    "2 s for each answer": {"delay": 2.0},
    "a refused key": {"key": "f" * 40},
}
WARM = 20  # steps that are not counted; NOTHING logs after each so many


def start(folder: Path, steps: int, words: list[str], env: dict[str, str] | None = None) -> tuple[float, float]:
    """(seconds, CPU seconds of all its processes) of a whole run."""
    command = [sys.executable, "-m", "megatron_scratch", "train", *QUICKSTART, f"dir={folder}", f"train.steps={steps}", *words]
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(env or {})}, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - began, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def rows(folder: Path) -> list[dict[str, Any]]:
    return [row for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "step_seconds" in row]


def mean_step(folder: Path) -> float:
    """By the run's own clock, after WARM steps; each row stands for the steps since the one before."""
    seconds, before = 0.0, WARM
    for row in rows(folder):
        if row["step"] > WARM:
            seconds += row["step_seconds"] * (row["step"] - before)
            before = row["step"]
    return seconds / (before - WARM)


def overhead(pairs: int, steps: int) -> None:
    """Step time with everything against nothing, `pairs` times in turn."""
    ratios: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        for n in range(pairs):
            order = [("with", EVERYTHING), ("without", NOTHING)]
            found = {}
            for name, words in order if n % 2 else order[::-1]:
                folder = Path(scratch) / f"{name}_{n}"
                _, cpu = start(folder, steps, words)
                found[name] = (mean_step(folder), cpu)
            ratios.append(found["with"][0] / found["without"][0] - 1)
            print(f"pair {n}: {1000 * found['with'][0]:.1f} ms a step with, {1000 * found['without'][0]:.1f} ms without, "
                  f"{100 * ratios[-1]:+.2f} %; {found['with'][1]:.1f} and {found['without'][1]:.1f} CPU s", flush=True)  # fmt: skip
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"overhead of all logging at log_every=1: median {100 * middle:+.2f} % (quartiles {100 * low:+.2f}, {100 * high:+.2f})")


class Timer:
    """Seconds in some functions, by name, and the CPU seconds of a process's descendants, from one call of `mark` to the next."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.marks: list[tuple[float, Counter[str], float]] = []

    def around(self, owner: Any, function: str) -> None:
        whole, name = getattr(owner, function), f"{owner.__name__}.{function}"

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return whole(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - began

        setattr(owner, function, timed)

    def mark(self) -> None:
        self.marks.append(
            (
                time.perf_counter(),
                self.seconds.copy(),
                sum(told.cpu_seconds for pid in descendants(os.getpid()) if (told := process(pid))),
            )
        )


def share(steps: int) -> None:
    """Of one run, after WARM steps: what the rank spends on rows, marks and followers; what followers spend beside it."""
    from megatron_scratch.config import compose
    from megatron_scratch.launch.resolve import resolve
    from megatron_scratch.train import hooks, phases, reporter, worker
    from megatron_scratch.util.env import Rank

    timer = Timer()
    for owner, function in ((hooks.LogMetrics, "run"), (phases.Phases, "entered"), (reporter.Reporter, "run")):
        timer.around(owner, function)
    logged = hooks.LogMetrics.run

    def at(self: Any, step: int, result: Any) -> None:
        logged(self, step, result)
        if step in (WARM, steps - 1):
            timer.mark()

    hooks.LogMetrics.run = at  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as scratch:
        words = [*QUICKSTART, *EVERYTHING, f"dir={scratch}/run", f"train.steps={steps}"]
        worker.run(resolve(compose.load(words), 1), Rank())
    (began, before, cpu_before), (ended, after, cpu_after) = timer.marks
    wall, count = ended - began, steps - 1 - WARM
    print(f"\n{1000 * wall / count:.1f} ms a step, {count} steps")
    for name in after:
        taken = after[name] - before[name]
        print(f"{name:<20}{1000 * taken / count:8.3f} ms a step  {100 * taken / wall:6.3f} %")
    total = sum(after.values()) - sum(before.values())
    print(f"{'the rank, in all':<20}{1000 * total / count:8.3f} ms a step  {100 * total / wall:6.3f} %")
    beside, cores = cpu_after - cpu_before, os.cpu_count() or 1
    part = 100 * beside / wall / cores
    print(f"followers and their helpers: {1000 * beside / count:.2f} ms of CPU a step, {part:.2f} % of {cores} cores")


def servers(steps: int) -> None:
    """Seconds of a run from start to end, by what its server does; the losses are compared with those of a run without one."""
    from wandb_server import KEY, Server  # tests/: the stand-in that the tests use

    with tempfile.TemporaryDirectory() as scratch:
        plain, _ = start(Path(scratch) / "none", steps, ["train.log_every=1"])
        print(f"without a server: {plain:.1f} s")
        want = [row["loss"] for row in rows(Path(scratch) / "none")]
        for name, options in MISHAPS.items():
            with Server(**options) as server:
                url = "http://127.0.0.1:1" if name == "a closed port" else server.url
                env = {"WANDB_BASE_URL": url, "WANDB_API_KEY": KEY, "HOME": scratch}
                folder = Path(scratch) / "_".join(name.split())
                took, _ = start(folder, steps, ["logging=wandb", "train.log_every=1"], env)
            same = "the same losses" if [row["loss"] for row in rows(folder)] == want else "OTHER LOSSES"
            print(f"{name}: {took:.1f} s, {took - plain:+.1f} s, {same}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--server", action="store_true")
    parser.add_argument("--turns", action="store_true")
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--steps", type=int, default=100, help="of each run")
    args = parser.parse_args()
    if args.server:
        servers(args.steps)
    elif args.turns:
        overhead(args.pairs, args.steps)
    else:
        share(args.steps)
