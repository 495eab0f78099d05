"""JSON that tells when it was changed: one of its fields is the sha256 of the others."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from megatron_scratch.util.files import write_json

SEAL = "checksum"


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """`value`, as JSON reads it back, with its checksum."""
    plain = json.loads(json.dumps({name: part for name, part in value.items() if name != SEAL}))
    return {**plain, SEAL: hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()}


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """Write `value` with its checksum, atomically."""
    write_json(path, sealed(value))


def changed(path: Path) -> str | None:
    """What is wrong with a file that `write_sealed` wrote; None if it is as it was written.

    It has to be, to the byte, what its content is written as: a flipped bit in \\u00e9 or 1e-05 may leave the content the same.
    """
    try:
        raw = path.read_bytes()
        value = json.loads(raw)
        if value.get(SEAL) != sealed(value)[SEAL] or raw != (json.dumps(value, indent=1) + "\n").encode():
            return "its content has another checksum than it names"
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        return f"it cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    return None
