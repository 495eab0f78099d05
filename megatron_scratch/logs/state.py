"""RUN/SINK/run.json: under which id a run is known to a sink, and how much of its files the sink has."""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_scratch.util.files import write_json

SENT = "sent"  # file -> {"rows", "step"}; the rest is what the sink's `flush` returned, and "id"


def state_file(run_dir: Path, sink: str) -> Path:
    return run_dir / sink / "run.json"


def read_state(run_dir: Path, sink: str) -> dict[str, Any]:
    """{} where there is none, or none that can be read."""
    try:
        found = json.loads(state_file(run_dir, sink).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if _known(found) else {}


def write_state(run_dir: Path, sink: str, state: Mapping[str, Any]) -> None:
    path = state_file(run_dir, sink)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, dict(state))


def identify(run_dir: Path, sink: str, remembered: Any) -> str:
    """The id of the run at a sink: that of the checkpoint it goes on from, else that of its folder, else a new one. It is written
    down before a follower starts.

    Args:
        remembered: what the checkpoint says of this sink, if it is a checkpoint of this run. One that a run only starts from is
            another run's: a fork is a run of its own, wherever folders are moved.
    """
    kept = read_state(run_dir, sink)
    remembered = remembered if _known(remembered) else {}
    run_id = remembered.get("id") or kept.get("id") or new_id()
    if run_id != kept.get("id"):
        write_state(run_dir, sink, {**remembered, "id": run_id})
    return run_id


def new_id() -> str:
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))


def _known(state: Any) -> bool:
    """Ids are parts of addresses and of file names."""
    run_id = state.get("id") if isinstance(state, dict) else None
    return isinstance(run_id, str) and re.fullmatch(r"[A-Za-z0-9_-]{1,64}", run_id) is not None
