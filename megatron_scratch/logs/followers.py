"""The rank's end of its followers (`logs/follow.py`): starts them, hears them, waits for them a short while at the end."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_scratch.config import Config
from megatron_scratch.config.logging import sinks
from megatron_scratch.logs.follow import GAVE_UP
from megatron_scratch.logs.state import identify, read_state
from megatron_scratch.util.exits import OK
from megatron_scratch.util.machine import descendants, start_helper

LIMIT = 9.0  # seconds that the end of a run waits for all followers together
NICE = 5  # they give way to training, which shares the cores with them
RESTARTS = 3  # of one follower, in one start of a run


class Followers:
    """One process for each sink of a run. Nothing here raises because of one, and nothing but `close` waits."""

    def __init__(self, cfg: Config, run_dir: Path) -> None:
        self.run_dir = Path(run_dir)
        self.ends = {name: End(name, self.run_dir) for name, _ in sinks(cfg.logging)}
        self.lines: list[str] = []

    def start(self, step: int, remembered: Mapping[str, Any] | None = None) -> None:
        """The run directory has its config.yaml and its `start` event: followers may read.

        Args:
            step: the run goes on after it.
            remembered: what `state` gave to the checkpoint that the run goes on from; nothing, if that is another run's.
        """
        for name, end in self.ends.items():
            try:
                identify(self.run_dir, name, (remembered or {}).get(name))
                end.start(step)
            except OSError as error:
                self.lines.append(f"{name}: cannot be started: {error}; the run goes on without it")

    def state(self, step: int) -> dict[str, Any]:
        """Sink -> JSON for the checkpoint of `step`: what `flush` returned, without lists and dictionaries, which may be long."""
        kept = {name: read_state(self.run_dir, name) for name in self.ends}
        plain = {name: {k: v for k, v in state.items() if not isinstance(v, (list, dict))} for name, state in kept.items()}
        return {name: {"step": step, **state} for name, state in plain.items() if state}

    def told(self) -> list[str]:
        """What followers have said since the last call, for the person who watches. One that has died is started anew."""
        for end in self.ends.values():
            end.listen()
            end.revive()
        return self._said()

    def close(self, outcome: str, code: int) -> None:
        """Say how the run has ended (finished, stopped, failed), and wait, at most `LIMIT` seconds; `told` then has the rest."""
        deadline = time.monotonic() + LIMIT
        for end in self.ends.values():
            end.say({"outcome": outcome, "code": code, "seconds": LIMIT})
        for end in self.ends.values():
            end.finish(deadline)

    def _said(self) -> list[str]:
        out, self.lines = self.lines, []
        for end in self.ends.values():
            out, end.lines = out + end.lines, []
        return out


class End:
    """The rank's end of one follower."""

    def __init__(self, name: str, run_dir: Path) -> None:
        self.name, self.run_dir = name, run_dir
        self.process: subprocess.Popen[bytes] | None = None
        self.starts, self.step = 0, 0
        self.rest = b""  # of a line
        self.lines: list[str] = []

    def start(self, step: int) -> None:
        """In a session of its own, so that a terminal's Ctrl-C reaches neither it nor what its packages start."""
        command = [sys.executable, "-m", "megatron_scratch.logs.follow", self.name, str(self.run_dir / "config.yaml"), str(step)]
        self.step, self.starts, self.rest = step, self.starts + 1, b""
        self.process = start_helper(command, bufsize=0, start_new_session=True)
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, self.process.pid, NICE)

    def listen(self) -> None:
        """Take what it has said; does not wait."""
        while self.process is not None and self.process.stdout is not None and not self.process.stdout.closed:
            if not select.select([self.process.stdout], [], [], 0)[0]:
                return
            if not (content := self.process.stdout.read(1 << 16)):
                return self.process.stdout.close()
            *lines, self.rest = (self.rest + content).split(b"\n")
            self.lines += [f"{self.name}: {line.decode(errors='replace')}" for line in lines]

    def revive(self) -> None:
        """Start it anew if it has died; not if it has given up, which it has said, or dies again and again."""
        if self.process is None or (code := self.process.poll()) is None:
            return
        self._free()
        if code in (OK, GAVE_UP):
            return
        again = self.starts <= RESTARTS
        self.lines.append(f"{self.name}: its process has ended with {code}; " + ("started anew" if again else
                          "it is left alone, and the next start of the run goes on with it"))  # fmt: skip
        if again:
            with suppress(OSError):
                self.start(self.step)

    def say(self, order: dict[str, Any]) -> None:
        """Tell it how the run has ended, and that nothing else comes."""
        if self.process is not None and self.process.stdin is not None:
            with suppress(OSError):  # it is gone
                self.process.stdin.write(json.dumps(order).encode() + b"\n")
            with suppress(OSError):
                self.process.stdin.close()

    def finish(self, deadline: float) -> None:
        """Wait for it, not beyond the deadline; then end it, and what its packages have started."""
        if self.process is None:
            return
        try:
            self.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.lines.append(f"{self.name}: not all is sent yet; nobody waits longer, the next start of the run goes on with it")
            for pid in [self.process.pid, *descendants(self.process.pid)]:  # a package's helper may have a session of its own
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        else:
            if (code := self.process.returncode) < 0:
                self.lines.append(f"{self.name}: its process has ended with {code}; the next start of the run goes on with it")
        self.process.wait()
        self._free()

    def _free(self) -> None:
        assert self.process is not None
        self.listen()
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(OSError):
                if pipe is not None:
                    pipe.close()
        self.process = None
