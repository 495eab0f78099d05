"""What tests of Weights & Biases share: an environment of its own, what W&B should have of a run, and `wandb sync`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from runs import Fault

from megatron_scratch.logs import followers, wandb_file, wandb_steps
from megatron_scratch.train.reporter import Reporter

OPEN = re.compile("the run is recorded in|(begins|goes on) at http")  # what a follower says that has opened a run
# W&B's own of a row, and what says how rows came there
NOT_OURS = ("_step", "_runtime", "overlap", "_wandb")


def environment(monkeypatch: pytest.MonkeyPatch, home: Path, **variables: str) -> None:
    """No account, settings or server of the person who runs the tests; failures are waited for 2 seconds. A run waits at its end
    until its follower has done all, however busy the machine is."""
    monkeypatch.setattr(followers, "LIMIT", 90.0)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    home.mkdir(exist_ok=True)
    for name, value in {"HOME": str(home), "WANDB_INIT_TIMEOUT": "2", "WANDB_FINISH_TIMEOUT": "3", **variables}.items():
        monkeypatch.setenv(name, value)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def written(run: Path) -> dict[int, dict[str, Any]]:
    """step -> values in W&B's names, from the files of a run. A step's time is that of its earliest row."""
    out: dict[int, dict[str, Any]] = {}
    for row in [*map(wandb_steps.metrics, lines(run / "metrics.jsonl")), *map(wandb_steps.layers, lines(run / "layers.jsonl"))]:
        there = out.setdefault(row["step"], {})
        there |= {**row, wandb_steps.TIME: min(row[wandb_steps.TIME], there.get(wandb_steps.TIME, float("inf")))}
    return out


def ours(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in NOT_OURS and not isinstance(value, dict)}


def check_same(rows: Iterable[dict[str, Any]], run: Path) -> None:
    """W&B's rows are those of the run's files, value by value, in order; and among them only marked ones that were thrown away."""
    rows, want = list(rows), written(run)
    assert want
    taken = [row["_step"] for row in rows]
    assert taken == sorted(set(taken)), "W&B's steps rise"
    found = {row["step"]: row for row in rows}  # of steps that were computed twice, the second counts
    assert sorted(found) == sorted(want)
    for step, values in want.items():
        assert ours(found[step]) == values
    twice = {row["step"] for row in rows if row is not found[row["step"]]}
    assert twice == {step for step, row in found.items() if row.get("overlap")}, (
        "steps that are there twice, and no other, are marked"
    )


def recorded(run: Path) -> list[wandb_file.Recorded]:
    """What the client has written to disk, in order."""
    run_id = json.loads((run / "wandb" / "run.json").read_text())["id"]
    paths = wandb_file.files(run / "wandb", run_id)
    assert len(paths) == len([p for p in (run / "wandb").glob("*run-*") if not p.is_symlink()]), "one run has one id"
    return [wandb_file.read(path) for path in paths]


def once_followed(run: Path, fault: Fault) -> Fault:
    """The fault, in a run whose first step waits for the follower: one that is only starting when its rank dies may see nothing."""

    def arm() -> None:
        fault()
        begin = Reporter.begin

        def waiting(self: Reporter, step: int) -> None:
            log = run / "logs" / "wandb.log"
            before = len(OPEN.findall(log.read_text())) if log.exists() else 0
            begin(self, step)
            deadline = time.monotonic() + 60
            while not (log.exists() and len(OPEN.findall(log.read_text())) > before):
                assert time.monotonic() < deadline, "the follower does not come"
                time.sleep(0.05)

        Reporter.begin = waiting  # type: ignore[method-assign]

    return arm


def sync(*words: str | Path, env: dict[str, str]) -> str:
    """The real `wandb sync`."""
    command = [sys.executable, "-m", "wandb", "sync", *map(str, words)]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def said(run: Path) -> str:
    """All that the person who watches was told."""
    return (run / "logs" / "rank_00000.log").read_text()
