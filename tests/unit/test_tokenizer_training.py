"""Trainers: the same bytes every time, exactly the size that was asked for, any text comes back; and the report on the result."""

from __future__ import annotations

import ast
import inspect
import json
import os
import random
import string
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_scratch import registry
from megatron_scratch.config.corpus import CorpusConfig
from megatron_scratch.corpus import prepare, tokenizer_report, train_tokenizer
from megatron_scratch.corpus.train_tokenizer import EOD_PIECE, LLAMA3, bpe
from megatron_scratch.data.indexed import IndexedDataset
from megatron_scratch.data.tokenizer import ByteTokenizer, HFTokenizer, Tokenizer, load_tokenizer
from megatron_scratch.util.errors import UserError

pytest.importorskip("tokenizers")
TEXTS = [inspect.getsource(string), inspect.getsource(textwrap), "\tif x:\n\t\tprint('hello world')\n" * 50]
SIZES = {"bpe": 450, "sentencepiece_bpe": 450, "sentencepiece_unigram": 450, "byte": 257}
# Of each kind of character that programs trip over: separators, controls, marks, joiners, right-to-left, wide, private, astral
KINDS = ("\x00\x07\x0b\x0c\x1b\x7f\x85\xa0\xad\u0300\u0345\u061c\u0661\u0939\u093f\u0e33\u1100\u1161\u1680\u180e\u200b\u200d\u200e"
         "\u2028\u2029\u202e\u2060\u2581\u3000\u4e2d\uac00\ue000\ufb01\ufe0f\ufeff\uff11\ufffd\ufffe\uffff\U0001d7ce\U0001f468\U0001f1e9"
         "\U000e0001\U000f0000\U0010ffff")  # fmt: skip


@pytest.fixture(scope="module")
def trained() -> dict[str, Tokenizer]:
    return {name: registry.get("tokenizer_trainer", name)(TEXTS, size) for name, size in SIZES.items()}


def texts(seed: int, count: int) -> list[str]:
    """Random Unicode: of those kinds, of text, and of any characters, mixed."""
    rng = random.Random(seed)
    every = [*range(0xD800), *range(0xE000, 0x110000)]
    pools = [list(KINDS), list(string.printable), [EOD_PIECE, "<unk>", "<0x0A>", "</s>", " ", "  ", "\r\n", "'s", "the"]]
    made = []
    for _ in range(count):
        pool = [c for p in rng.sample(pools, 2) for c in p] + [chr(i) for i in rng.choices(every, k=40)]
        made.append("".join(rng.choices(pool, k=rng.randint(0, 50))))
    return made


@pytest.mark.parametrize("name", SIZES)
def test_any_text_comes_back(trained: dict[str, Tokenizer], name: str) -> None:
    tokenizer = trained[name]
    for text, ids in zip(given := [*texts(3, 1000), *KINDS, *TEXTS], tokenizer.encode_batch(given), strict=True):
        assert tokenizer.decode(ids) == text
        assert tokenizer.eod_id not in ids and int(tokenizer.bytes_per_id[ids].sum()) == len(text.encode())


@pytest.mark.parametrize("name", SIZES)
def test_the_same_bytes_and_the_size_that_was_asked_for(trained: dict[str, Tokenizer], name: str) -> None:
    again = registry.get("tokenizer_trainer", name)(iter(TEXTS), SIZES[name])
    assert again.content == trained[name].content and again.vocab_size == SIZES[name]


def test_threads_do_not_change_the_merges() -> None:
    """The package counts words on all cores, into tables whose order is random."""
    code = ("import inspect, string, json.decoder, random, argparse; from megatron_scratch.corpus.train_tokenizer import bpe; "
            "print(bpe([inspect.getsource(m) for m in (string, json.decoder, random, argparse)], 1500).sha256)")  # fmt: skip
    found = set()
    for settings in ({"TOKENIZERS_PARALLELISM": "false"}, {"RAYON_NUM_THREADS": "4", "TOKENIZERS_PARALLELISM": "true"}):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **settings})
        assert done.returncode == 0, done.stderr
        found.add(done.stdout)
    assert len(found) == 1


def test_the_file_is_a_byte_level_bpe_with_llama_3s_regex(trained: dict[str, Tokenizer], tmp_path: Path) -> None:
    tokenizer = trained["bpe"]
    assert isinstance(tokenizer, HFTokenizer) and tokenizer.eod_id == 0 and tokenizer.unk_id is None
    path = tokenizer.save(tmp_path)
    tree = json.loads(path.read_text("utf-8"))
    assert path.name == "tokenizer.json" and tree["model"]["type"] == "BPE" and not tree["normalizer"]
    assert tree["pre_tokenizer"]["pretokenizers"][0]["pattern"] == {"Regex": LLAMA3}
    assert [told["content"] for told in tree["added_tokens"]] == [EOD_PIECE] and len(tree["model"]["vocab"]) == 450
    assert sorted(tokenizer.pieces[1:257]) == sorted(bytes([b]) for b in range(256))
    assert load_tokenizer(path).encode("a b") == tokenizer.encode("a b")


def test_words_are_cut_as_llama_3_cuts_them(trained: dict[str, Tokenizer]) -> None:
    """No token crosses what the regex cuts: digits go by three, a contraction is apart, a space belongs to the word after it."""
    tokenizer = bpe(["2024 I'LL  go" * 200], 264)  # all merges there are
    pieces = [tokenizer.pieces[i].decode() for i in tokenizer.encode("2024 I'LL  go")]
    assert "".join(pieces) == "2024 I'LL  go" and "202" in pieces and " go" in pieces and "'LL" in pieces
    assert len(trained["bpe"].encode(TEXTS[1])) < 0.6 * len(TEXTS[1])


