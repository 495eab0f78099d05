"""Exit codes and last lines."""

from __future__ import annotations

import io

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
