"""Exit codes: 0 finished, 2 bad arguments or config, 75 stopped on request with a checkpoint, 1 failed."""

from __future__ import annotations

import atexit
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from megatron_scratch.util.errors import RunFailed, StopRequested, UserError

OK, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 75


def exit_code(work: Callable[[], object]) -> int:
    """Run `work`; what it raises becomes one last line on stderr and an exit code. Our own bugs keep their traceback."""
    return outcome(work)[0]


def outcome(work: Callable[[], object]) -> tuple[int, str]:
    """Like `exit_code`; the code and what was said last."""
    try:
        result = work()
    except UserError as error:
        return _say("error", error, BAD_INPUT)
    except StopRequested as error:
        return _say("stopped", error, STOPPED)
    except RunFailed as error:
        return _say("failed", error, FAILED)
    except KeyboardInterrupt:
        return _say("interrupted", "nothing more was saved", 130)
    except BrokenPipeError:  # `megatron-scratch ... | head`
        sys.stderr.close()
        return FAILED, "its output was closed"
    return result if isinstance(result, int) else OK, ""


def leave_with(work: Callable[[], int]) -> NoReturn:
    """Run `work` and end this process with its exit code, but do not take the interpreter down.

    A rank that had finished and saved all ended once with "terminate called without an active exception" and exit code -6. The
    only threads left by then are gloo's, which outlive their process group (torch 2.13, three a group), and that is how a thread
    ends that turns to an interpreter which is being taken down. What was registered with `atexit` is run, output is flushed.
    """
    code = FAILED
    try:
        code = work()
    except SystemExit as error:  # argparse
        code = error.code if isinstance(error.code, int) else FAILED
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # closed, or nobody reads it any more
            stream.flush()
    os._exit(code)


def _say(word: str, error: object, code: int) -> tuple[int, str]:
    # One write, newline included: print() makes two on an unbuffered stream, and ranks that fail together glue their lines.
    sys.stderr.write(f"{word}: {error}\n")
    sys.stderr.flush()
    return code, str(error)
