"""A config that is refused, in one line that says what, got, allowed, and what to do."""

from __future__ import annotations

import pytest

from megatron_scratch.config import check, compose
from megatron_scratch.util.errors import UserError


def refused_in_one_line(world: int, overrides: list[str], words: list[str]) -> None:
    """`check` refuses `overrides` on `world` processes; the message has all the `words` in it."""
    with pytest.raises(UserError) as caught:
        check(compose.load(overrides), world)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
