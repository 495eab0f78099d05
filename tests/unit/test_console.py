"""What a person sees of a run: plain lines, one live line in a real terminal, a log file that has the same."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_scratch.train.console import Console, Logged, Silent, duration, line

ROW = {"step": 20, "loss": 4.56789, "lr": 1e-3, "grad_norm": 0.5, "tokens_per_second": 12345.6, "step_seconds": 2.0, "mfu": 0.4123}


def test_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(save_every=50)
    console.start(0, 100)
    console.row(ROW)
    console.row({**ROW, "step": 60})
    console.row({"step": 60, "val_loss": 4.1, "val_loss/wiki": 3.9, "val_perplexity": 60.3})
    console.close()
    assert capsys.readouterr().out.splitlines() == [
        "step 20/100  loss 4.5679  lr 1.00e-03  norm 0.50  12,346 tok/s  mfu 41.2 %  2 min 40 s left, saves in 1 min",
        "step 60/100  loss 4.5679  lr 1.00e-03  norm 0.50  12,346 tok/s  mfu 41.2 %  1 min 20 s left",
        "step 60: validation loss 4.1000, 3.9000 on wiki",
    ]


def test_the_log_file_has_what_the_view_has(tmp_path: Path) -> None:
    logged = Logged(Silent(), tmp_path / "rank.log")
    logged.start(3, 100)
    logged.row(ROW)
    logged.say("[bold] is no markup")
    lines = (tmp_path / "rank.log").read_text().splitlines()
    assert [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", "", text) for text in lines] == [
        "start after step 3 of 100", line(ROW, 100), "[bold] is no markup",
    ]  # fmt: skip


@pytest.mark.parametrize(("seconds", "told"), [(0.2, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (200, "3 min 20 s"), (3600, "1 h"),
                                               (18720, "5 h 12 min"), (273600, "3 d 4 h")])  # fmt: skip
def test_durations(seconds: float, told: str) -> None:
    assert duration(seconds) == told


def test_one_live_line_in_a_terminal() -> None:
    """In a terminal of 140 columns: a line that is drawn over, what is said stands above it."""
    code = f"""
from megatron_scratch.train.console import Console
console = Console(50)
console.start(0, 100)
console.row({ROW})
console.say("a checkpoint is saved")
console.row({{**{ROW}, "step": 40}})
console.close()
"""
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "140", "LINES": "40"}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    seen = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # Linux says so when the other side is closed
            break
        if not piece:
            break
        seen += piece
    os.close(ours)
    assert process.wait() == 0, seen.decode()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen.decode())
    assert "\x1b[" in seen.decode(), "it draws over its line"
    assert "a checkpoint is saved" in text
    last = [part for part in re.split(r"[\r\n]+", text) if "loss" in part][-1]
    assert "40/100" in last and "mfu 41.2 %" in last and "2 min left, saves in 20 s" in last
