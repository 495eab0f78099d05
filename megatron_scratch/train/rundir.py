"""The run directory: one holder at a time, one resolved config, a metrics file without overlaps, a ledger of events."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_scratch.util.errors import UserError
from megatron_scratch.util.files import atomic_write


class RunDir:
    """Paths and files of one run. Only the main rank writes; every rank may read."""

    def __init__(self, path: str | Path, fence: Callable[[], None] = lambda: None) -> None:
        """`fence`: raises where a later start of the run has taken over; asked before each row that is written."""
        self.path, self.fence = Path(path), fence
        self.config = self.path / "config.yaml"
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.layers = self.path / "layers.jsonl"  # statistics of each layer, with train.layers_every
        self.samples = self.path / "samples.jsonl"  # text of the model, with train.samples.every
        self.ledger = self.path / "ledger.jsonl"
        self.logs = self.path / "logs"
        self.plot = self.path / "loss.png"
        self.heartbeats = self.path / "heartbeats"
        self.save = self.path / "save"  # a file that anyone may make: the run saves a checkpoint, and takes it away
        self.stop = self.path / "stop"  # a file that anyone may make: the run saves and ends, and does not start while it is there

    def log_file(self, rank: int) -> Path:
        return self.logs / f"rank_{rank:05d}.log"

    def create(self) -> None:
        """Make the folders, and prove that they can be written to before anything is computed."""
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
            probe = self.path / f".probe.{os.getpid()}"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise UserError(f"dir={self.path} cannot be written: {error.strerror}; give another dir=") from error

    def check_stop(self) -> None:
        """Refuse to start a run that was asked to stop and stay stopped."""
        if self.stop.exists():
            raise UserError(f"{self.stop} is there, which stops the run; remove it to go on")

    @contextmanager
    def locked(self, job: str = "") -> Iterator[None]:
        """Hold the run directory. The kernel frees the lock with the process that holds it, however that ends.

        Args:
            job: which job of a cluster starts the run. Only one start of a job is meant to be alive: where an earlier one still
                holds the lock, on a node that nobody reaches, this one takes over, and its attempt fences the other off.

        Raises:
            UserError: another live process holds it; the message names it.
        """
        with open(self.path / ".lock", "a+", encoding="utf-8") as f:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                f.seek(0)
                holder = f.read().strip()
                if not (job and holder.endswith(f" for job {job}")):
                    raise UserError(f"dir={self.path} is in use by {holder or 'another process'}; "
                                    "wait for it, stop it, or give another dir=") from None  # fmt: skip
                self.record("takeover", holder=holder)
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
                # A file system without locks. A second start then takes over: its attempt fences this one off.
            f.truncate(0)
            f.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"
                    + (f" for job {job}" if job else ""))  # fmt: skip
            f.flush()
            yield

    def record(self, event: str, **facts: Any) -> None:
        """Append one event to the ledger: what happened, when, at which step, why."""
        self.fence()
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, **facts}
        _append(self.ledger, line)

    def log(self, row: dict[str, Any]) -> None:
        """Append one row of metrics."""
        self.fence()
        _append(self.metrics, row)

    def log_layers(self, row: dict[str, Any]) -> None:
        """Append one row of statistics by layer."""
        self.fence()
        _append(self.layers, row)

    def sample(self, row: dict[str, Any]) -> None:
        """Append one text of the model."""
        self.fence()
        _append(self.samples, row)

    def last(self, key: str) -> Any:
        """The newest value of a metric, or None."""
        return next((row[key] for row in reversed(_read(self.metrics)) if key in row), None)

    def rewind(self, step: int) -> None:
        """Drop the rows after `step`: a resumed run computes those steps again, and the files keep one row a step.

        The ledger's `rewind` says what is thrown away: up to which step, and how much time of steps."""
        rows = _read(self.metrics)
        for path in (self.metrics, self.layers, self.samples):
            _keep(path, step)
        if rows and (last := max(row["step"] for row in rows)) > step:
            self.record("rewind", step=step, to=last, seconds=round(_seconds_after(step, rows), 3))


def _keep(path: Path, step: int) -> None:
    """Only the rows up to `step`, each in a line of its own; a file that has no others is left as it is."""
    rows = _read(path)
    kept = [row for row in rows if row["step"] <= step]
    if len(kept) < len(rows) or _torn(path):
        with atomic_write(path, "w") as f:
            f.writelines(json.dumps(row) + "\n" for row in kept)


def _torn(path: Path) -> bool:
    """Whether a killed process has left half a last line, which the next row would be added to."""
    if not path.exists() or not path.stat().st_size:
        return False
    with open(path, "rb") as f:
        f.seek(-1, os.SEEK_END)
        return f.read(1) != b"\n"


def _seconds_after(step: int, rows: list[dict[str, Any]]) -> float:
    """How long the logged steps after `step` took."""
    before, seconds = step, 0.0
    for row in rows:
        if row["step"] > step and "step_seconds" in row:
            seconds += row["step_seconds"] * (row["step"] - before)
            before = row["step"]
    return seconds


def _append(path: Path, row: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(row) + "\n")


def _read(path: Path) -> list[dict[str, Any]]:
    return read_jsonl(path) if path.exists() else []


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that a killed process may have left with half a last line."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows
