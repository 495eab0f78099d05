"""Gopher's heuristics, each threshold from both sides, on texts counted by hand from the paper's definitions."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from megatron_scratch.corpus.clean import Drop, build_cleaners
from megatron_scratch.corpus.clean.repeats import repeated_grams
from megatron_scratch.corpus.clean.words import words

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def clean(name: str, text: str, **options: Any) -> str | Drop:
    return build_cleaners([name], {name: options})[0][1](text)


def distinct(count: int, length: int = 5, first: int = 0) -> list[str]:
    """`count` different words of letters."""
    found = []
    for i in range(first, first + count):
        word = ""
        for _ in range(length):
            i, digit = divmod(i, 26)
            word += LETTERS[digit]
        found.append(word)
    return found


def lines(count: int, begin: str = "", end: str = "", changed: int = 0) -> str:
    """Lines of 10 words; the first `changed` of them begin and end so."""
    made = [" ".join(["the", "of", *distinct(8, first=8 * i)]) for i in range(count)]
    return "\n".join(f"{begin}{line}{end}" if i < changed else line for i, line in enumerate(made))


def said(*parts: str | list[str]) -> str:
    return " ".join(" ".join(p) if isinstance(p, list) else p for p in parts)


QUALITY = {
    "fewer than 50 words": (said("the of", distinct(48)), said("the of", distinct(47))),
    "more than 100000 words": (said("the of", distinct(99_998)), said("the of", distinct(99_999))),
    "mean word shorter than 3.0 characters": (said("the and", distinct(48, 3), "? ? ?"), said("the and", distinct(47, 3), "xx")),
    # 3 + 3 + 46 x 10 + 2 x 17 = 500 characters
    "mean word longer than 10.0 characters": (said("the and", distinct(46, 10), "a" * 17, "b" * 17),
                                              said("the and", distinct(46, 10), "a" * 17, "b" * 18)),
    "more than 0.1 # per word": (said("the of", distinct(88), ["#"] * 10), said("the of", distinct(87), ["#"] * 10)),
    "more than 0.1 ellipses per word": (said(["..."] * 5, ["\u2026"] * 5, "the of", distinct(88)),
                                        said(["..."] * 5, ["\u2026"] * 5, "the of", distinct(87))),
    "more than 0.9 of lines are bullets": (lines(10, begin="\u2022 ", changed=9), lines(10, begin="  - ", changed=10)),
    "more than 0.3 of lines end with an ellipsis": (lines(10, end="...", changed=3), lines(10, end="\u2026 ", changed=4)),
    "fewer than 0.8 of words have a letter": (said("the of", distinct(78), [str(i) for i in range(1000, 1020)]),
                                              said("the of", distinct(77), [str(i) for i in range(1000, 1020)])),
    "fewer than 2 stop words": (said("the with", distinct(60)), said("the the", distinct(60))),
}  # fmt: skip


@pytest.mark.parametrize("reason", QUALITY)
def test_quality_thresholds(reason: str) -> None:
    kept, dropped = QUALITY[reason]
    assert clean("gopher_quality", kept) == kept
    assert clean("gopher_quality", dropped) == Drop(f"gopher_quality: {reason}")


@pytest.mark.parametrize("name, reason", [
    ("min_doc_words", "fewer than 50 words"), ("max_doc_words", "more than 100000 words"),
    ("min_alpha_words_ratio", "fewer than 0.8 of words have a letter"), ("min_stop_words", "fewer than 2 stop words"),
    ("min_avg_word_length", "mean word shorter than 3.0 characters"),
    ("max_avg_word_length", "mean word longer than 10.0 characters"),
    ("max_symbol_word_ratio", "more than 0.1 # per word"), ("max_bullet_lines_ratio", "more than 0.9 of lines are bullets"),
    ("max_ellipsis_lines_ratio", "more than 0.3 of lines end with an ellipsis"),
])  # fmt: skip
def test_a_quality_threshold_of_null_is_not_checked(name: str, reason: str) -> None:
    dropped = QUALITY[reason][1]
    assert clean("gopher_quality", dropped, **{name: None}) == dropped


def test_other_stop_words() -> None:
    text = said("der und", distinct(60))
    assert clean("gopher_quality", text) == Drop("gopher_quality: fewer than 2 stop words")
    assert clean("gopher_quality", text, stop_words=["der", "die", "und"]) == text


def test_marks_of_punctuation_are_words_only_where_words_with_letters_are_counted() -> None:
    text = said("the of", distinct(48), ["?"] * 13)  # 50 of 63 words have a letter
    assert clean("gopher_quality", text) == Drop("gopher_quality: fewer than 0.8 of words have a letter")
    assert clean("gopher_quality", said("the of", distinct(47), ["?"] * 12)) == Drop("gopher_quality: fewer than 50 words")


def filled(length: int, *middle: list[str]) -> str:
    """The groups of words with different ones in between, `length` characters in all."""
    text, used = "", 0
    for group in middle:
        text, used = text + said(distinct(1, 7, first=used), group) + " ", used + 1
    while length - len(text) > 15:
        text, used = text + distinct(1, 7, first=used)[0] + " ", used + 1
    return text + "z" * (length - len(text))


OFF: dict[str, None] = dict.fromkeys([f"dup_{what}_frac" for what in ("line", "para", "line_char", "para_char")]
                                     + [f"top_{n}_gram" for n in (2, 3, 4)] + [f"dup_{n}_gram" for n in range(5, 11)])  # fmt: skip


@pytest.mark.parametrize("name, unit, kept, dropped, reason", [
    # twice n words of 4 letters with spaces: 18 of 90, 28 of 156, 38 of 238 characters
    ("top_2_gram", 2, 90, 89, "more than 0.2 of characters are in one 2-gram"),
    ("top_3_gram", 3, 156, 155, "more than 0.18 of characters are in one 3-gram"),
    ("top_4_gram", 4, 238, 237, "more than 0.16 of characters are in one 4-gram"),
    # the second time only, without spaces: 20 of 134, 24 of 172, ...
    ("dup_5_gram", 5, 134, 133, "more than 0.15 of characters are in repeated 5-grams"),
    ("dup_6_gram", 6, 172, 171, "more than 0.14 of characters are in repeated 6-grams"),
    ("dup_7_gram", 7, 216, 215, "more than 0.13 of characters are in repeated 7-grams"),
    ("dup_8_gram", 8, 267, 266, "more than 0.12 of characters are in repeated 8-grams"),
    ("dup_9_gram", 9, 328, 327, "more than 0.11 of characters are in repeated 9-grams"),
    ("dup_10_gram", 10, 400, 399, "more than 0.1 of characters are in repeated 10-grams"),
])  # fmt: skip
def test_ngram_thresholds(name: str, unit: int, kept: int, dropped: int, reason: str) -> None:
    others = {key: None for key in OFF if key != name}
    group = distinct(unit, 4, first=1000)
    for length, wanted in ((kept, None), (dropped, Drop(f"gopher_repetition: {reason}"))):
        text = filled(length, group, group)
        assert len(text) == length
        assert clean("gopher_repetition", text, **others) == (wanted or text)
        assert clean("gopher_repetition", text, **OFF) == text


@pytest.mark.parametrize("mark, what", [("\n", "lines"), ("\n\n", "paragraphs")])
def test_repeated_lines_and_paragraphs(mark: str, what: str) -> None:
    some = distinct(14, 30)
    for again, kept in ((3, True), (4, False)):  # of 10; "a", "b", ... come twice each, far apart
        text = mark.join([*"abcd"[:again], *some[: 10 - 2 * again], *"abcd"[:again]])
        got = clean("gopher_repetition", text)
        assert got == (text if kept else Drop(f"gopher_repetition: more than 0.3 of {what} are repeated"))
    gaps = 4 * len(mark)
    for rest, kept in ((60 - gaps, True), (59 - gaps, False)):  # 20 characters again, of 100 and of 99
        text = mark.join(["a" * 20, "b" * 15, "c" * 15, "d" * (rest - 30), "a" * 20])
        got = clean("gopher_repetition", text)
        assert got == (text if kept else Drop(f"gopher_repetition: more than 0.2 of characters are in repeated {what}"))


def naive(found: list[str], n: int) -> tuple[int, int]:
    """(characters of the first most frequent n-gram times its count, 0 if none repeats; characters in repeated ones)."""
    grams = [tuple(found[i : i + n]) for i in range(len(found) - n + 1)]
    (gram, count), seen, i, chars = (Counter(grams).most_common(1) or [((), 0)])[0], set(), 0, 0
    while i < len(grams):
        if grams[i] in seen:
            chars, i = chars + len("".join(grams[i])), i + n
        else:
            seen.add(grams[i])
            i += 1
    return len(" ".join(gram)) * count if count > 1 else 0, chars


def test_repeated_grams_are_those_of_the_definition() -> None:
    draw = random.Random(1)
    for case in range(60):
        found = draw.choices(["a", "bb", "ccc", "dddd", "\u00e9", "z" * 9][: 2 + case % 5], k=draw.randrange(120))
        told = {g.n: (g.top_chars(), g.repeated_chars()) for g in repeated_grams(found, 10)}
        assert [told.get(n, (0, 0)) for n in range(2, 11)] == [naive(found, n) for n in range(2, 11)]
    grams = {g.n: g for g in repeated_grams(["x"] * 12, 5)}
    assert grams[2].top_chars() == 11 * 3 and grams[5].repeated_chars() == 10  # 1 to 5, 6 to 10; overlaps count once


SHALOM, HINDI, HELLO = "\u05e9\u05b8\u05dc\u05d5\u05b9\u05dd", "\u0939\u093f\u0928\u094d\u0926\u0940", "\u4f60\u597d"


@pytest.mark.parametrize("text, wanted", [
    ('If you don\'t (foo) use it, it\'s "fine".',
     ["If", "you", "don", "'t", "(", "foo", ")", "use", "it", ",", "it", "'s", '"', "fine", '"', "."]),
    ("3.14 1,000 10:30 foo.bar() f(x)->y me@b.com", ["3.14", "1,000", "10:30", "foo.bar", "(", ")", "f(x)->y", "me@b.com"]),
    ("http://a.b/c?d=e a/b a=b a-b a,b", ["http://a.b/c?d=e", "a", "/", "b", "a", "=", "b", "a", "-", "b", "a", ",", "b"]),
    ("--flag /usr ... --- == yes...no", ["--flag", "/usr", "...", "---", "=", "=", "yes", "...", "no"]),
    (f"{SHALOM} {HINDI} {HELLO}\u3002", [SHALOM, HINDI, HELLO, "\u3002"]),
    (" \n\t", []), ("x\U0001f600", ["x", "\U0001f600"]),
])  # fmt: skip
def test_words(text: str, wanted: list[str]) -> None:
    assert words(text) == wanted
