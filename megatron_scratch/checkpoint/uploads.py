"""The rank's end of the process in `checkpoint/uploader.py`: tells it steps, hears what has become of them, waits for it only when
asked to. No torch."""

from __future__ import annotations

import json
import select
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import Any

from megatron_scratch.checkpoint.attempt import Attempt
from megatron_scratch.checkpoint.manifest import step_folder
from megatron_scratch.config.train import CheckpointConfig
from megatron_scratch.util.errors import RunFailed
from megatron_scratch.util.machine import start_helper

STALL = 600.0  # seconds without a sign that end the waiting; a sign is 4 MiB read back, or a file (up to 512 MiB) sent
POLL = 1.0

Event = dict[str, Any]


class Uploads:
    """What is on its way to `cfg.remote`: one checkpoint at a time, the newest first. One process of a run has it."""

    def __init__(self, cfg: CheckpointConfig, attempt: Attempt) -> None:
        assert cfg.remote
        self.cfg, self.attempt = cfg, attempt
        self.queue: dict[int, bool] = {}  # step -> whether to trust what is there already
        self.flying: int | None = None
        self.failed: dict[int, str] = {}  # step -> why; tried again at the next save
        self.process: subprocess.Popen[bytes] | None = None
        self.rest = b""  # of a line
        self.heard = 0.0

    def begin(self, what: str) -> None:
        """`prove`: see whether the storage can be written to. `fetch`: bring its newest whole checkpoint here."""
        self._tell({"do": what})

    def answer(self, what: str) -> Event | None:
        """What came of that, with "error" if nothing did; None: it is not over. Does not wait."""
        events, lost = self._read(0)
        return {"error": lost} if lost else next((event for event in events if event["did"] == what), None)

    def submit(self, steps: Iterable[int], trust: bool = False) -> None:
        """Have committed checkpoints brought there, and those that failed before.

        Args:
            trust: of those that are there already, only sizes are compared.
        """
        for step in (*self.failed, *steps):
            self.queue[step] = trust and step not in self.failed
        self.failed.clear()
        self._next()

    def held(self) -> set[int]:
        """Steps whose local checkpoints must not be deleted: nobody has read them back from the remote storage."""
        return {*self.queue, *self.failed} | ({self.flying} if self.flying is not None else set())

    def poll(self, timeout: float = 0) -> list[Event]:
        """What has become of uploads since the last call, with "error" where one has failed. Does not wait, unless told to."""
        if self.flying is None:
            return []
        events, lost = self._read(timeout)
        events = [event for event in events if event["did"] == "upload"]
        if lost:
            events.append({"did": "upload", "step": self.flying, "error": lost})
        for event in events:
            self.flying = None
            if "error" in event and step_folder(self.attempt.root, event["step"]).is_dir():  # or it was damaged, and set aside
                self.failed[event["step"]] = event["error"]
        self._next()
        return events

    def finish(self) -> list[Event]:
        """Try once more what has failed, and wait until nothing is on its way. `failed` is then what is not there."""
        self.submit(())
        events: list[Event] = []
        while self.flying is not None:
            events += self.poll(POLL)
        return events

    def check(self) -> None:
        """
        Raises:
            RunFailed: some checkpoints are not there.
        """
        if self.failed:
            steps, why = ", ".join(map(str, sorted(self.failed))), self.failed[max(self.failed)]
            raise RunFailed(f"the checkpoints of step {steps} are not on {self.cfg.remote} ({why}); they are whole in "
                            f"{self.attempt.root}: run the same command to try again")  # fmt: skip

    def close(self) -> None:
        """End the process; what it was sending is no checkpoint there."""
        if self.process is None:
            return
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()  # nothing is buffered
        self.process, self.rest = None, b""

    def _next(self) -> None:
        if self.flying is None and self.queue:
            self.flying = max(self.queue)  # what would be lost most with this machine
            self._tell({"do": "upload", "step": self.flying, "trust": self.queue.pop(self.flying)})

    def _tell(self, command: dict[str, Any]) -> None:
        if self.process is None:
            line = [sys.executable, "-m", "megatron_scratch.checkpoint.uploader", self.cfg.remote, self.attempt.root,
                    self.attempt.number, self.cfg.keep_last, self.cfg.keep_every]  # fmt: skip
            self.process = start_helper([str(word) for word in line], bufsize=0)
        assert self.process.stdin is not None
        self.heard = time.monotonic()
        try:
            self.process.stdin.write(json.dumps(command).encode() + b"\n")
        except BrokenPipeError:
            pass  # reading says what has become of it

    def _read(self, timeout: float) -> tuple[list[Event], str]:
        """What it has said, waiting for the first of it; and why it will say no more. It is then started anew at the next need."""
        assert self.process is not None and self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], timeout)[0]:
            silent = time.monotonic() - self.heard
            return [], self._lost(f"no sign of life in {silent:.0f} s") if silent > STALL else ""
        self.heard = time.monotonic()
        content = self.process.stdout.read(1 << 16)
        *lines, self.rest = (self.rest + content).split(b"\n")
        lost = "" if content else self._lost(f"its process has ended with {self.process.wait()}")
        return [event for event in map(json.loads, lines) if event], lost

    def _lost(self, why: str) -> str:
        self.close()
        return why
