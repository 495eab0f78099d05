"""Points of a sweep as jobs of Slurm: all are checked before the first is submitted."""

from __future__ import annotations

import shutil
import time

from megatron_scratch.launch import slurm
from megatron_scratch.launch.sweep.here import Stop
from megatron_scratch.launch.sweep.points import Ready
from megatron_scratch.launch.sweep.record import Point, Sweep
from megatron_scratch.launch.sweep.table import FINAL, job_state, jobs_of, squeue
from megatron_scratch.util.errors import RunFailed, StopRequested, UserError

SHORTEST, LONGEST = 1.0, 30.0  # seconds between two looks at the queue: a twentieth of what has passed, within these


def submit(sweep: Sweep, ready: Ready, stop: Stop) -> None:
    """Hand every point to Slurm, until told to stop. What Slurm refuses is dropped, with its reason."""
    slurm.need("sbatch")
    jobs = []
    for point, cfg, _ in ready:
        run = sweep.home(point).absolute()
        try:
            job = slurm.make_job(cfg, run)
            slurm.check(job)
        except UserError as error:
            point.drop(error)
            shutil.rmtree(run, ignore_errors=True)  # made a moment ago, in a folder of our own
        else:
            jobs.append((point, cfg, job))
    sweep.save()
    for point, cfg, job in jobs:
        if stop.times:
            return
        sweep.mark(point, "submitting")
        try:
            said = slurm.submit(job, cfg.launcher.chain, cfg.name)
        except UserError as error:
            sweep.mark(point, "dropped", error)
        else:
            sweep.mark(point, "submitted")
            print("\n".join(said), flush=True)


def wait(sweep: Sweep, points: list[Point], stop: Stop) -> None:
    """Until the jobs of all points that were submitted are over.

    Raises:
        RunFailed: Slurm cannot be asked. StopRequested: this process was told to stop. The jobs go on in either case.
    """
    waiting, began = [point for point in points if point.state == "submitted"], time.monotonic()
    if waiting:
        print(f"waiting for {len(waiting)} jobs: what they come to chooses the next ones", flush=True)
    while waiting:
        queue = squeue(sweep.path)
        if queue is None:
            raise RunFailed(f"squeue does not answer; the jobs go on, see megatron-scratch report --sweep {sweep.path}")
        if stop.times:
            raise StopRequested(f"told to stop; the jobs go on, see megatron-scratch report --sweep {sweep.path}")
        for point in waiting:
            state, reason = job_state(sweep.home(point), jobs_of(sweep.home(point)), queue)
            if state in FINAL:
                sweep.mark(point, state, reason)
        waiting = [point for point in waiting if point.state == "submitted"]
        time.sleep(min(LONGEST, max(SHORTEST, (time.monotonic() - began) / 20)) if waiting else 0)
