"""All cleaners on real text, and on texts made to break them: nothing crashes, nothing is slow, the answer is the same twice."""

from __future__ import annotations

import time

import pytest

from megatron_scratch.corpus.clean import Drop, build_cleaners
from megatron_scratch.corpus.clean.words import sentences
from megatron_scratch.corpus.formats import Keys, Record, reader_of
from megatron_scratch.corpus.sources import find_files

NAMES = ["gopher_quality", "gopher_repetition", "c4", "fineweb", "pii"]
SIZE = 200_000  # characters; what is quadratic in them takes minutes
SECONDS = 10  # of the processor; it takes 0.1


@pytest.fixture(scope="module")
def cleaners():  # noqa: ANN201
    pytest.importorskip("fasttext")
    return build_cleaners([*NAMES, "language"], {})


UNITS = {
    "spaces": " ", "dots": ".", "at": "a@", "addresses": "a@b.c ", "joined": "a@b.c", "labels": "@a.", "hyphens": "@a-",
    "dotted": "a.", "numbers": "1.", "groups": "2001:", "colons": ":", "hash": "#", "letters": "a", "digits": "2", "lines": "\n",
    "paragraphs": "a\n\n", "brackets": "[1", "quotes": "'s", "schemes": "a://", "emoji": "\U0001f600",
    "right to left": "\u05d0 \u0639\u064e", "nul": "\0",
    "marks": "\u0301", "separators": "\x1c\u2028", "words": "a ", "bars": "a|", "braces": "{ ",
}  # fmt: skip


@pytest.mark.parametrize("unit", UNITS.values(), ids=list(UNITS))
def test_hostile_texts_cost_linear_time(cleaners, unit: str) -> None:  # noqa: ANN001
    body = unit * (SIZE // len(unit))
    for text in (body, f".{body}x"):
        for _, cleaner in cleaners:
            began = time.process_time()
            assert isinstance(cleaner(text), (str, Drop))
            assert time.process_time() - began < SECONDS


def test_sentences_of_dots_cost_linear_time() -> None:
    began = time.process_time()
    assert sentences("." * SIZE + "x") == 1 and sentences('. "' * SIZE) == SIZE + 1 and sentences("a. " + " " * SIZE) == 1
    assert time.process_time() - began < SECONDS


@pytest.mark.parametrize("text", ["", " ", "\n", "\0", "\u200b", "x", ".", "\u0301", "\U0001f600", "'s", "@", "\x1c\x1d", "\ufffe"])
def test_next_to_nothing(cleaners, text: str) -> None:  # noqa: ANN001
    for name, cleaner in cleaners:
        got = cleaner(text)
        assert isinstance(got, Drop) or got == text
        if not text.strip() and name in ("gopher_quality", "c4", "fineweb"):
            assert isinstance(got, Drop)


def test_real_text_gives_the_same_twice(cleaners) -> None:  # noqa: ANN001
    """Topics and sources of the standard library."""
    files = find_files("stdlib")[:25]
    texts = [r.text for f in files for r in reader_of(f)(f, 0, None, Keys("text", "id", 1 << 28)) if isinstance(r, Record)]
    assert len(texts) > 80
    kept = dict.fromkeys([*NAMES, "language"], 0)
    first = [[cleaner(text) for _, cleaner in cleaners] for text in texts]
    again = [[cleaner(text) for _, cleaner in reversed(cleaners)][::-1] for text in reversed(texts)][::-1]
    assert first == again  # whatever came before
    for row, text in zip(first, texts, strict=True):
        for (name, cleaner), got in zip(cleaners, row, strict=True):
            kept[name] += isinstance(got, str)
            assert isinstance(got, Drop) or name in ("c4", "pii") or got == text
            if isinstance(got, str):  # what passed once passes again; where C4 takes a citation out, it leaves the space
                assert _stripped(cleaner(got)) == _stripped(got) if name == "c4" else cleaner(got) == got
    assert all(0 < n < len(texts) for name, n in kept.items() if name != "pii") and kept["pii"] == len(texts)


def _stripped(text: str | Drop) -> list[str]:
    assert isinstance(text, str)
    return [line.strip() for line in text.split("\n")]
