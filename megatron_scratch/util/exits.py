"""Exit codes: 0 finished, 2 bad arguments or config, 75 stopped on request with a checkpoint, 1 failed."""

from __future__ import annotations

import sys
from collections.abc import Callable

from megatron_scratch.util.errors import RunFailed, StopRequested, UserError

OK, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 75


def exit_code(work: Callable[[], object]) -> int:
    """Run `work`; what it raises becomes one last line on stderr and an exit code. Our own bugs keep their traceback."""
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
        return FAILED
    return result if isinstance(result, int) else OK


def _say(word: str, error: object, code: int) -> int:
    # One write, newline included: print() makes two on an unbuffered stream, and ranks that fail together glue their lines.
    sys.stderr.write(f"{word}: {error}\n")
    sys.stderr.flush()
    return code
