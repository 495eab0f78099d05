"""A folder that is whole or absent: written beside, made durable, renamed."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_scratch.checkpoint.manifest import CorruptCheckpoint
from megatron_scratch.util.errors import RunFailed, UserError
from megatron_scratch.util.files import fsync_dir

LOCK = ".lock"


def refuse_existing(out: Path) -> None:
    """
    Raises:
        UserError: there is something under that name, or no folder to put it in.
    """
    if os.path.lexists(out):
        raise UserError(f"{out} exists, and nothing is ever overwritten; give another name, or move it away")
    if not out.parent.is_dir():
        raise UserError(f"{out.parent} is not a folder; make it, or give another place")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield an empty neighbour of `out` to write into. On a clean exit it is made durable and takes the name; else it is removed.

    What a killed process has left of one is removed by the next that writes to `out`.

    Raises:
        UserError: `out` exists, its neighbour cannot be made, or another process is writing to it.
        RunFailed: no space, or what was written is not what was read back.
    """
    refuse_existing(out)
    tmp = out.with_name(f".{out.name}.tmp")
    try:
        tmp.mkdir(mode=0o750, exist_ok=True)
        lock = open(tmp / LOCK, "w")
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}; give another place") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is writing {out}; wait for it, or give another name") from None
        try:
            _empty(tmp)
            yield tmp
            refuse_existing(out)
            _make_durable(tmp)
            tmp.rename(out)
            (out / LOCK).unlink()  # not before: a lock that is gone could be taken, and what it protects be emptied
            fsync_dir(out.parent)
        except BaseException as error:
            shutil.rmtree(tmp, ignore_errors=True)
            if isinstance(error, (OSError, CorruptCheckpoint)):
                raise RunFailed(f"{out} could not be written: {' '.join(str(error).split())}; nothing is left of it") from error
            raise


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def _make_durable(folder: Path) -> None:
    """Every file, then the folders that name them, inner ones first."""
    for path in sorted(folder.rglob("*"), reverse=True):
        fsync_dir(path)  # opened to read, a file is made durable just as a folder is
    fsync_dir(folder)
