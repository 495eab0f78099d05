"""`python -m megatron_scratch.corpus.work`: run tasks of stages.

    work FOLDER INDEX...  some tasks, as an element of a job array does; the last line says what went wrong
    work                  tasks as they come on standard input, lines of JSON [FOLDER, INDEX]; one line of JSON answers each

The answer is {} or {"error": ..., "user": ...}. When standard input ends, or whoever held it is gone, the process ends at once.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from pathlib import Path
from queue import Queue

from megatron_scratch.corpus.stages import run_task
from megatron_scratch.util.errors import RunFailed, UserError
from megatron_scratch.util.machine import outlive_signals


def answer(folder: str, index: int) -> dict[str, object]:
    """Run a task; what went wrong, or nothing."""
    try:
        run_task(Path(folder), index)
    except UserError as error:
        return {"error": str(error), "user": True}
    except RunFailed as error:
        return {"error": str(error), "user": False}
    except OSError as error:
        return {"error": f"{type(error).__name__}: {error}", "user": False}
    except Exception:
        return {"error": traceback.format_exc(), "user": False}
    return {}


def serve() -> None:
    """Answer standard input until it ends. It is read beside the work, so that a task whose parent died is not finished in vain."""
    outlive_signals()  # a scheduler's go to all processes of a job; who asked for the work says when it ends
    tasks: Queue[tuple[str, int]] = Queue()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a print in somebody's plugin is no answer

    def listen() -> None:
        for line in sys.stdin:
            tasks.put(tuple(json.loads(line)))
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        told = json.dumps(answer(*tasks.get()))
        replies.write(told + "\n")
        replies.flush()


def main(words: list[str]) -> int:
    if not words:
        serve()
    code = 0
    for index in map(int, words[1:]):
        told = answer(words[0], index)
        if told.get("user"):  # bad input is bad for all of them
            print(f"error: {told['error']}", file=sys.stderr)
            return 2
        if told:
            *trace, last = str(told["error"]).strip().splitlines()
            print(*trace, f"failed: {last}", sep="\n", file=sys.stderr)
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
