"""A plugin with a cleaner that holds a task where a test wants it, so that something can be done to it at a known place.

A document that begins with "@K" looks for two files in the folder GATE. holdK: the task writes its process's id into it, renames it
to heldK, and goes on once that is gone; failK: the task fails as long as it is there.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from megatron_scratch.registry import register

PATIENCE = 100.0  # seconds; a test that failed lets go of nothing


class Gate:
    def __init__(self, settings: None) -> None:
        self.folder = Path(os.environ["GATE"])

    def __call__(self, text: str) -> str:
        if text.startswith("@"):
            self.look(text[1:].split()[0])
        return text

    def look(self, k: str) -> None:
        hold, held = self.folder / f"hold{k}", self.folder / f"held{k}"
        if hold.exists():
            hold.write_text(str(os.getpid()))
            hold.rename(held)
            begun = time.monotonic()
            while held.exists() and time.monotonic() < begun + PATIENCE:
                time.sleep(0.05)
        if (self.folder / f"fail{k}").exists():
            raise RuntimeError("made to fail")


register("cleaner", "gate", Gate)
