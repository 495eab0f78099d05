"""`python -m megatron_scratch.corpus.work`: run tasks of stages.

    work FOLDER INDEX     one task, as an element of a job array does
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
from megatron_scratch.util.errors import UserError


def answer(folder: str, index: int) -> dict[str, object]:
    """Run a task; what went wrong, or nothing."""
    try:
        run_task(Path(folder), index)
    except UserError as error:
        return {"error": str(error), "user": True}
    except OSError as error:
        return {"error": f"{type(error).__name__}: {error}", "user": False}
    except Exception:
        return {"error": traceback.format_exc(), "user": False}
    return {}


def serve() -> None:
    """Answer standard input until it ends. It is read beside the work, so that a task whose parent died is not finished in vain."""
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
    told = answer(words[0], int(words[1]))
    if told:
        print(told["error"], file=sys.stderr)
    return 2 if told.get("user") else 1 if told else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
