"""What watching costs: the quickstart's model with everything on, in turn with nothing on; and what a bad server can delay.

    python benchmarks/watching.py            # step time with logging=[wandb,tensorboard] and log_every=1, against neither
    python benchmarks/watching.py --server   # how much later a run ends whose server is slow, failing, or not there

Runs take turns, as machines are noisy; a ratio is of medians of one run of this program.
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
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

QUICKSTART = ["experiment=quickstart", "checkpoint.every=0", "train.eval_batches=1"]
EVERYTHING = ["logging='[wandb,tensorboard]'", "logging.wandb.mode=offline", "train.log_every=1"]
NOTHING = ["train.log_every=20"]
MISHAPS: dict[str, dict[str, Any]] = {
    "a server that answers": {},
    "a closed port": {},
    "500 to all": {"fail": 500},
    "500 after 20 requests": {"fail": 500, "after": 20},
    "no answer, ever": {"silent": True},
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
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--steps", type=int, default=100, help="of each run")
    args = parser.parse_args()
    servers(args.steps) if args.server else overhead(args.pairs, args.steps)
