"""`corpus.engine=local`: processes on this machine, started once for all stages."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any

from megatron_scratch.config.corpus import CorpusConfig
from megatron_scratch.config.launcher import LauncherConfig
from megatron_scratch.corpus.stages import run_task
from megatron_scratch.util import env
from megatron_scratch.util.errors import RunFailed, UserError
from megatron_scratch.util.machine import cores, start_helper


class Local:
    """`corpus.workers` processes; with one, tasks run in this process."""

    def __init__(self, cfg: CorpusConfig, work: Path, say: Callable[[str], Any], launcher: LauncherConfig):
        self.workers = cfg.workers or cores()
        self.started: list[_Worker] = []

    def __enter__(self) -> Local:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self.started:
            worker.end()

    def run(self, folder: Path, pending: list[int], finished: Callable[[int], bool]) -> Iterator[int]:
        if self.workers == 1 or len(pending) == 1:
            for index in pending:
                try:
                    run_task(folder, index)
                except OSError as error:
                    raise _failure({"error": f"{type(error).__name__}: {error}"}, folder, index) from error
                yield index
            return
        while len(self.started) < min(self.workers, len(pending)):
            self.started.append(_Worker())
        left: Queue[int] = Queue()
        done: Queue[tuple[int, dict[str, Any]]] = Queue()
        for index in pending:
            left.put(index)
        for worker in self.started:
            Thread(target=worker.work, args=(str(folder), left, done), daemon=True).start()
        for _ in pending:
            index, told = done.get()
            if told:
                raise _failure(told, folder, index)
            yield index


def _failure(told: dict[str, Any], folder: Path, index: int) -> Exception:
    return (UserError if told.get("user") else RunFailed)(f"{told['error'].strip()} ({folder.name}, task {index})")


class _Worker:
    """A process that runs tasks one at a time. It is in no terminal's group: Ctrl-C is ours to hear."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "megatron_scratch.corpus.work"]
        self.process = start_helper(command, env=env.everything(), text=True, start_new_session=True)

    def work(self, folder: str, left: Queue[int], done: Queue[tuple[int, dict[str, Any]]]) -> None:
        """Until no task is left, one fails, or the process dies."""
        while True:
            try:
                index = left.get_nowait()
            except Empty:
                return
            told = self._ask(folder, index)
            done.put((index, told))
            if told:
                return

    def _ask(self, folder: str, index: int) -> dict[str, Any]:
        try:
            self.process.stdin.write(json.dumps([folder, index]) + "\n")  # type: ignore[union-attr]
            self.process.stdin.flush()  # type: ignore[union-attr]
            line = self.process.stdout.readline()  # type: ignore[union-attr]
        except (BrokenPipeError, ValueError):
            line = ""
        if line:
            return json.loads(line)
        return {"error": f"a worker process ended with code {self.process.wait()} (-9 is the kernel's when memory runs out: lower "
                         "corpus.workers or corpus.shard_mb); the same command goes on where this one ended"}  # fmt: skip

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            with suppress(OSError):  # what it was told last and did not read
                stream.close()  # type: ignore[union-attr]
