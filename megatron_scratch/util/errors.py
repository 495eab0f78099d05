"""Errors that are the user's to mend: one line, exit code 2, nothing started, nothing lost."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The message says what is wrong, what was given, what is allowed, and what to do; it is one line."""


class RunFailed(RuntimeError):
    """A run that started and cannot go on (a non-finite loss, a failed rank). Exit code 1; the last line says why."""


class StopRequested(Exception):
    """The run stopped on request, after saving a checkpoint. Exit code 75: start it again to go on."""


def nearest(word: str, allowed: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the closest spelling among `allowed`, or an empty string."""
    close = difflib.get_close_matches(word, [str(a) for a in allowed], n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def choice(what: str, got: object, allowed: Iterable[str]) -> None:
    """Refuse `got` unless it is one of `allowed`."""
    allowed = list(allowed)
    if got not in allowed:
        raise UserError(f"{what}={got!r} is not known; allowed: {', '.join(map(str, allowed))}{nearest(str(got), allowed)}")
