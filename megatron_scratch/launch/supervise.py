"""The life of one Slurm job. Its batch script becomes this process, on the first node.

`python -m megatron_scratch.launch.supervise JOB`

    start -> preflight of every node -> ranks on the healthy ones -> verdict
      finished, refused (bad input)      done; what waits in the chain is cancelled
      stopped by the user (RUN/stop)     the same
      stopped by us, the time is over    requeued: the same job, later, perhaps on other nodes
      failed, died                       again on the nodes we have, launcher.max_restarts times without a new checkpoint
      a bad node and no spare            submitted again without it
      preempted, a node is down          Slurm ends us and starts the job again by itself

No torch, and nothing that a rank needs: what breaks a rank must not break this.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from megatron_scratch.config import Config, compose
from megatron_scratch.launch.preflight import preflight
from megatron_scratch.launch.scheduler import Slurm, hostnames
from megatron_scratch.launch.step import meeting, secrets, step
from megatron_scratch.util.env import Allocation, read_allocation
from megatron_scratch.util.errors import RunFailed, StopRequested, UserError
from megatron_scratch.util.exits import exit_code
from megatron_scratch.util.signals import handled
from megatron_scratch.util.starts import Start, Verdict, verdict

POLL = 0.2  # seconds
LOOK_EVERY = 5.0  # seconds between two looks for a later start, which are requests to a file server


class Signals:
    """What the scheduler has told us: USR1, the time is nearly over; TERM, this job is being ended (preempted or cancelled)."""

    def __init__(self) -> None:
        self.warned = self.ended = False

    def _on(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self.warned = True
        else:
            self.ended = True

    @contextmanager
    def listening(self) -> Iterator[Signals]:
        with handled(self._on):
            yield self


class Supervisor:
    """One job of Slurm, from its first start to its last."""

    def __init__(self, job: Path, given: Allocation) -> None:
        self.job, self.given = job, given
        self.cfg: Config = compose.load_file(job / "config.yaml")
        self.launcher = self.cfg.launcher
        self.record = journal(Path(self.cfg.dir))
        self.slurm = Slurm(job, given.job)
        self.signals = Signals()

    def run(self) -> None:
        """Start the ranks until there is a verdict that another start would not change.

        Raises:
            StopRequested: a checkpoint is saved; Slurm, or the user, starts this again. RunFailed, UserError: it will not be.
        """
        with self.signals.listening():
            while True:
                start = self._claim()
                nodes = self._nodes(start)
                self.record("job", job=self.given.job, requeues=self.given.restarts, start=start.number, nodes=nodes)
                code = self._ranks(start, nodes)
                word = verdict(start.ends(), code)
                start.check()
                if word.word == "finished":
                    self.slurm.cancel_chain()
                    return
                self._go_on(word)

    def _go_on(self, word: Verdict) -> None:
        """Return where the ranks are to be started again at once."""
        if word.word == "refused":
            self.slurm.cancel_chain()
            raise UserError(word.reason)
        if self.signals.ended:  # and Slurm knows what becomes of the job
            raise StopRequested(word.reason)
        if word.word == "stopped":
            raise StopRequested(f"{word.reason}{self._afterwards(word)}")
        self.record("job_failed", job=self.given.job, reason=word.reason)
        print(f"failed: {word.reason}; starting again", flush=True)

    def _afterwards(self, word: Verdict) -> str:
        """What becomes of a run that has stopped: the same job again, the next one of the chain, or nothing."""
        if not self.signals.warned:  # it was the user
            self.slurm.cancel_chain()
            return ""
        if not self.launcher.requeue:
            return ""
        self.record("requeued", job=self.given.job, reason=word.reason)
        self.slurm.requeue()
        return f"; job {self.given.job} is requeued"

    def _claim(self) -> Start:
        """The next start, unless those before it have come to nothing too often."""
        newest = newest_step(Path(self.cfg.dir))
        start = Start.claim(self.job / "starts", newest)
        idle = start.without_progress()
        if idle > self.launcher.max_restarts:
            self.slurm.cancel_chain()
            raise RunFailed(f"{idle} starts in a row have left no new checkpoint after step {newest}; giving up "
                            f"(launcher.max_restarts={self.launcher.max_restarts})")  # fmt: skip
        return start

    def _nodes(self, start: Start) -> list[str]:
        """The nodes to train on: the first healthy ones, in Slurm's order."""
        given = hostnames(self.given.nodes)
        if not self.launcher.preflight:
            return given
        bad = preflight(self.cfg, self.job, start, given, self.given.job)
        for node, reason in bad.items():
            self.record("bad_node", job=self.given.job, node=node, reason=reason)
            print(f"bad node {node}: {reason}", flush=True)
        good = [node for node in given if node not in bad]
        if len(good) >= self.launcher.nodes:
            return good[: self.launcher.nodes]
        if len(bad) == len(given):  # it is not the nodes
            raise RunFailed(f"all {len(given)} nodes fail the preflight, the first with: {next(iter(bad.values()))}")
        number = self.slurm.resubmit(list(bad), self.launcher.exclude)
        self.record("resubmitted", job=self.given.job, as_job=number, without=list(bad))
        raise StopRequested(
            f"{len(good)} of {self.launcher.nodes} nodes are healthy; job {number} is submitted without {', '.join(bad)}"
        )

    def _ranks(self, start: Start, nodes: list[str]) -> int:
        """srun, until it ends; its exit code.

        Raises:
            RunFailed: the job was started elsewhere meanwhile; the ranks of this start are ended.
        """
        environment = {**secrets(self.launcher.secrets_file), **meeting(nodes, self.given.job, start.number)}
        with subprocess.Popen(step(self.cfg, self.job, start, nodes), env=environment, start_new_session=True) as srun:
            asked, looked = False, time.monotonic()
            while srun.poll() is None:
                if not asked and (self.signals.warned or self.signals.ended):
                    asked = True
                    what = "is being ended by Slurm" if self.signals.ended else "is close to its time limit"
                    start.ask_to_stop(f"job {self.given.job} {what}")
                time.sleep(POLL)
                if time.monotonic() > looked + LOOK_EVERY:
                    looked = time.monotonic()
                    if start.superseded():
                        srun.kill()  # and with it go its tasks on this node; it could not reach others
                        start.check()
        return srun.returncode


def newest_step(run: Path) -> int | None:
    """The step of the newest committed checkpoint."""
    from megatron_scratch.checkpoint.manifest import committed

    return max(committed(run / "checkpoints"), default=None)


def journal(run: Path) -> Callable[..., None]:
    """Where a job's events go: the run's ledger."""
    from megatron_scratch.train.rundir import RunDir

    return RunDir(run).record


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("job", type=Path)
    args = parser.parse_args()

    def work() -> None:
        given = read_allocation()
        if given is None:
            raise UserError("this is what a batch script of Slurm runs; submit with `megatron-scratch train launcher=slurm ...`")
        Supervisor(args.job, given).run()

    return exit_code(work)


if __name__ == "__main__":
    raise SystemExit(main())
