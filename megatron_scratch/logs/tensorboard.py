"""TensorBoard event files, written with TensorBoard's own package and no torch.

Tags: `train/loss`, ... and `eval/val_loss`, ... for each number of a row, `layers/STATISTIC/MODULE`, and as text `samples/PROMPT`,
`alerts` and `config`. Steps that are computed anew replace the old ones (a `SessionLog` START, TensorBoard's own way to say so).
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.summary.writer.record_writer import RecordWriter

from megatron_scratch.config.logging import TensorboardConfig
from megatron_scratch.logs.alerts import alert
from megatron_scratch.logs.sink import Begin, Row

OMITTED = ("step", "time")  # of a row: they are where its numbers stand
NOTES = 100  # texts kept, to be written again where a START takes them away
TEXT = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))


class Tensorboard:
    """One event file for each time that it is opened; together they have each step once."""

    def __init__(self, settings: TensorboardConfig, begin: Begin, say: Callable[[str], None]) -> None:
        self.folder = Path(settings.dir) if settings.dir else begin.run_dir / "tensorboard"
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {} if "step" in begin.state else begin.state  # all rows come again, and what files there are holds no more
        self.newest: int = state.get("newest", -1)  # step
        self.notes: list[list[Any]] = state.get("notes", [])  # [step, time, tag, text]
        self._cut(state)
        self.file = open(_next_file(self.folder), "xb")
        self.writer = RecordWriter(self.file)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._start_again_at(self.newest + 1)  # in every file: TensorBoard takes no notice of the first that it sees
        self._note(begin.start_step, time.time(), "config", _code(OmegaConf.to_yaml(OmegaConf.create(begin.config))))
        say(f"tensorboard --logdir {self.folder}")

    def metrics(self, row: Row) -> None:
        group = "eval" if "val_loss" in row else "train"
        self._scalars(row, {f"{group}/{key}": value for key, value in row.items() if key not in OMITTED})

    def layers(self, row: Row) -> None:
        layers = row.get("layers", {}).items()
        self._scalars(row, {f"layers/{key}/{name}": value for name, found in layers for key, value in found.items()})

    def sample(self, row: Row) -> None:
        prompt = " ".join(str(row.get("prompt", "")).split())[:60] or "no prompt"
        self._text(row["step"], _when(row), f"samples/{prompt}", _code(f"{row.get('prompt', '')}{row.get('text', '')}"))

    def event(self, row: Row) -> None:
        if found := alert(row):
            step = max(self.newest, 0) if found.step is None else found.step
            self._note(step, _when(row), "alerts", f"**{found.title}** ({found.level}): {found.text}")

    def rewound(self, step: int) -> None:
        self.newest = min(self.newest, step)
        self._start_again_at(step + 1)

    def flush(self) -> dict[str, Any]:
        self.file.flush()
        os.fsync(self.file.fileno())
        return {"newest": self.newest, "notes": self.notes, "file": Path(self.file.name).name, "bytes": self.file.tell()}

    def close(self, outcome: str, code: int) -> None:
        self.file.close()

    def _scalars(self, row: Row, values: Mapping[str, Any]) -> None:
        numbers = {tag: value for tag, value in values.items() if isinstance(value, (int, float)) and not isinstance(value, bool)}
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in numbers.items()])
        self._write(Event(wall_time=_when(row), step=row["step"], summary=summary))
        self.newest = max(self.newest, row["step"])

    def _note(self, step: int, when: float, tag: str, text: str) -> None:
        """A text that outlives the steps it stands at; none is written twice."""
        if not any((step, tag, text) == (n[0], n[2], n[3]) for n in self.notes):
            self.notes = [*self.notes, [step, when, tag, text]][-NOTES:]
            self._text(step, when, tag, text)

    def _text(self, step: int, when: float, tag: str, text: str) -> None:
        tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()], tensor_shape=TensorShapeProto(dim=[{"size": 1}]))
        value = Summary.Value(tag=tag, metadata=TEXT, tensor=tensor)
        self._write(Event(wall_time=when, step=step, summary=Summary(value=[value])))

    def _start_again_at(self, step: int) -> None:
        """What stands at `step` or later in all files holds no more, but for notes."""
        self._write(Event(wall_time=time.time(), step=step, session_log=SessionLog(status=SessionLog.START)))
        for at, when, tag, text in self.notes:
            if at >= step:
                self._text(at, when, tag, text)

    def _cut(self, state: Mapping[str, Any]) -> None:
        """Take away what an earlier process wrote and nobody remembers: it comes again."""
        last = self.folder / str(state.get("file", ""))
        if last.is_file() and last.stat().st_size > state["bytes"]:
            os.truncate(last, state["bytes"])

    def _write(self, event: Event) -> None:
        self.writer.write(event.SerializeToString())


def _next_file(folder: Path) -> Path:
    """TensorBoard reads files in the order of their names, which begin with a time: two of one second need two."""
    times = [int(part) for path in folder.glob("events.out.tfevents.*") if (part := path.name.split(".")[3]).isdigit()]
    now = max([int(time.time()), *(t + 1 for t in times)])
    return folder / f"events.out.tfevents.{now:010d}.{socket.gethostname()}.{os.getpid()}.0"


def _when(row: Row) -> float:
    """Seconds since 1970 of a row; the ledger writes "2026-01-31T12:00:00+0100", old rows have no time."""
    when = row.get("time")
    if isinstance(when, (int, float)):
        return float(when)
    try:
        return datetime.strptime(str(when), "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except ValueError:
        return time.time()


def _code(text: str) -> str:
    """As Markdown that is shown letter by letter."""
    return "\n".join(f"    {line}" for line in text.splitlines())
