"""Save and load against plain torch.distributed.checkpoint on the same state, in turn: seconds, peak memory, blocking time.

    python benchmarks/checkpoint.py [--gib 1.0] [--rounds 5] [--ranks 2]

The state is what AdamW keeps of a model: weights and two moments of each, in fp32, cut over the ranks as FSDP does. Both sides make
their files durable (fsync). Ours writes a sha256 of every file, and reads every file again before an older checkpoint is deleted
(its own line); it verifies while it loads. Memory is what the process's peak grew by, each measurement in a fresh process.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor, Shard

from megatron_scratch.checkpoint import store
from megatron_scratch.checkpoint.attempt import Attempt
from megatron_scratch.checkpoint.manifest import read
from megatron_scratch.checkpoint.plan import State
from megatron_scratch.checkpoint.saver import Saver
from megatron_scratch.config.train import CheckpointConfig
from megatron_scratch.parallel import Topology
from megatron_scratch.train.forked import run_ranks
from megatron_scratch.util.env import Rank

WIDTH = 1024
STEP = 0.5  # seconds; those of a large model are longer


def make_state(topo: Topology, gib: float) -> State:
    """Square matrices, rows over dp, three tensors of each."""
    count = max(1, round(gib * 2**30 / (3 * 4 * WIDTH * WIDTH)))
    rows = WIDTH // topo.size("dp")
    out: State = {}
    for number in range(count):
        for kind in ("model.{}.weight", "optim.{}.weight.exp_avg", "optim.{}.weight.exp_avg_sq"):
            part = torch.randn(rows, WIDTH)
            whole = DTensor.from_local(part, topo.axes["dp"], [Shard(0)], run_check=False) if topo.mesh is not None else part
            out[kind.format(number)] = whole
    return out


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def timed(topo: Topology, work: Callable[[], object]) -> float:
    dist.barrier()
    began = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - began


def measure(rank: Rank, what: str, folder: str, gib: float) -> tuple[float, float, float]:
    """(seconds, GiB that the peak grew by, seconds blocked) of one save or load."""
    warnings.simplefilter("ignore")
    topo = Topology.build({}, rank.rank, rank.world, torch.device("cpu"))
    state, root = make_state(topo, gib), Path(folder)
    before, blocked = peak(), 0.0
    if what == "dcp save":
        seconds = timed(topo, lambda: dcp.save(state, checkpoint_id=str(root / "dcp")))
    elif what == "dcp load":
        seconds = timed(topo, lambda: dcp.load(state, checkpoint_id=str(root / "dcp")))
    elif what == "save":
        seconds = timed(topo, lambda: store.save(root, 1, state, {}, topo))
    elif what == "load":
        found = root / "step_00000001"
        seconds = timed(topo, lambda: store.load(found, read(found), state, topo))
    else:
        seconds, blocked = in_a_run(topo, root, state, what == "asynchronous")
    return seconds, (peak() - before) / 2**30, blocked


def in_a_run(topo: Topology, root: Path, state: State, asynchronous: bool) -> tuple[float, float]:
    """The third save of a run, in which one is deleted: (from its start to its commit, training stood still)."""
    attempt = Attempt(root, store.on_main(lambda: Attempt.claim(root).number, topo, 0))
    saver = Saver(CheckpointConfig(keep_last=1, async_save=asynchronous), attempt, topo)
    for step in (1, 2, 3):
        dist.barrier()
        saved = saver.start(step, state, {})
        while saved is None:
            time.sleep(STEP)  # forward and backward of the next step, by a device
            saver.copied()  # as before its update
            saved = saver.poll()
    saver.close()
    assert saved is not None
    return saved.seconds, saved.blocked


KINDS = ("dcp save", "save", "dcp load", "load", "synchronous", "asynchronous")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--folder", default=None)
    args = parser.parse_args()
    found: dict[str, list[tuple[float, float, float]]] = {kind: [] for kind in KINDS}
    for turn in range(args.rounds):
        pairs = [("dcp save", "dcp load"), ("save", "load")]
        order = [*pairs[turn % 2], *pairs[1 - turn % 2], "synchronous", "asynchronous"]  # whoever is second finds a busier disk
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            for kind in order:
                if kind == "synchronous" or kind == "asynchronous":
                    shutil.rmtree(folder)
                    os.mkdir(folder)
                os.sync()
                rows = run_ranks(args.ranks, measure, kind, folder, args.gib, timeout=600)
                found[kind].append((max(r[0] for r in rows), max(r[1] for r in rows), max(r[2] for r in rows)))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    print(f"{args.gib} GiB of state on {args.ranks} ranks, median of {args.rounds}; torch {torch.__version__}, "
          f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, commit {commit}\n")  # fmt: skip
    print("| | seconds | peak memory grew by, GiB a rank | training stood still, s |\n|---|---|---|---|")
    for kind, rows in found.items():
        seconds, memory, blocked = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"| {kind} | {seconds:.2f} | {memory:.2f} | {f'{blocked:.3f}' if blocked else ''} |")


if __name__ == "__main__":
    main()
