"""A remote storage that fails as told: a folder of this machine behind `faulty://`, for this process and those it starts.

`FAULTY` in the environment is JSON: {"op", "nth", "action", "once"}: what the nth call (from 1; 0: every one) of an operation does
instead. `once`: a file that is made then, after which nothing fails any more. `FAULTY_LOG`: a file that gets a line for each.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem


class FaultyStorage(LocalFileSystem):
    protocol = "faulty"  # not "file": to us it is a store like any other
    cachable = False
    calls = 0
    lock = threading.Lock()

    def put_file(self, path1: Any, path2: Any, **kwargs: Any) -> None:
        content = Path(path1).read_bytes()
        Path(self._strip_protocol(path2)).write_bytes(self._faulty("put_file", path2, content))
        self._dead("put_file")

    def pipe_file(self, path: Any, value: Any, mode: str = "overwrite", **kwargs: Any) -> None:
        Path(self._strip_protocol(path)).write_bytes(self._faulty("pipe_file", path, value))
        self._dead("pipe_file")

    def cat_file(self, path: Any, start: Any = None, end: Any = None, **kwargs: Any) -> bytes:
        return self._faulty("cat_file", path, super().cat_file(path, start, end))

    def get_file(self, path1: Any, path2: Any, callback: Any = None, **kwargs: Any) -> None:
        content = Path(self._strip_protocol(path1)).read_bytes()
        Path(path2).write_bytes(self._faulty("get_file", path1, content))

    def rm_file(self, path: Any) -> None:
        self._faulty("rm_file", path, b"")
        super().rm_file(path)

    def rm(self, path: Any, recursive: bool = False, maxdepth: Any = None) -> None:
        self._faulty("rm", path, b"")
        super().rm(path, recursive)

    def _faulty(self, op: str, path: Any, content: bytes) -> bytes:
        """What becomes of the bytes of an operation."""
        if log := os.environ.get("FAULTY_LOG"):
            with open(log, "a") as f:
                f.write(f"{op} {Path(path).parent.name}/{Path(path).name}\n")
        fault = json.loads(os.environ.get("FAULTY", "{}"))
        self.half = False
        if not fault or fault["op"] not in (op, "any") or (fault.get("once") and Path(fault["once"]).exists()):
            return content
        with self.lock:
            type(self).calls += 1
            if fault["nth"] not in (0, self.calls):
                return content
        if fault.get("once"):
            Path(fault["once"]).write_text(str(os.getpid()))
        return self._act(fault["action"], op, content)

    def _act(self, action: str, op: str, content: bytes) -> bytes:
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if action == "raise":
            raise ConnectionError("the network\nis down")
        if action == "hang":
            signal.pause() if threading.current_thread() is threading.main_thread() else threading.Event().wait()
        if action == "flip":
            return content[:-1] + bytes([content[-1] ^ 4])
        self.half = action == "half" and op in ("put_file", "pipe_file")  # written to the half, then dead; others are let be
        return content[: len(content) // 2] if action == "cut" or self.half else content

    def _dead(self, op: str) -> None:
        if self.half:
            os.kill(os.getpid(), signal.SIGKILL)


def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `faulty://` known here, and to every Python that is started from here: as an installed package would."""
    package = tmp_path / "site" / "faulty_storage-1.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty-storage\nVersion: 1\n")
    (package / "entry_points.txt").write_text("[fsspec.specs]\nfaulty = faulty_storage:FaultyStorage\n")
    monkeypatch.setenv("PYTHONPATH", f"{package.parent}:{Path(__file__).parent}")
    fsspec.register_implementation("faulty", FaultyStorage, clobber=True)
    monkeypatch.setattr(FaultyStorage, "calls", 0)


def fail(monkeypatch: pytest.MonkeyPatch, op: str, nth: int, action: str, once: Path | None = None) -> None:
    monkeypatch.setattr(FaultyStorage, "calls", 0)
    monkeypatch.setenv("FAULTY", json.dumps({"op": op, "nth": nth, "action": action, "once": str(once) if once else None}))
