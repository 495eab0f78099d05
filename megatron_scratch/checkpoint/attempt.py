"""Which start of a run may write its checkpoints, and the one rename that makes a checkpoint. No torch.

Each start of a run claims a number by making `checkpoints/.attempt_NNNNNN`, and takes the folders of all earlier ones away. A
checkpoint is written inside its attempt's folder and renamed out of it:

    checkpoints/.attempt_000002/step_00000100/   being written
    checkpoints/step_00000100/                   committed: whole, durable, never written to again

A rank of an earlier start that is still alive (its network was cut, its job is being requeued) finds no folder to write into, and
nothing to rename: the file system fences it off, no clock and no lock is asked.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from megatron_scratch.checkpoint.manifest import committed, step_folder
from megatron_scratch.config.train import CheckpointConfig
from megatron_scratch.util.errors import RunFailed
from megatron_scratch.util.files import fsync_dir


@dataclass(frozen=True)
class Attempt:
    root: Path  # .../checkpoints
    number: int

    @property
    def folder(self) -> Path:
        return self.root / f".attempt_{self.number:06d}"

    @staticmethod
    def claim(root: Path) -> Attempt:
        """The next number (one process calls this). Whatever an earlier attempt was writing is gone when this returns."""
        root.mkdir(parents=True, exist_ok=True)
        while True:
            earlier = _attempts(root)
            attempt = Attempt(root, max(earlier, default=0) + 1)
            try:
                attempt.folder.mkdir()
                break
            except FileExistsError:
                continue  # somebody else has claimed it at the same moment
        fsync_dir(root)
        for number, path in earlier.items():
            swept = root / f".swept_{number:06d}_by_{attempt.number:06d}"
            try:
                path.rename(swept)  # at once, and whole: a writer inside cannot add to what is being deleted
            except FileNotFoundError:
                continue  # a claim at the same moment has been faster
            shutil.rmtree(swept, ignore_errors=True)
        for path in root.glob(".swept_*"):  # of a claim that was killed
            shutil.rmtree(path, ignore_errors=True)
        return attempt

    def check(self) -> None:
        """
        Raises:
            RunFailed: a later attempt has taken over.
        """
        if not self.folder.is_dir():
            raise RunFailed(f"attempt {self.number} of {self.root.parent} is over: the run was started again elsewhere and goes on "
                            "there; nothing of this one is written any more")  # fmt: skip

    def staged(self, step: int) -> Path:
        """Where a checkpoint is written before it is one."""
        return step_folder(self.folder, step)

    def stage(self, step: int) -> Path:
        """Make that folder, empty (one process calls this)."""
        self.check()
        shutil.rmtree(self.staged(step), ignore_errors=True)  # of a save that failed
        self.staged(step).mkdir()
        return self.staged(step)

    def commit(self, step: int) -> Path:
        """The rename (one process calls this). Its files and its folder are durable before, the rename is when this returns.

        Raises:
            RunFailed: a later attempt has taken over, or there is a checkpoint of this step: none is ever overwritten.
        """
        staged, final = self.staged(step), step_folder(self.root, step)
        if final.exists():
            raise RunFailed(f"{final} exists, and no checkpoint is ever overwritten; move it away, or start in another dir=")
        try:
            fsync_dir(staged)
            os.rename(staged, final)  # onto a folder with anything in it, this fails
        except FileNotFoundError:
            self.check()
            raise
        fsync_dir(self.root)
        fsync_dir(self.folder)
        return final


def _attempts(root: Path) -> dict[int, Path]:
    found = ((re.fullmatch(r"\.attempt_(\d{6,})", path.name), path) for path in root.iterdir())
    return {int(match.group(1)): path for match, path in found if match}


def set_aside(folder: Path) -> Path:
    """Take a corrupt checkpoint out of the committed names, so that its step can be saved again; nothing is deleted."""
    aside = folder.with_name(f"corrupt_{folder.name}")
    count = 1
    while aside.exists():
        count += 1
        aside = folder.with_name(f"corrupt_{folder.name}.{count}")
    folder.rename(aside)
    fsync_dir(folder.parent)
    return aside


def surplus(steps: list[int], cfg: CheckpointConfig) -> list[int]:
    """Committed steps that the retention rule does not ask for, oldest first. The newest is always asked for."""
    kept = set(steps[-cfg.keep_last :]) if cfg.keep_last else set(steps)
    kept |= {s for s in steps if cfg.keep_every and s % cfg.keep_every == 0} | set(steps[-1:])
    return [s for s in steps if s not in kept]


def retire(attempt: Attempt, cfg: CheckpointConfig, verified: Collection[int], held: Collection[int] = ()) -> list[int]:
    """Delete what the retention rule does not ask for (one process calls this). Returns the steps.

    Args:
        verified: steps whose files have been read again and found as written. A checkpoint is deleted only if a newer one is
            among them: the last verified one outlives any number of newer ones that nobody has looked at.
        held: steps that somebody still needs, e.g. for an upload.
    """
    attempt.check()
    steps = committed(attempt.root)
    newest = max(set(steps) & set(verified), default=-1)
    gone = [s for s in surplus(steps, cfg) if s < newest and s not in held]
    for step in gone:
        # Out of the committed name first: a crash while deleting must not leave half a checkpoint under it.
        doomed = attempt.folder / f"retired_{step:08d}"
        step_folder(attempt.root, step).rename(doomed)
        shutil.rmtree(doomed)
    return gone
