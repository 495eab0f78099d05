"""The sink of Weights & Biases by itself: what kills and outages of the follower leave, and what the next one makes of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from wandb_runs import check_same, environment, recorded
from wandb_server import Server

# The sink, fed with the rows of a run directory and looked at twice. argv: run directory, first and last step, how it ends.
FEED = """
import json, os, signal, sys, time
from pathlib import Path
from megatron_scratch.config.logging import WandbConfig
from megatron_scratch.logs import wandb, wandb_file
from megatron_scratch.logs.sink import Begin

run, first, last, end = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
wandb.PAUSE = 0.0
state = json.loads((run / "wandb" / "run.json").read_text())
begin = Begin(run, {"checkpoint": {"remote": None}}, "r", state, first, {"attempt": first})
sink = wandb.Wandb(WandbConfig(mode=end.partition("-")[0]), begin, lambda text: print(text, flush=True))
if end.endswith("again"):
    print("opened", flush=True)
    sys.stdin.readline()
for step in range(first + 1, last + 1):
    for name, row in (("metrics", {"step": step, "time": 1.7e9 + step, "loss": 1 / step, "tokens": 8 * step}),
                      ("layers", {"step": step, "time": 1.7e9 + step, "layers": {"layers.0": {"grad_norm": step / 7}}})):
        with open(run / f"{name}.jsonl", "a") as f:
            f.write(json.dumps(row) + "\\n")
        getattr(sink, name)(row)
sink.flush()
sink.flush()
if end.endswith("kill"):
    newest = wandb_file.files(run / "wandb", state["id"])[-1]
    until = time.monotonic() + 30
    while (wandb_file.last_row(newest) or {"step": 0})["step"] < last - 1 and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL)
sink.close("finished", 0)
"""


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    environment(monkeypatch, tmp_path / "home")
    (tmp_path / "r" / "wandb").mkdir(parents=True)
    (tmp_path / "r" / "wandb" / "run.json").write_text(json.dumps({"id": "abcd1234"}))
    return tmp_path / "r"


def feed(path: Path, first: int, last: int, end: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", FEED, str(path), str(first), str(last), end]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_killed_follower(path: Path) -> None:
    """Nothing remembers it: run.json has the id alone, the rest is read from W&B's own file."""
    for first, last, end in ((0, 5, "offline-kill"), (5, 9, "offline-kill"), (7, 12, "offline")):
        if first == 7:  # the run itself was killed, too, and goes back
            for name in ("metrics", "layers"):
                rows = [line for line in (path / f"{name}.jsonl").read_text().splitlines() if json.loads(line)["step"] <= 7]
                (path / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
        process = feed(path, first, last, end)
        assert process.communicate()[1] is None and process.returncode == (-9 if end.endswith("kill") else 0)
    found = recorded(path)
    assert [part.exit_code for part in found] == [None, None, 0]
    rows = [row for part in found for row in part.rows]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7, 8, 8, 9, 10, 11, 12], "5 and 9 waited, when it was killed"
    check_same(rows, path)


def test_a_server_that_comes_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was begun on disk goes on at the server, in the same follower, with all that there was."""
    with Server(fail=500) as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        process = feed(path, 0, 6, "online-again")
        assert process.stdin is not None and process.stdout is not None
        assert "cannot be reached" in process.stdout.readline()
        assert process.stdout.readline() == "opened\n"
        server.behaviour.fail = 0
        said, _ = process.communicate("go on\n")
        assert process.returncode == 0 and "begins at" in said
        check_same(server.only().rows(), path)
        assert server.only().exit == 0
