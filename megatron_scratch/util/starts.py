"""What the starts of a job have come to: a folder for each, in which every rank writes how it ended.

An exit code cannot say it: torchrun makes 1 of every code of its ranks, and Slurm keeps the highest of many.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_scratch.util.errors import RunFailed
from megatron_scratch.util.exits import BAD_INPUT, OK, STOPPED
from megatron_scratch.util.files import write_json

BUG = "it ended with an exception, which its log has"


@dataclass(frozen=True)
class End:
    """How one rank ended."""

    rank: int
    host: str
    code: int
    message: str


class Start:
    """One start of a job: RUN/jobs/NNNN/starts/MMMM/."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stop = folder / "stop"  # the supervisor asks the ranks to save and end; its text says why

    @classmethod
    def claim(cls, starts: Path, newest: int | None) -> Start:
        """The next one. `newest`: the step of the newest checkpoint as it begins."""
        starts.mkdir(parents=True, exist_ok=True)
        start = cls(starts / f"{1 + max(_numbers(starts), default=0):04d}")
        start.folder.mkdir()
        write_json(start.folder / "start.json", {"newest": newest})
        return start

    def without_progress(self) -> int:
        """Starts in a row, just before this one, that have left no checkpoint newer than the one they began with."""
        found = [_newest(self.folder.parent / f"{n:04d}") for n in sorted(_numbers(self.folder.parent))]
        return next((n for n, newest in enumerate(reversed(found[:-1])) if newest != found[-1]), len(found) - 1)

    @property
    def job(self) -> str:
        """The number of the job folder, which requeues and resubmissions share."""
        return self.folder.parent.parent.name

    @property
    def number(self) -> int:
        return int(self.folder.name)

    def superseded(self) -> int | None:
        """A later start of the same job, where there is one."""
        newest = max(_numbers(self.folder.parent))
        return newest if newest != self.number else None

    def check(self) -> None:
        """
        Raises:
            RunFailed: the job has been started again by somebody else. Slurm does that with a job whose node it cannot reach, while
                all of it lives on there.
        """
        if newest := self.superseded():
            raise RunFailed(f"start {self.number} of {self.folder.parent.parent} is over: start {newest} goes on elsewhere")

    def ask_to_stop(self, reason: str) -> None:
        self.stop.write_text(reason + "\n", encoding="utf-8")

    def end(self, end: End) -> None:
        """A rank says how it ended; after a restart of torchrun's, the later word counts."""
        write_json(self.folder / f"rank_{end.rank:05d}.json", asdict(end))

    def ends(self) -> list[End]:
        return [End(**json.loads(path.read_text(encoding="utf-8"))) for path in sorted(self.folder.glob("rank_*.json"))]


@dataclass(frozen=True)
class Verdict:
    """What a start came to: `finished`, `stopped` with a checkpoint, `refused` bad input, `failed`, or `died` without a word."""

    word: str
    reason: str = ""


def verdict(ends: list[End], code: int) -> Verdict:
    """Judge a start by what its ranks have written, and by the exit code of srun where they have not."""
    main = next((end for end in ends if end.rank == 0), None)
    refused = next((end for end in ends if end.code == BAD_INPUT), None)
    if main is not None and main.code == OK:
        return Verdict("finished")
    if refused is not None:
        return Verdict("refused", refused.message)
    if main is not None and main.code == STOPPED:
        return Verdict("stopped", main.message)
    bad = [end for end in ends if end.code not in (OK, STOPPED)]
    if bad:
        told = [end for end in bad if end.message != BUG] or bad  # what one rank fails of looks like a bug to those who talk to it
        return Verdict("failed", "; ".join(f"rank {end.rank} on {end.host}: {end.message}" for end in told[:4]))
    return Verdict("died", f"srun ended with {code}, and no rank said why; see the logs of the ranks")


def _numbers(starts: Path) -> list[int]:
    return [int(path.name) for path in starts.iterdir() if path.name.isdigit()]


def _newest(start: Path) -> int | None:
    try:
        return json.loads((start / "start.json").read_text(encoding="utf-8"))["newest"]
    except (OSError, ValueError):  # it was killed between two lines
        return None
