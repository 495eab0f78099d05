"""One a machine, where no scheduler supervises the ranks: torchrun, told to stop so that its ranks save, and with their exit code.

torchrun alone loses both. A signal to it makes its agent leave the others in their last barrier for five minutes; and of each code
of its ranks it makes 1, so that a run which stopped with a checkpoint looks like one that failed, and is started again.
`launch/torchrun.sh` and the pods of `launcher=kubernetes` run this; it imports no torch.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType

from megatron_scratch.config import Config, compose
from megatron_scratch.config.launcher import ClusterConfig
from megatron_scratch.launch.resolve import resolve
from megatron_scratch.util.env import everything
from megatron_scratch.util.errors import RunFailed, StopRequested, UserError, choice
from megatron_scratch.util.exits import BAD_INPUT, FAILED, OK, STOPPED, exit_code
from megatron_scratch.util.machine import die_with_parent
from megatron_scratch.util.signals import ENDING
from megatron_scratch.util.starts import End, Start

GIVEN_UP = 3  # too many starts without progress: for a cluster, not to be started again
RETRYABLE = 128  # Kubeflow starts a pod again whose exit code is at least this, and no other
RENDEZVOUS = ("static", "c10d")
POLL = 0.1  # seconds


class Told:
    """Signals to this process, passed on to the ranks and not to torchrun's agent: the ranks save, and the agent sees them end."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.ranks: set[int] = set()  # have been told

    def listen(self) -> None:
        for number in ENDING:  # and for good: one that comes while the ends are judged must not lose the exit code
            signal.signal(number, self._on)

    def _on(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self.ranks.clear()  # a second Ctrl-C is told again, and ends the ranks at once

    def pass_on(self, agent: int) -> None:
        """Tell the ranks that have not been told, those that the agent has just started again among them; the agent, while it has
        none, or where the kernel does not say which they are."""
        if self.number is None:
            return
        for process in set(children(agent) or [agent]) - self.ranks:
            with suppress(ProcessLookupError):
                os.kill(process, self.number)
            self.ranks.add(process)


def children(pid: int) -> list[int]:
    """The processes that `pid` has started, as Linux lists them; none where it is gone."""
    found: list[int] = []
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += [int(word) for word in listed.read_text().split()]
    return found


def elastic(args: argparse.Namespace, config: Path, start: Start) -> list[str]:
    """The command line of torchrun, and of the ranks that it starts."""
    words = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={args.nodes}", f"--nproc-per-node={args.ranks}",
             f"--max-restarts={args.restarts}",
             "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]  # fmt: skip  # SIGUSR1 would kill it, and leave the ranks
    if args.rendezvous == "static":
        words += [f"--node-rank={args.node}", f"--master-addr={args.address}", f"--master-port={args.port}"]
    else:
        hosts = "1" if args.node == 0 else "0"  # torchrun guesses it from the address, wrongly behind some names
        words += ["--rdzv-backend=c10d", f"--rdzv-endpoint={args.address}:{args.port}", f"--rdzv-id={args.id}",
                  f"--rdzv-conf=is_host={hosts}"]  # fmt: skip
    return [*words, "-m", "megatron_scratch.train.worker", str(config), f"--start-folder={start.folder}"]


def attend(command: list[str]) -> int:
    """Run torchrun until it ends; its exit code, which says little."""
    # The first for c10d, where a restart else reads addresses of the dead (torch 2.13, pytorch issue 135712); train/build.py
    # has the answer for a static rendezvous. The second for releases that know it; the ranks are told to stop before.
    env = {**everything(), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "PET_SHUTDOWN_TIMEOUT": "60"}
    told = Told()
    told.listen()
    with subprocess.Popen(command, env=env, start_new_session=True, preexec_fn=die_with_parent) as agent:
        while agent.poll() is None:
            told.pass_on(agent.pid)
            time.sleep(POLL)
    return agent.returncode


def judge(ends: list[End], ranks: int, code: int) -> None:
    """What the ranks of this machine came to; returns where they have finished.

    Args:
        ends: of the ranks that said how they ended. ranks: how many there were. code: of torchrun.

    Raises:
        UserError, StopRequested, RunFailed: as the ranks ended.
    """
    if refused := next((end for end in ends if end.code == BAD_INPUT), None):
        raise UserError(refused.message)
    if len(ends) == ranks and all(end.code == OK for end in ends):  # whatever came over torchrun after that
        return
    bad = [end for end in ends if end.code not in (OK, STOPPED)]
    if not bad and len(ends) == ranks and (stopped := next((end for end in ends if end.code == STOPPED), None)):
        raise StopRequested(stopped.message)
    said = "; ".join(f"rank {end.rank} on {end.host}: {end.message}" for end in bad[:4])
    raise RunFailed(said or f"torchrun ended with {code}, and {ranks - len(ends)} of {ranks} ranks did not say why; see their logs")


def given(args: argparse.Namespace) -> Config:
    """The config of the run: a resolved one from a file, or composed from words as `train` does it."""
    if args.config is not None:
        cfg = compose.load_file(args.config)
        if isinstance(cfg.launcher, ClusterConfig):
            args.nodes, args.ranks = cfg.launcher.nodes, cfg.launcher.gpus_per_node
        return cfg
    cfg, world = compose.load(args.words), args.nodes * args.ranks
    if cfg.launcher.name != "local":
        raise UserError(f"launcher={cfg.launcher.name} submits a job and cannot be given to torchrun; leave it out")
    if cfg.launcher.processes not in (None, world):
        raise UserError(f"launcher.processes={cfg.launcher.processes}, but torchrun starts {world}; leave it out")
    return resolve(cfg, world, args.nodes)


def claim(args: argparse.Namespace, cfg: Config, folder: Path) -> Start:
    """The next start, unless those before it came to nothing too often: counted by the first machine, in the run directory."""
    if not args.count or args.node != 0:
        return Start.claim(folder / "starts", None)
    from megatron_scratch.checkpoint.manifest import committed

    newest = max(committed(Path(cfg.dir) / "checkpoints"), default=None)
    start = Start.claim(Path(cfg.dir) / "jobs" / "kubernetes" / "starts", newest)
    if (idle := start.without_progress()) > cfg.launcher.max_restarts:
        raise GivenUp(f"{idle} starts in a row have left no new checkpoint after step {newest}; giving up "
                      f"(launcher.max_restarts={cfg.launcher.max_restarts})")  # fmt: skip
    return start


class GivenUp(RunFailed):
    """Another start would be the same again."""


def run(args: argparse.Namespace) -> None:
    """Train with this machine's share of the ranks.

    Raises:
        UserError, StopRequested, RunFailed: as the ranks ended.
    """
    choice("--rendezvous", args.rendezvous, RENDEZVOUS)
    cfg = given(args)
    if not 0 <= args.node < args.nodes:
        raise UserError(f"node number {args.node} is not in 0..{args.nodes - 1}; give each machine its own (NODE_RANK)")
    with tempfile.TemporaryDirectory(prefix="megatron_scratch_") as tmp:
        compose.save(cfg, Path(tmp) / "config.yaml")
        start = claim(args, cfg, Path(tmp))
        code = attend(elastic(args, Path(tmp) / "config.yaml", start))
        judge(start.ends(), args.ranks, code)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="torchrun.sh", usage="launch/torchrun.sh [key=value ...]; its head lists its variables", allow_abbrev=False
    )
    numbers: dict[str, int] = {"--nodes": 1, "--node": 0, "--ranks": 1, "--restarts": 0, "--port": 29500}
    for name, default in numbers.items():
        made.add_argument(name, type=int, default=default)
    for name, text in {"--address": "127.0.0.1", "--rendezvous": "static", "--id": "megatron_scratch"}.items():
        made.add_argument(name, default=text)
    made.add_argument("--config", type=Path, help="a resolved config, instead of words")
    made.add_argument("--count", action="store_true", help="give up after launcher.max_restarts starts without a new checkpoint")
    made.add_argument("--retryable", action="store_true", help=f"add {RETRYABLE} to the exit codes after which to start again")
    made.add_argument("words", nargs="*")
    return made


def main(argv: list[str] | None = None) -> int:
    """Exit codes: those of `train`; 3: given up after too many starts without progress."""
    args = parser().parse_intermixed_args(argv)
    code = exit_code(_giving_up(lambda: run(args)))
    return code + RETRYABLE if args.retryable and code in (FAILED, STOPPED) else code


def _giving_up(work: Callable[[], None]) -> Callable[[], int]:
    def inner() -> int:
        try:
            work()
        except GivenUp as error:
            print(f"failed: {error}", file=sys.stderr, flush=True)
            return GIVEN_UP
        return OK

    return inner


if __name__ == "__main__":
    raise SystemExit(main())
