"""Uniform texts, and lengths."""

from __future__ import annotations

import re
import unicodedata

from megatron_scratch.config.cleaners import LengthSettings, UnicodeSettings
from megatron_scratch.corpus.clean.base import Drop
from megatron_scratch.util.errors import choice

FORMS = ("NFC", "NFD", "NFKC", "NFKD")
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\u200b\u2060]")  # all but tab and line ends; zero-width ones
TRAILING = re.compile(r"[^\S\n]+(?=\n|\Z)")
BLANKS = re.compile(r"\n{3,}")


class Newlines:
    """Line ends as \\n, no byte order mark. Nothing else changes: a normal form would lose what the text said."""

    def __init__(self, settings: None):
        pass

    def __call__(self, text: str) -> str:
        text = text.removeprefix("\ufeff")
        return text.replace("\r\n", "\n") if "\r" in text else text


class Unicode:
    """A Unicode normal form (UAX 15)."""

    def __init__(self, settings: UnicodeSettings):
        choice("corpus.options.unicode.form", settings.form, FORMS)
        self.form = settings.form

    def __call__(self, text: str) -> str:
        return unicodedata.normalize(self.form, text)  # type: ignore[arg-type]


class Whitespace:
    """No control characters, no spaces at the end of a line, at most one blank line in a row, none at either end."""

    def __init__(self, settings: None):
        pass

    def __call__(self, text: str) -> str:
        text = CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n").replace("\u2028", "\n").replace("\u2029", "\n\n"))
        return BLANKS.sub("\n\n", TRAILING.sub("", text)).strip("\n")


class Length:
    """Documents of too few or too many characters go."""

    def __init__(self, settings: LengthSettings):
        self.least, self.most = settings.min_chars, settings.max_chars

    def __call__(self, text: str) -> str | Drop:
        if len(text) < self.least:
            return Drop(f"shorter than {self.least} characters")
        if self.most is not None and len(text) > self.most:
            return Drop(f"longer than {self.most} characters")
        return text
