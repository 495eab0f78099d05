"""The process that brings checkpoints to remote storage, `python -m megatron_scratch.checkpoint.uploader`. No torch.

It stands beside training, so that neither Python's lock nor a network that hangs holds up a step. It dies with its rank. A command
is a line of JSON on its input, what came of it a line on its output; `Uploads` is the other end.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from threading import Lock
from typing import Any

from megatron_scratch.checkpoint.attempt import Attempt
from megatron_scratch.checkpoint.place import committed, open_place, reason
from megatron_scratch.checkpoint.remote import Remote
from megatron_scratch.config.train import CheckpointConfig
from megatron_scratch.util.machine import outlive_signals


def do(remote: Remote, command: dict[str, Any]) -> dict[str, Any]:
    """
    {"do": "prove"} -> {"newest": its newest step or null}
    {"do": "fetch"} -> {"step": number or null, "problems": [...]}
    {"do": "upload", "step": number, "trust": true} -> {"step", "bytes", "seconds", "retired": [...], "not_retired": why not}
                                                       or {"step", "superseded": true}

    each with its "did", and with {"error": why not} where it failed.
    """
    answer: dict[str, Any] = {"did": command["do"], **({"step": command["step"]} if "step" in command else {})}
    began = time.perf_counter()
    try:
        if command["do"] == "prove":
            remote.prove()
            answer["newest"] = max(committed(remote.place), default=None)
        elif command["do"] == "fetch":
            answer["step"], answer["problems"] = remote.fetch()
        else:
            return answer | _upload(remote, command["step"], command.get("trust", False), began)
    except Exception as error:  # whatever a provider's package raises
        answer["error"] = reason(error)
    return answer


def _upload(remote: Remote, step: int, trust: bool, began: float) -> dict[str, Any]:
    if remote.superseded(step):
        return {"superseded": True}
    answer: dict[str, Any] = {"bytes": remote.upload(step, trust), "seconds": round(time.perf_counter() - began, 3)}
    try:
        return {**answer, "retired": remote.retire()}
    except Exception as error:  # the upload is whole all the same; the next one retires what is left
        return {**answer, "retired": [], "not_retired": reason(error)}


def main() -> None:
    """Arguments: URL, folder of the local checkpoints, attempt, keep_last, keep_every."""
    outlive_signals()
    os.umask(0o027)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a package prints is not an answer
    url, root, *numbers = sys.argv[1:]
    attempt, keep_last, keep_every = map(int, numbers)

    lock = Lock()

    def say(line: dict[str, Any]) -> None:
        with lock:
            out.write(json.dumps(line) + "\n")
            out.flush()

    remote: Remote | None = None
    for line in sys.stdin:
        if remote is None:
            cfg = CheckpointConfig(keep_last=keep_last, keep_every=keep_every)
            remote = Remote(open_place(url), Attempt(Path(root), attempt), cfg, told=lambda: say({}))
        say(do(remote, json.loads(line)))


if __name__ == "__main__":
    main()
