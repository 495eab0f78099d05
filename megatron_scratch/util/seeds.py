"""Random numbers as a function of what they are for: there is no generator state to save, to pass on, or to lose."""

from __future__ import annotations

import hashlib


def seed_from(*parts: object) -> int:
    """A seed in [0, 2^63) from words and numbers that name one draw, e.g. (seed, parameter name, block of rows)."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & (2**63 - 1)
