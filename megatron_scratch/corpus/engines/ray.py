"""`corpus.engine=ray`: tasks on the Ray cluster that RAY_ADDRESS names, else on a local Ray that ends with the run.

Ray gets two words per task, a folder and a number, and gives the worker's answer back; all else goes over files that every node
sees under the same paths. A worker that dies is replaced by Ray, and its task runs again.
"""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_scratch.config.corpus import CorpusConfig
from megatron_scratch.config.launcher import LauncherConfig
from megatron_scratch.util.env import prepare_ray
from megatron_scratch.util.errors import RunFailed, StopRequested, UserError
from megatron_scratch.util.machine import cores
from megatron_scratch.util.signals import handled

RETRIES = 3  # of a task whose worker or node died
POLL = 0.5  # seconds between two looks for a signal
AHEAD = 2  # tasks submitted for each that runs, so that no worker waits for us


class Ray:
    """A connection to Ray for all stages; at most `corpus.workers` tasks at a time, or as many as the cluster has cores."""

    def __init__(self, cfg: CorpusConfig, work: Path, say: Callable[[str], Any], launcher: LauncherConfig):
        try:
            import ray
        except ModuleNotFoundError as error:
            raise UserError("corpus.engine=ray needs the package ray; run: pip install 'megatron-scratch[ray]', or give "
                            "corpus.engine=local") from error  # fmt: skip
        self.ray, self.say, self.workers = ray, say, cfg.workers
        self.here = str(Path.cwd())

    def __enter__(self) -> Ray:
        address = prepare_ray()
        _reach(address)
        self.ours = not self.ray.is_initialized()
        if self.ours:
            local = {} if address else {"num_cpus": self.workers or cores(), "include_dashboard": False, "address": "local"}
            heard = signal.getsignal(signal.SIGTERM)
            try:
                self.ray.init(log_to_driver=False, logging_level="error", **local)
            except ConnectionError as error:
                why = " ".join(str(error).split())[:200]
                raise UserError(f"RAY_ADDRESS={address} does not take us: {why}; give its token (RAY_AUTH_TOKEN), or "
                                "unset RAY_ADDRESS for a local Ray") from error  # fmt: skip
            except BaseException:
                self.ray.shutdown()
                raise
            if signal.getsignal(signal.SIGTERM) is not heard:  # Ray has put its own there, which ends us without a word
                signal.signal(signal.SIGTERM, heard)
        self.task = self.ray.remote(num_cpus=1, max_retries=RETRIES)(_answer)
        return self

    def __exit__(self, *error: object) -> None:
        if self.ours:
            self.ray.shutdown()

    def run(self, folder: Path, pending: list[int], finished: Callable[[int], bool]) -> Iterator[int]:
        """See `corpus.stages.Engine`."""
        most = self.workers or AHEAD * max(1, int(self.ray.cluster_resources().get("CPU", 1)))
        left, running = list(reversed(pending)), {}
        asked: list[int] = []
        try:
            with handled(lambda number, frame: asked.append(number)):  # Ray's C++ would swallow what a handler raises
                while left or running:
                    while left and len(running) < most:
                        index = left.pop()
                        running[self.task.remote(self.here, str(folder.absolute()), index)] = index
                    for reference in self.ray.wait(list(running), num_returns=1, timeout=POLL)[0]:
                        index = running.pop(reference)
                        self._judge(self._get(reference, folder, index), folder, index)
                        yield index
                    if asked:
                        raise StopRequested(f"{signal.Signals(asked[0]).name}; what is finished is kept, the same command goes on")
        finally:
            for reference in running:
                self.ray.cancel(reference, force=True)

    def _get(self, reference: Any, folder: Path, index: int) -> dict[str, Any]:
        try:
            return self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            why = " ".join(str(error).split())[:300]
            raise RunFailed(
                f"{folder.name}, task {index}: Ray gave up: {why}; the same command goes on where this one ended"
            ) from error

    def _judge(self, told: dict[str, Any], folder: Path, index: int) -> None:
        if told:
            raise (UserError if told.get("user") else RunFailed)(f"{told['error'].strip()} ({folder.name}, task {index})")


def _reach(address: str | None) -> None:
    """Refuse HOST:PORT where nobody listens: Ray would try for two minutes, deaf to Ctrl-C."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise UserError(f"RAY_ADDRESS={address} does not answer ({error}); start Ray there, or unset it for a local one") from error


def _answer(here: str, folder: str, index: int) -> dict[str, object]:
    """Run a task on the node that Ray chose. Paths that are relative were given relative to `here`."""
    import os

    from megatron_scratch.corpus.work import answer

    try:
        os.chdir(here)
    except OSError as error:
        return {"error": f"{here} is not there on a node of the Ray cluster ({error.strerror}); all nodes must see the same files",
                "user": True}  # fmt: skip
    return answer(folder, index)
