"""Exit codes and last lines."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_scratch.util.errors import RunFailed, StopRequested, UserError
from megatron_scratch.util.exits import exit_code


class _Unbuffered(io.StringIO):
    """As stderr under PYTHONUNBUFFERED: every write() is a system call of its own, and other ranks write in between."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []

    def write(self, text: str) -> int:
        self.writes.append(text)
        return len(text)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("no such key"), 2, "error: no such key\n"),
        (StopRequested("saved at step 3"), 75, "stopped: saved at step 3\n"),
        (RunFailed("disk full"), 1, "failed: disk full\n"),
        (KeyboardInterrupt(), 130, "interrupted: nothing more was saved\n"),
    ],
)
def test_the_last_line_is_written_whole(error: BaseException, code: int, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = _Unbuffered()
    monkeypatch.setattr("sys.stderr", stream)

    def work() -> None:
        raise error

    assert exit_code(work) == code
    assert stream.writes == [line]


def test_the_result_of_the_work_is_the_code() -> None:
    assert exit_code(lambda: 75) == 75
    assert exit_code(lambda: None) == exit_code(lambda: "text") == 0


class _Teardown:
    """Said only by an interpreter that is taken down."""

    def __del__(self) -> None:
        print("taken down")


def _ends(work: str) -> tuple[int, str, str]:
    code = ("import atexit, sys; from unit.test_exits import _Teardown; from megatron_scratch.util.exits import leave_with; "
            f"kept = _Teardown(); atexit.register(print, 'at exit'); leave_with(lambda: {work})")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
    return done.returncode, done.stdout, done.stderr


def test_a_process_ends_without_taking_the_interpreter_down() -> None:
    assert _ends("75") == (75, "at exit\n", ""), "flushed, though the output is no terminal"
    assert _ends("sys.exit(2)") == (2, "at exit\n", "")
    code, out, err = _ends("1 // 0")
    assert (code, out) == (1, "at exit\n") and err.startswith("Traceback") and err.endswith("by zero\n"), "our own bugs keep it"
