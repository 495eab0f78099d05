"""The process that brings a run's files to one sink: `python -m megatron_scratch.logs.follow SINK CONFIG [STEP]`. No torch.

It only reads what training writes, so nothing that it does or suffers can change or delay a number. `logs/followers.py` is its
other end: a line of JSON on its input says how the run has ended; the end of its input without one, that the rank has died. What it
says on its output is for the person who watches; all that it or a package prints is in RUN/logs/SINK.log.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

from megatron_scratch import registry
from megatron_scratch.config import compose
from megatron_scratch.logs.sink import Begin, Sink
from megatron_scratch.logs.source import Source
from megatron_scratch.logs.state import SENT, read_state, write_state
from megatron_scratch.logs.tail import Rows
from megatron_scratch.util.errors import UserError
from megatron_scratch.util.exits import FAILED, OK
from megatron_scratch.util.machine import outlive_rank

POLL = 0.3  # seconds between two looks at the files
KEEP = 5.0  # seconds between two `flush`; a sink's `flush_seconds` counts, where its settings have that
LONGEST = 60.0  # seconds between two tries to open a sink; they begin with 2 and double
BROKEN = 5  # failures in a row, of a sink that could be opened, after which it is left alone
AFTERLIFE = 10  # seconds that a follower has when its rank has died, whatever it is doing; one that ends says how long
GAVE_UP = 3  # exit code: another start in the same run would come to the same
CRASHED = ("crashed", FAILED)

FILES = {"metrics": "metrics.jsonl", "layers": "layers.jsonl", "sample": "samples.jsonl", "event": "ledger.jsonl"}  # by method
GOES_BACK = {"start": "step", "rollback": "to", "rewind": "step"}  # events of the ledger after which steps are computed anew


class Orders:
    """What the rank says, heard by a thread of its own: a sink may hang when it comes."""

    def __init__(self) -> None:
        self.outcome: tuple[str, int] | None = None
        self.event = Event()
        Thread(target=self._listen, daemon=True).start()

    def wait(self, seconds: float) -> None:
        """Until the run has ended, or `seconds` are over."""
        self.event.wait(seconds)

    def _listen(self) -> None:
        heard, left = b"", AFTERLIFE
        with suppress(OSError):
            while b"\n" not in heard and (piece := os.read(0, 4096)):
                heard += piece
        with suppress(ValueError, KeyError, TypeError):
            said = json.loads(heard)
            # A second more than the rank waits: if it lives, it has ended this process by then.
            self.outcome, left = (str(said["outcome"]), int(said["code"])), math.ceil(said["seconds"]) + 1
        self.outcome = self.outcome or CRASHED
        signal.alarm(left)
        self.event.set()


class Follower:
    """One sink: opened, fed, opened anew where it fails."""

    def __init__(self, sink: str, config: Path, step: int | None, orders: Orders, tell: Callable[[str], None]) -> None:
        self.name, self.run_dir, self.step, self.orders, self.tell = sink, config.parent, step, orders, tell
        self.cfg = compose.load_file(config)
        self.settings = self.cfg.logging[sink]
        self.every = float(getattr(self.settings, "flush_seconds", KEEP))
        self.sink: Sink | None = None
        self.sources: dict[str, Source] = {}
        self.id: str | None = None
        self.broken, self.worked = 0, False

    def run(self) -> int:
        """Until the run has ended, or the sink has to be left alone; the exit code."""
        pause = 1.0
        while True:
            last = self.orders.outcome is not None  # then this is the last try
            try:
                self._follow()
                return OK
            except Exception as error:
                traceback.print_exc()
                self.broken += self.sink is not None
                pause, self.worked = 1.0 if self.worked else pause, False
                if isinstance(error, (ImportError, UserError)) or self.broken >= BROKEN:
                    self.tell(f"given up: {_reason(error)}")
                    return GAVE_UP
                if last:
                    self.tell(f"not all is sent ({_reason(error)}); the next start of the run goes on with it")
                    return FAILED
                if pause == 1.0:
                    self.tell(f"{_reason(error)}; the run goes on, and what it writes is sent later")
                pause = 2.0 if self.sink is not None else min(2 * pause, LONGEST)
            self.orders.wait(pause)

    def _follow(self) -> None:
        """Open the sink and give it what it has not had, to the end of the run."""
        self.sink = None
        state = read_state(self.run_dir, self.name)
        sent = state.pop(SENT, {})
        self.id = state.get("id")
        for source in self.sources.values():
            source.close()
        self.sources = {m: Source(self.run_dir / file, sent.get(file, {}), m != "event") for m, file in FILES.items()}
        facts, lowest = self._starts(sent.get(FILES["event"], {}).get("rows", 0))
        step = int(facts.get("step", 0)) if self.step is None else self.step
        begin = Begin(self.run_dir, compose.plain(self.cfg), self.cfg.name, state, step, facts)
        self.sink = registry.get("logging", self.name)(self.settings, begin, self.tell)
        if lowest is not None:
            self._go_back(lowest)
        kept = time.monotonic()
        while True:
            outcome = self.orders.outcome  # asked before the files are read: what was written before it is then seen
            busy = self._give()
            if time.monotonic() - kept >= self.every or (outcome and not busy):
                self._keep()
                kept = time.monotonic()
            if outcome and not busy:
                return self.sink.close(*outcome)
            if not busy:
                self.orders.wait(POLL)

    def _starts(self, had: int) -> tuple[dict[str, Any], int | None]:
        """The newest `start` of the ledger, and the lowest step to which the run has gone back since the `had`-th event."""
        rows, events = Rows(self.run_dir / FILES["event"]), []
        while more := rows.new():
            events += more
        rows.close()
        facts = next((event for event in reversed(events) if event.get("event") == "start"), {})
        back = [event.get(GOES_BACK.get(event.get("event"), "")) for event in events[had:]]
        return facts, min((step for step in back if isinstance(step, int)), default=None)

    def _give(self) -> bool:
        """Hand over what is new. False: there was nothing."""
        assert self.sink is not None
        busy = False
        for method, source in self.sources.items():
            dropped, rows = source.take()
            if dropped is not None:
                self._go_back(dropped)
                return True
            for row in rows:
                getattr(self.sink, method)(row)
            busy = busy or bool(rows)
        return busy

    def _go_back(self, step: int) -> None:
        """Steps after `step` are computed anew: what came of them has to be dropped, if anything did."""
        assert self.sink is not None
        stepped = [source for source in self.sources.values() if source.stepped]
        if any(source.last > step for source in stepped):
            self.sink.rewound(step)
            for source in stepped:
                source.back_to(step)

    def _keep(self) -> None:
        assert self.sink is not None
        sent = {FILES[method]: source.sent() for method, source in self.sources.items()}
        state = {"id": self.id, **self.sink.flush(), SENT: sent}
        if state != read_state(self.run_dir, self.name):
            write_state(self.run_dir, self.name, state)
        self.broken, self.worked = 0, True


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if not isinstance(error, UserError) else str(error)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Wait for the follower of an earlier start, which may have something to finish; once the run has ended, that is soon over."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as f:
        while True:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(POLL)
                continue
            except OSError:  # a file system without locks
                pass
            yield
            return


def _voice(log: Path) -> Callable[[str], None]:
    """Have all output go to `log`, but for what is said by the function that this returns."""
    log.parent.mkdir(parents=True, exist_ok=True)
    out, file = os.dup(1), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
    os.set_inheritable(out, False)
    os.set_blocking(out, False)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]

    def tell(text: str) -> None:
        line = " ".join(text.split())[:1000]
        print(time.strftime("%Y-%m-%d %H:%M:%S"), line)
        with suppress(OSError):  # nobody listens, or has for long
            os.write(out, line.encode() + b"\n")

    return tell


def main() -> int:
    outlive_rank(AFTERLIFE)
    os.umask(0o027)
    sink, config, step = sys.argv[1], Path(sys.argv[2]), [int(word) for word in sys.argv[3:]]
    tell = _voice(config.parent / "logs" / f"{sink}.log")
    orders = Orders()
    try:
        follower = Follower(sink, config, step[0] if step else None, orders, tell)
    except (UserError, KeyError) as error:
        tell(f"given up: {error}")
        return GAVE_UP
    with alone(config.parent / sink / ".lock"):
        return follower.run()


if __name__ == "__main__":
    from megatron_scratch.util.exits import leave_with

    leave_with(main)