@pytest.mark.parametrize("size,words", [
    (256, "too small: bytes and the end of a document alone need 257; raise it to that or more"),
    (100_000, r"too large for this text; allowed: at most \d+; lower it, or add text"),
])  # fmt: skip
def test_sizes_that_cannot_be(size: int, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        bpe(TEXTS, size)
    assert "\n" not in str(error.value)


def test_the_sizes_that_are_named_work() -> None:
    assert bpe(TEXTS, 257).vocab_size == 257
    with pytest.raises(UserError) as error:
        bpe(TEXTS, 100_000)
    most = int(str(error.value).split("at most ")[1].split(";")[0])
    assert bpe(TEXTS, most).vocab_size == most
    with pytest.raises(UserError, match=f"at most {most}"):
        bpe(TEXTS, most + 1)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install 'megatron-scratch\[hf\]', or use corpus.tokenizer=sentencepiece_bpe"):
        bpe(TEXTS, 300)


# the report


def test_the_numbers_of_a_report() -> None:
    tokenizer = ByteTokenizer()
    documents = [np.array([*b"two words", 256]), np.array([*"\u00e9t\u00e9".encode(), 256]), np.array([256])]
    told = tokenizer_report.report(tokenizer, {"train": documents[:2], "valid": documents[2:]})
    assert told["train"] == {"documents": 2, "bytes_per_token": 1.0, "tokens_per_word": round(14 / 3, 4)}
    assert told["valid"] == {"documents": 1, "bytes_per_token": None, "tokens_per_word": None}
    assert told["unused_ids"] == 256 - len(set("two words\u00e9t\u00e9".encode()))
    used = np.ones(257, bool)
    used[[5, 7, 256]] = False  # EOD stands for no text: it is not waste
    assert tokenizer_report.report(tokenizer, {"train": documents}, used)["unused_ids"] == 2


def test_the_longest_tokens(trained: dict[str, Tokenizer]) -> None:
    found = tokenizer_report.longest(trained["bpe"])
    sizes = sorted((len(piece) for piece in trained["bpe"].pieces), reverse=True)[:10]
    assert len(found) == 10 and [len(printed(text)) for text in found] == sizes
    odd = ByteTokenizer()
    odd.pieces = [b"\xff\x00", b"x" * 300, b"a\nb"]
    odd.__dict__["bytes_per_id"] = np.array([len(p) for p in odd.pieces])
    assert tokenizer_report.longest(odd) == [f"{'x' * 80!r} and 220 characters more", "'a\\nb'", "'\\\\xff\\x00'"]


def printed(shown: str) -> str:
    """The text that Python printed as `shown`."""
    return ast.literal_eval(shown)


def test_the_sample_of_a_dataset_is_spread_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_scratch.data.writer import IndexedWriter

    with IndexedWriter(tmp_path / "x", "<u2") as writer:
        for i in range(100):
            writer.add_document([i] * 10)
    firsts = [int(ids[0]) for ids in tokenizer_report.written(tmp_path / "x")]
    assert firsts == list(range(100))
    monkeypatch.setattr(tokenizer_report, "DOCUMENTS", 4)
    assert [int(ids[0]) for ids in tokenizer_report.written(tmp_path / "x")] == [0, 25, 50, 75]
    monkeypatch.setattr(tokenizer_report, "TOKENS", 20)
    assert [int(ids[0]) for ids in tokenizer_report.written(tmp_path / "x")] == [0, 50]


def test_the_manifest_has_it_and_it_is_true_for_any_sharding(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"{i} {TEXTS[i % 3][: 900 * (i % 12)]}"}) for i in range(600)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))  # 2.5 MB
    config = CorpusConfig(input=str(tmp_path / "in.jsonl"), output=str(tmp_path / "a"), vocab_size=400, valid_fraction=0.2,
                          dedup="none", tokenizer="bpe", workers=1)  # fmt: skip
    told = prepare(config)["tokenizer"]
    lines_told: list[str] = []
    other = prepare(replace(config, output=str(tmp_path / "b"), workers=2, shard_mb=1), lines_told.append)["tokenizer"]
    assert any(line.startswith("encode: 1 of ") and "1 of 1" not in line for line in lines_told)  # there was something to join
    assert told == other and told["made_by"] == "bpe" and told["encoders_passed_over"] == {}
    tokenizer, used = load_tokenizer(tmp_path / "a"), set()
    for side in ("train", "valid"):
        data = IndexedDataset(tmp_path / "a" / side)
        ids = np.concatenate([data.document(i) for i in range(len(data))])
        used |= set(ids.tolist())
        text = ids[ids != tokenizer.eod_id]
        whole = round(float(tokenizer.bytes_per_id[text].sum()) / len(text), 4)
        if side == "valid":
            assert told["report"][side]["documents"] == len(data) and told["report"][side]["bytes_per_token"] == whole
        else:  # more than half a million tokens: a sample of them
            assert told["report"][side]["documents"] < len(data)
            assert told["report"][side]["bytes_per_token"] == pytest.approx(whole, rel=0.02)
    assert told["report"]["unused_ids"] == sum(bool(p) and i not in used for i, p in enumerate(tokenizer.pieces))


def test_every_trainer_is_in_this_file() -> None:
    assert set(registry.names("tokenizer_trainer")) == {
        *SIZES,
        "sentencepiece_char",
    }  # char: of its own text only, test_tokenizer.py
    assert train_tokenizer.sentencepiece_char.whole_corpus
