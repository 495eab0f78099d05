"""Disks without room."""

from __future__ import annotations

import os
from pathlib import Path


def fill(disk: Path, leave: int = 0) -> Path:
    """A file that takes all room of a disk but so many bytes."""
    hog = disk / "hog"
    with open(hog, "wb", buffering=0) as f:
        try:
            while f.write(bytes(4096)):
                pass
        except OSError:
            pass
    os.truncate(hog, max(0, hog.stat().st_size - leave))
    return hog
