"""What a loss of power would leave: every write is on the disk before the rename that makes it count."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_scratch.checkpoint import shard
from megatron_scratch.checkpoint.store import save
from megatron_scratch.parallel import SINGLE
from megatron_scratch.util import files

Op = tuple[str, str]  # what, path


class _Raw(io.FileIO):
    """A file that says when bytes go to the system, not when they go into a buffer."""

    log: list[Op] = []

    def write(self, content: Any) -> int:
        self.log.append(("write", os.path.realpath(self.name)))
        return super().write(content) or 0


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[Op]:
    """Every write, fsync and rename of this process, in order."""
    found: list[Op] = []
    _Raw.log = found

    def opened(path: Path, mode: str = "r", buffering: int = -1, encoding: str | None = None) -> Any:
        raw = _Raw(path, mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        return io.BufferedWriter(raw) if "b" in mode else io.TextIOWrapper(io.BufferedWriter(raw), encoding=encoding)

    def by_fd(what: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def logged(fd: int, *args: Any) -> Any:
            found.append((what, os.path.realpath(f"/proc/self/fd/{fd}")))
            return call(fd, *args)

        return logged

    def renamed(call: Callable[..., Any]) -> Callable[..., Any]:
        def logged(source: Any, target: Any, **kwargs: Any) -> Any:
            found.append(("rename", f"{os.path.realpath(source)} -> {os.path.realpath(target)}"))
            return call(source, target, **kwargs)

        return logged

    monkeypatch.setattr(shard, "open", opened, raising=False)
    monkeypatch.setattr(files, "open", opened, raising=False)
    monkeypatch.setattr(os, "write", by_fd("write", os.write))
    monkeypatch.setattr(os, "fsync", by_fd("fsync", os.fsync))
    monkeypatch.setattr(os, "rename", renamed(os.rename))
    monkeypatch.setattr(os, "replace", renamed(os.replace))
    return found


def violations(log: list[Op]) -> list[str]:
    """For each rename: everything written under its source is fsynced after its last write, the folders after that, and the folder
    of its target after the rename."""
    out = []
    for at, (what, detail) in enumerate(log):
        if what != "rename":
            continue
        source, target = detail.split(" -> ")
        before, after = log[:at], log[at + 1 :]
        inside = {path for op, path in before if op == "write" and (path == source or path.startswith(source + "/"))}
        for path in inside:
            last_write = max(i for i, op in enumerate(before) if op == ("write", path))
            if ("fsync", path) not in before[last_write:]:
                out.append(f"{path} is not durable when {source} is renamed")
        names = [i for i, (op, d) in enumerate(before) if op == "rename" and os.path.dirname(d.split(" -> ")[1]) == source]
        if any(os.path.dirname(path) == source for path in inside) or names:
            made = max([i for i, (op, path) in enumerate(before) if op == "write" and os.path.dirname(path) == source] + names)
            if ("fsync", source) not in before[made:]:
                out.append(f"the names in {source} are not durable when it is renamed")
        if ("fsync", os.path.dirname(target)) not in after:
            out.append(f"the rename to {target} is not durable")
    return out


def _save(root: Path) -> None:
    save(root, 1, {"model.w": torch.ones(64, 64), "model.b": torch.ones(3)}, {}, SINGLE)


def test_a_commit_is_durable_in_order(log: list[Op], tmp_path: Path) -> None:
    _save(tmp_path / "checkpoints")
    kinds = [what for what, _ in log]
    assert kinds.count("rename") == 2 and kinds.count("write") >= 3, "the manifest's and the checkpoint's; a file and the manifest"
    assert violations(log) == []


@pytest.mark.parametrize("left_out", ["file", "manifest", "folder", "parent"])
def test_an_fsync_that_is_left_out_is_seen(left_out: str, log: list[Op], tmp_path: Path) -> None:
    _save(tmp_path / "checkpoints")
    wanted = {"file": ".safetensors", "manifest": ".tmp", "folder": "step_00000001", "parent": "/checkpoints"}[left_out]
    without = [op for op in log if not (op[0] == "fsync" and op[1].endswith(wanted))]
    assert len(without) < len(log) and violations(without) != []
    swapped = sorted(log, key=lambda op: op[0] == "fsync")  # all of them, too late
    assert violations(swapped) != []
