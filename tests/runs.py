"""Whole training runs in forked ranks: start, kill at a named point, start again, compare."""

from __future__ import annotations

import faulthandler
import gc
import json
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # noqa: F401  (any optimizer imports it: here once, instead of 0.5 s in every forked run)

from megatron_scratch.config import Config, compose
from megatron_scratch.launch.resolve import resolve
from megatron_scratch.train import session, worker
from megatron_scratch.util.env import Rank
from megatron_scratch.util.exits import exit_code

TINY = ["model=llama_tiny", "model.num_layers=2", "model.hidden_size=32", "model.num_kv_heads=2", "model.ffn_size=64",
        "model.max_seq_len=32", "train.seq_len=32", "train.global_batch_size=8", "train.micro_batch_size=2", "train.log_every=1",
        "train.threads=1", "optim.lr=1e-2", "train.peak_tflops=1", "train.eval_batches=2",
        "fault.hang_timeout=100"]  # fmt: skip

Fault = Callable[[], None]
GRACE = 5.0  # seconds that ranks get to end by themselves, once another one has been killed


def config(data: Path, run: Path, *overrides: str, world: int = 1) -> Config:
    return resolve(compose.load([*TINY, f"data.dir={data}", f"dir={run}", *overrides]), world)


def _rank(cfg: Config, rank: Rank, store: str, fault: Fault | None, arm: Callable[[Rank], None] | None) -> None:
    gc.freeze()  # what the parent made is not this process's to destroy
    faulthandler.dump_traceback_later(120, exit=True)
    torch.set_num_threads(1)
    session.plot_loss = lambda run_dir: None  # 0.3 s; test_train draws one
    if fault is not None and rank.rank == rank.world - 1:
        fault()
    if arm is not None:
        arm(rank)
    code = exit_code(lambda: worker.run(cfg, rank, Path(store)))
    os._exit(code)


def run(cfg: Config, world: int = 1, fault: Fault | None = None, arm: Callable[[Rank], None] | None = None) -> list[int]:
    """Train on `world` forked ranks; `fault` is armed in the last one, `arm` is called in each. Returns the exit codes (negative:
    signal)."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as tmp:
        members = [Rank(r, world, r, world > 1) for r in range(world)]
        ranks = [context.Process(target=_rank, args=(cfg, rank, f"{tmp}/store", fault, arm)) for rank in members]
        for process in ranks:
            process.start()
        for process in ranks:  # the ones that others may be waiting for need not be the first
            while process.is_alive() and not any(p.exitcode == -signal.SIGKILL for p in ranks):
                process.join(0.02)
        for process in ranks:  # a rank may wait for one that died before they met: it is for the launcher to end it
            process.join(GRACE if any(p.exitcode == -signal.SIGKILL for p in ranks) else None)
            if process.is_alive():
                process.kill()
                process.join()
        return [p.exitcode for p in ranks]  # type: ignore[misc]


def kill_after(point: str, calls: int) -> Fault:
    """Arm a SIGKILL of this process just before the `calls`-th call of `point` (module:attribute path)."""

    def arm() -> None:
        module, _, path = point.partition(":")
        owner: Any = __import__(module, fromlist=["_"])
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        whole, count = getattr(owner, name), [0]

        def fatal(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == calls:
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(*args, **kwargs)

        setattr(owner, name, fatal)

    return arm


def rows(run_dir: Path) -> dict[int, tuple[float, float]]:
    """step -> (loss, gradient norm); a step that is logged twice fails the test."""
    found: dict[int, tuple[float, float]] = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "loss" in row:
            assert row["step"] not in found, f"step {row['step']} is in metrics.jsonl twice"
            found[row["step"]] = (row["loss"], row["grad_norm"])
    return found


def weights(run_dir: Path, step: int) -> dict[str, str]:
    """File -> sha256 of a checkpoint: model, optimizer state, all of it."""
    manifest = json.loads((run_dir / "checkpoints" / f"step_{step:08d}" / "manifest.json").read_text())
    return {name: f["sha256"] for name, f in manifest["files"].items()}


def ledger(run_dir: Path, event: str) -> list[dict[str, Any]]:
    return [r for r in map(json.loads, (run_dir / "ledger.jsonl").read_text().splitlines()) if r["event"] == event]
