"""Tokenizers: every text comes back, every byte is counted, streams give whole characters."""

from __future__ import annotations

import inspect
import json
import string
import textwrap
from pathlib import Path

import numpy as np
import pytest

from megatron_scratch.corpus import train_tokenizer as trainers
from megatron_scratch.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from megatron_scratch.util.errors import UserError

CORPUS = [inspect.getsource(string), inspect.getsource(textwrap), "\tif x:\n\t\tprint('hello world')\n" * 50]
SIZE = 450
HARD = [
    "", " ", "\n", "\t", "  two  spaces  ", "\n\n  lead and trail \n\n", "tabs\t\t\tand\r\nreturns\r",
    "caf\u00e9 na\u00efve \u65e5\u672c\u8a9e \U0001f600", "combining a\u0301, ligature \ufb01", "mark \u2581\u2581 x", "\u2581",
    "nul \0 bell \x07", "\ufeffbom", "<|endoftext|></s><unk><0x41>", "12345678901234567890", "x" * 500,
]  # fmt: skip


def hf_content() -> bytes:
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.train_from_iterator(CORPUS, tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "<|endoftext|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))  # fmt: skip
    return model.to_str().encode()


@pytest.fixture(scope="module", params=["byte", "bpe", "unigram", "hf"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if request.param == "hf":
        path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
        path.write_bytes(hf_content())
        return load_tokenizer(path)
    if request.param == "byte":
        return ByteTokenizer()
    return getattr(trainers, f"sentencepiece_{request.param}")(CORPUS, SIZE)


def test_every_text_comes_back(tokenizer: Tokenizer) -> None:
    batch = tokenizer.encode_batch(HARD)
    for text, ids in zip(HARD, batch, strict=True):
        assert tokenizer.decode(ids) == text
        assert ids == tokenizer.encode(text)
        assert tokenizer.eod_id not in ids  # no text can end a document
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.unk_id is None


def test_every_byte_is_counted(tokenizer: Tokenizer) -> None:
    assert tokenizer.bytes_per_id.shape == (tokenizer.vocab_size,) and tokenizer.bytes_per_id[tokenizer.eod_id] == 0
    for text in HARD + CORPUS:
        assert int(tokenizer.bytes_per_id[np.array(tokenizer.encode(text), dtype=int)].sum()) == len(text.encode())


def test_streams_give_whole_characters(tokenizer: Tokenizer) -> None:
    for text in HARD:
        stream = tokenizer.decode_stream()
        pieces = [stream.push(i) for i in tokenizer.encode(text)]
        assert "".join(pieces) == text and "\ufffd" not in "".join(pieces) and stream.flush() == ""


def test_a_stream_replaces_what_is_no_text() -> None:
    stream = ByteTokenizer().decode_stream()
    assert [stream.push(b) for b in "\u00e9".encode()] == ["", "\u00e9"]
    assert stream.push(0xFF) == "\ufffd" and stream.push(0xE9) == "" and stream.flush() == "\ufffd"
    assert ByteTokenizer().decode([0xFF, 65, 256]) == "\ufffdA"


def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tokenizer.save(tmp_path)
    for again in (load_tokenizer(path), load_tokenizer(tmp_path)):
        assert type(again) is type(tokenizer)
        assert (again.sha256, again.vocab_size, again.eod_id) == (tokenizer.sha256, tokenizer.vocab_size, tokenizer.eod_id)
        assert again.encode(CORPUS[0]) == tokenizer.encode(CORPUS[0])


def test_byte_tokenizer_file(tmp_path: Path) -> None:
    path = ByteTokenizer().save(tmp_path)
    assert path.name == "tokenizer.json" and json.loads(path.read_text()) == {"type": "byte"}
    assert ByteTokenizer().vocab_size == 257 and ByteTokenizer().eod_id == 256


def test_training_is_deterministic_and_learns() -> None:
    for train in (trainers.sentencepiece_bpe, trainers.sentencepiece_unigram):
        a, b = train(CORPUS, SIZE), train(iter(CORPUS), SIZE)
        assert a.content == b.content and a.vocab_size == SIZE
        assert len(a.encode(CORPUS[0])) < 0.6 * len(CORPUS[0])


def test_characters() -> None:
    tokenizer = trainers.sentencepiece_char(CORPUS, 1000)
    letters = set("".join(CORPUS))
    assert tokenizer.vocab_size == len(letters) + 2
    for text in CORPUS:
        ids = tokenizer.encode(text)
        assert len(ids) == len(text) and tokenizer.decode(ids) == text and tokenizer.unk_id not in ids
        assert int(tokenizer.bytes_per_id[ids].sum()) == len(text.encode())
    assert tokenizer.unk_id in tokenizer.encode("\u65e5")


@pytest.mark.parametrize("name,size,words", [
    ("sentencepiece_bpe", 100_000, r"too large for this text; allowed: at most \d+"),
    ("sentencepiece_unigram", 100_000, r"too large for this text; allowed: at most \d+"),
    ("sentencepiece_bpe", 200, r"too small: bytes and characters alone need \d+"),
    ("sentencepiece_char", 10, "different characters; raise it to"),
    ("byte", 256, "257"),
])  # fmt: skip
def test_impossible_vocabularies(name: str, size: int, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        getattr(trainers, name)(CORPUS, size)
    assert "\n" not in str(error.value)


def test_the_largest_vocabulary_that_is_named_works() -> None:
    with pytest.raises(UserError) as error:
        trainers.sentencepiece_bpe(CORPUS, 100_000)
    most = int(str(error.value).split("at most ")[1].split(";")[0])
    assert trainers.sentencepiece_bpe(CORPUS, most).vocab_size == most


def test_characters_refuse_the_mark_they_cannot_tell_from_a_space() -> None:
    with pytest.raises(UserError, match="U\\+2581"):
        trainers.sentencepiece_char(["a \u2581"], 100)


def test_bad_files(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"not a model" * 50)
    (tmp_path / "empty.model").write_bytes(b"")
    for path, words in ((tmp_path, "not a SentencePiece model"), (tmp_path / "empty.model", "0 bytes"),
                        (tmp_path / "no", "does not exist")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            load_tokenizer(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no tokenizer.model or tokenizer.json"):
        load_tokenizer(tmp_path / "empty")


def test_bad_hugging_face_files(tmp_path: Path) -> None:
    tree = json.loads(hf_content())
    (tmp_path / "a.json").write_text('{"version": "1.0"}')
    with pytest.raises(UserError, match="is not a tokenizer.json"):
        load_tokenizer(tmp_path / "a.json")
    tree["added_tokens"][1]["content"] = "<nothing>"
    tree["model"]["vocab"]["<nothing>"] = tree["model"]["vocab"].pop("<|endoftext|>")
    (tmp_path / "b.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match="no end-of-document token"):
        load_tokenizer(tmp_path / "b.json")


def test_hugging_face_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install 'megatron-scratch\[hf\]'"):
        load_tokenizer(tmp_path)
