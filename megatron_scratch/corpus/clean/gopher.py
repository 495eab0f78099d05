"""Gopher's heuristics (Rae et al., 2021, arXiv 2112.11446, appendix A1.1), as datatrove computes them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from megatron_scratch.config.cleaners import GopherQualitySettings, GopherRepetitionSettings, check_settings
from megatron_scratch.corpus.clean.base import Drop
from megatron_scratch.corpus.clean.repeats import repeated_grams
from megatron_scratch.corpus.clean.words import MOST, words
from megatron_scratch.util.errors import UserError

ELLIPSES = ("...", "\u2026")
BULLETS = ("\u2022", "-")
Test = Iterator[tuple[bool, str]]  # (does it apply, why the document goes)


def above(value: float, limit: float | None) -> bool:
    return limit is not None and value > limit


def below(value: float, limit: float | None) -> bool:
    return limit is not None and value < limit


def judged(name: str, text: str, tests: Test) -> str | Drop:
    """The text, or the first reason that applies."""
    return next((Drop(f"{name}: {why}") for applies, why in tests if applies), text)


class GopherQuality:
    """Texts that are too short or long, of odd words, of hash signs, bullets, ellipses, numbers, or without English stop words."""

    def __init__(self, settings: GopherQualitySettings):
        check_settings("gopher_quality", settings)
        self.s, self.stop = settings, frozenset(settings.stop_words)
        if settings.min_stop_words is not None and settings.min_stop_words > len(self.stop):
            raise UserError(f"corpus.options.gopher_quality.min_stop_words={settings.min_stop_words} is above the {len(self.stop)} "
                            "of stop_words; no document can have so many")  # fmt: skip

    def __call__(self, text: str) -> str | Drop:
        return judged("gopher_quality", text, self._tests(text[:MOST]))

    def _tests(self, text: str) -> Test:
        s, all_words = self.s, words(text)
        named = [w for w in all_words if w[0].isalnum() or any(map(str.isalnum, w))]  # not marks of punctuation
        mean = sum(map(len, named)) / max(1, len(named))
        yield not all_words, "no words"
        yield below(len(named), s.min_doc_words), f"fewer than {s.min_doc_words} words"
        yield above(len(named), s.max_doc_words), f"more than {s.max_doc_words} words"
        yield below(mean, s.min_avg_word_length), f"mean word shorter than {s.min_avg_word_length} characters"
        yield above(mean, s.max_avg_word_length), f"mean word longer than {s.max_avg_word_length} characters"
        ellipses = sum(map(text.count, ELLIPSES))
        yield above(text.count("#") / len(all_words), s.max_symbol_word_ratio), f"more than {s.max_symbol_word_ratio} # per word"
        yield above(ellipses / len(all_words), s.max_symbol_word_ratio), f"more than {s.max_symbol_word_ratio} ellipses per word"
        lines = text.splitlines()
        share = sum(line.lstrip().startswith(BULLETS) for line in lines) / len(lines)
        yield above(share, s.max_bullet_lines_ratio), f"more than {s.max_bullet_lines_ratio} of lines are bullets"
        share = sum(line.rstrip().endswith(ELLIPSES) for line in lines) / len(lines)
        yield above(share, s.max_ellipsis_lines_ratio), f"more than {s.max_ellipsis_lines_ratio} of lines end with an ellipsis"
        share = sum(w.isalpha() or any(map(str.isalpha, w)) for w in named) / len(all_words)
        yield below(share, s.min_alpha_words_ratio), f"fewer than {s.min_alpha_words_ratio} of words have a letter"
        yield below(len(self.stop.intersection(all_words)), s.min_stop_words), f"fewer than {s.min_stop_words} stop words"


class GopherRepetition:
    """Texts that say the same again: lines, paragraphs, the most frequent 2- to 4-gram, any 5- to 10-grams."""

    def __init__(self, settings: GopherRepetitionSettings):
        check_settings("gopher_repetition", settings)
        self.s = settings
        self.top = {n: getattr(settings, f"top_{n}_gram") for n in (2, 3, 4)}
        self.repeated = {n: getattr(settings, f"dup_{n}_gram") for n in range(5, 11)}

    def __call__(self, text: str) -> str | Drop:
        return judged("gopher_repetition", text, self._tests(text[:MOST])) if text else text

    def _tests(self, text: str) -> Test:
        s = self.s
        lines = [line for line in text.split("\n") if line]
        for what, pieces, count, chars in (("paragraphs", paragraphs(text), s.dup_para_frac, s.dup_para_char_frac),
                                           ("lines", lines, s.dup_line_frac, s.dup_line_char_frac)):  # fmt: skip
            again, length = duplicates(pieces)
            yield above(again / max(1, len(pieces)), count), f"more than {count} of {what} are repeated"
            yield above(length / len(text), chars), f"more than {chars} of characters are in repeated {what}"
        for grams in repeated_grams(words(text), max(self.repeated)):
            if (limit := self.top.get(grams.n)) is not None:
                why = f"more than {limit} of characters are in one {grams.n}-gram"
                yield grams.top_chars() / len(text) > limit, why
            if (limit := self.repeated.get(grams.n)) is not None:
                why = f"more than {limit} of characters are in repeated {grams.n}-grams"
                yield grams.repeated_chars() / len(text) > limit, why


def paragraphs(text: str) -> list[str]:
    """What blank lines separate."""
    return re.split(r"\n{2,}", text.strip())


def duplicates(pieces: list[str]) -> tuple[int, int]:
    """(pieces that came before, their characters)."""
    different = set(pieces)
    return len(pieces) - len(different), sum(map(len, pieces)) - sum(map(len, different))
