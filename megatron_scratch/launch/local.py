"""Training on this machine: in this process when one is enough, else one process a rank, meeting over a file."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from megatron_scratch.config import Config, compose
from megatron_scratch.util.env import Rank, everything
from megatron_scratch.util.exits import BAD_INPUT, FAILED, OK
from megatron_scratch.util.signals import handled

GRACE = 30.0  # seconds that the other ranks get to end by themselves, once one has failed; one that is stopped never does
POLL = 0.05


def launch(cfg: Config, world: int) -> int:
    """Run a resolved config on `world` processes. Returns the exit code of the run."""
    if world == 1:
        from megatron_scratch.train.worker import report, run

        report(run(cfg, Rank()))
        return OK
    from megatron_scratch.train.rundir import RunDir

    run_dir = RunDir(cfg.dir)
    run_dir.create()
    with run_dir.locked():
        pass  # refuse at once what the main rank would refuse in some seconds; from there on it holds the lock itself
    with tempfile.TemporaryDirectory(prefix="megatron_scratch_") as tmp, ExitStack() as stack:
        compose.save(cfg, Path(tmp) / "config.yaml")
        logs = [run_dir.log_file(rank) for rank in range(world)]
        ranks = [_start(Path(tmp), rank, world, logs[rank], stack) for rank in range(world)]
        return _wait(ranks, logs)


def _start(tmp: Path, rank: int, world: int, log: Path, stack: ExitStack) -> subprocess.Popen[bytes]:
    """Start one rank. The main one keeps the terminal; what the others print goes to their log files."""
    env = {**everything(), "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    out = None if rank == 0 else stack.enter_context(open(log, "ab"))
    command = [sys.executable, "-m", "megatron_scratch.train.worker", str(tmp / "config.yaml"), "--store", str(tmp / "store")]
    # A session of its own: Ctrl-C reaches this process alone, which passes it on once.
    process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT if out else None, start_new_session=True)
    stack.callback(_end, process)
    return process


def _wait(ranks: list[subprocess.Popen[bytes]], logs: list[Path]) -> int:
    """Wait for all ranks; pass signals on; when one fails, give the others a moment, then end them."""

    def forward(number: int, frame: object) -> None:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    with handled(forward):
        first_failed = _watch(ranks)
    if first_failed is None:
        return OK
    code = ranks[first_failed].returncode
    if first_failed > 0 and code != ranks[0].returncode:
        lines = logs[first_failed].read_text(errors="replace").strip().splitlines()
        last = lines[-1] if lines else "no output"
        print(f"failed: rank {first_failed} ended with {code}: {last} ({logs[first_failed]})", file=sys.stderr)
    return code if code >= 0 else FAILED


def _watch(ranks: list[subprocess.Popen[bytes]]) -> int | None:
    """The rank that failed first, or None when all ended well."""
    failed, deadline = None, float("inf")
    while any(p.poll() is None for p in ranks):
        if failed is None:
            failed = next((r for r, p in enumerate(ranks) if p.returncode not in (None, OK)), None)
            if failed is not None:  # bad input is bad on every rank; the others may be waiting for one that never joins
                deadline = time.monotonic() + (0.0 if ranks[failed].returncode == BAD_INPUT else GRACE)
        if time.monotonic() > deadline:
            for process in ranks:
                _end(process)
        time.sleep(POLL)
    if failed is None:
        failed = next((r for r, p in enumerate(ranks) if p.returncode != OK), None)
    return failed


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()
