"""What a sink is: a part of kind `logging`. A follower process (`logs/follow.py`) opens it, and hands it the rows of a run's files.

One of your own: `register("logging", "mine", "my.module:Mine", MySettings)`, MySettings being a dataclass, maybe a
`config.logging.SinkConfig`. Then `train plugins=[my.module] +logging.mine.key=value`; or `logging=mine`, with a file
`logging/mine.yaml` in a folder of `--config-dir`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Row = dict[str, Any]


@dataclass(frozen=True)
class Begin:
    """What a sink is told when it is opened."""

    run_dir: Path
    config: dict[str, Any]  # the resolved config; there are no secrets in one
    name: str  # of the run
    state: dict[str, Any]  # "id": of this run at this sink, 8 letters or digits; and what `flush` returned last, in any earlier
    # process. Where run.json is lost, what of that a checkpoint remembers (no lists, no dictionaries), and "step", the checkpoint's
    # unless `flush` gives one; all rows come again then
    start_step: int  # the run goes on after this step
    facts: Row  # the newest `start` of the ledger


class Sink(Protocol):
    """Where rows go. Each file's rows come in its order, at least once: those since the last `flush` come again after a failure.

    Whatever a method raises, the run goes on. The follower says it, does not call `close`, waits, and opens the sink anew, in the
    same process, with the state of the last `flush`; several times, then it gives up. UserError and ImportError: at once.
    """

    def __init__(self, settings: Any, begin: Begin, say: Callable[[str], None]) -> None:
        """May take long. `say`: a line for the person who watches the run, e.g. where to look."""

    def metrics(self, row: Row) -> None:
        """Of metrics.jsonl: a step, a skipped one ("skipped"), or an evaluation ("val_loss")."""

    def layers(self, row: Row) -> None: ...

    def sample(self, row: Row) -> None: ...

    def event(self, row: Row) -> None:
        """Of ledger.jsonl."""

    def rewound(self, step: int) -> None:
        """Rows of metrics, layers and samples after `step` hold no more; those of the same steps, computed anew, come next. A sink
        may hear it twice."""

    def flush(self) -> dict[str, Any]:
        """Make safe what has come so far. Returns JSON to keep in RUN/SINK/run.json. Called every few seconds and at the end."""

    def close(self, outcome: str, code: int) -> None:
        """The end, after a last `flush`. `outcome`: finished | stopped | failed | crashed (the rank is gone without a word).
        `code`: the run's exit code."""
