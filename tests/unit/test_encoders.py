"""Encoders: the same ids as the tokenizer's own library or none; no text injects a control id; what is missing is passed over."""

from __future__ import annotations

import inspect
import json
import random
import string
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_scratch.corpus import train_tokenizer
from megatron_scratch.corpus.write import encoders
from megatron_scratch.corpus.write.encoders import (
    HOSTILE,
    CannotEncode,
    Gigatoken,
    Native,
    Tiktoken,
    choose,
    load_encoder,
    probes,
)
from megatron_scratch.data.tokenizer import SPACE, ByteTokenizer, HFTokenizer, Tokenizer, load_tokenizer
from megatron_scratch.util.errors import UserError

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("gigatoken")
pytest.importorskip("tiktoken")

TEXTS = [inspect.getsource(module) for module in (string, textwrap, random, json.decoder)]
NANOCHAT = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
EOD = "<|endoftext|>"


def byte_level(cut: Any, normalizer: Any = None, added: tuple[str, ...] = (), **bpe: Any) -> HFTokenizer:
    """A `tokenizer.json` like those on the hub."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE(**bpe))
    model.pre_tokenizer, model.decoder = cut, tokenizers.decoders.ByteLevel()
    if normalizer is not None:
        model.normalizer = normalizer
    model.train_from_iterator(TEXTS, tokenizers.trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<s>", EOD], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))  # fmt: skip
    model.add_tokens(list(added))
    return HFTokenizer(model.to_str().encode())


def split(pattern: str) -> Any:
    cut = tokenizers.pre_tokenizers
    return cut.Sequence([cut.Split(tokenizers.Regex(pattern), "isolated"), cut.ByteLevel(add_prefix_space=False, use_regex=False)])


def gpt2(**settings: Any) -> HFTokenizer:
    return byte_level(tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), **settings)


def without_bytes() -> Tokenizer:
    """A SentencePiece BPE whose rare characters are unknown, as older ones are."""
    return train_tokenizer._train(iter(TEXTS), 900, model_type="bpe", byte_fallback=False, character_coverage=1.0)


MADE = {
    "bpe": lambda: train_tokenizer.bpe(TEXTS, 900),
    "gpt2": gpt2,
    "gpt2_space": lambda: byte_level(tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "gpt2_nfc": lambda: gpt2(normalizer=tokenizers.normalizers.NFC()),
    "gpt2_added": lambda: gpt2(added=("the", "  ", "don't")),
    "gpt2_ignore_merges": lambda: gpt2(ignore_merges=True),
    "nanochat": lambda: byte_level(split(NANOCHAT)),
    "sentencepiece_bpe": lambda: train_tokenizer.sentencepiece_bpe(TEXTS, 900),
    "sentencepiece_without_bytes": without_bytes,
    "sentencepiece_unigram": lambda: train_tokenizer.sentencepiece_unigram(TEXTS, 500),
    "sentencepiece_char": lambda: train_tokenizer.sentencepiece_char(TEXTS, 500),
    "byte": ByteTokenizer,
}
TAKES = {
    "gigatoken": {"bpe", "gpt2", "gpt2_space", "gpt2_nfc", "gpt2_added", "gpt2_ignore_merges", "sentencepiece_bpe"},
    "tiktoken": {"bpe", "gpt2", "gpt2_ignore_merges", "nanochat"},
    "native": set(MADE),
}
CLASSES = {"gigatoken": Gigatoken, "tiktoken": Tiktoken, "native": Native}
PAIRS = [(encoder, name) for encoder, names in TAKES.items() for name in sorted(names)]


@pytest.fixture(scope="module")
def made() -> dict[str, Tokenizer]:
    return {name: make() for name, make in MADE.items()}


def words(seed: int, count: int) -> list[str]:
    """Random texts of letters, spaces, digits, marks and control names that meet in all orders, and of any characters at all."""
    rng = random.Random(seed)
    pool = [*string.printable * 2, *(c for text in HOSTILE for c in text), EOD, "<s>", "</s>", "<unk>", "'s", "'LL", " the", "   ",
            "\r\n", "12345", SPACE]  # fmt: skip
    some = ["".join(rng.choices(pool, k=rng.randint(1, 60))) for _ in range(count)]
    points = [*range(0xD800), *range(0xE000, 0x110000)]  # all but the surrogates
    any_ = [rng.choices(points, k=30) for _ in range(count // 4)]
    return [*some, *("".join(map(chr, chosen)) for chosen in any_)]


@pytest.mark.parametrize("encoder,name", PAIRS, ids=lambda x: x)
def test_the_same_ids_as_the_tokenizers_own_library(made: dict[str, Tokenizer], encoder: str, name: str) -> None:
    tokenizer = made[name]
    texts = [*probes(tokenizer), *words(7, 1500), *TEXTS]
    ids, lengths = CLASSES[encoder](tokenizer).encode([text.encode() for text in texts])
    assert ids.dtype == np.uint32 and len(lengths) == len(texts) and int(lengths.sum()) == len(ids)
    for text, found in zip(texts, np.split(ids, np.cumsum(lengths)[:-1]), strict=True):
        assert found.tolist() == tokenizer.encode(text), repr(text)


@pytest.mark.parametrize("encoder,name", PAIRS, ids=lambda x: x)
def test_no_text_injects_a_control_id(made: dict[str, Tokenizer], encoder: str, name: str) -> None:
    tokenizer = made[name]
    control = {i for i, piece in enumerate(tokenizer.pieces) if not piece} - {tokenizer.unk_id}
    names = [EOD, "<s>", "</s>", "<unk>"]
    raw = [text.encode() for name in names for text in (name, f"a{name}b", f" {name} {name}", f"{name}\n" * 3)]
    ids, _ = CLASSES[encoder](tokenizer).encode(raw)
    assert control and not control & set(ids.tolist())


@pytest.mark.parametrize("name", MADE)
def test_who_takes_what(made: dict[str, Tokenizer], name: str, tmp_path: Path) -> None:
    for encoder, names in TAKES.items():
        if name not in names:
            with pytest.raises(CannotEncode):
                CLASSES[encoder](made[name])
    path = str(made[name].save(tmp_path))
    chosen, passed = choose(path, [text.encode() for text in TEXTS])
    wanted = next(encoder for encoder, names in TAKES.items() if name in names)
    assert chosen == wanted and list(passed) == list(TAKES)[: list(TAKES).index(wanted)]
    assert isinstance(load_encoder(path, chosen), CLASSES[chosen])


def test_where_gigatoken_disagrees(made: dict[str, Tokenizer]) -> None:
    """Its own reading of a SentencePiece model takes control names for ids and U+2581 for a space: these go to the library.

    If this fails, a newer gigatoken reads them as we do and `Gigatoken.special` can go."""
    tokenizer = made["sentencepiece_bpe"]
    bare = Gigatoken(tokenizer).model.encode
    assert bare(EOD.encode()).tolist() == [tokenizer.eod_id] != tokenizer.encode(EOD)
    assert bare(SPACE.encode()).tolist() == bare(b" ").tolist() != tokenizer.encode(SPACE)


def test_gigatoken_does_not_keep_all_words_for_ever(made: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "RENEW", 100)
    coder = Gigatoken(made["bpe"])
    models = {id(coder.model): coder.model}
    for text in TEXTS:
        for line in text.splitlines()[:10]:
            assert coder.ids(line.encode()).tolist() == made["bpe"].encode(line)
            models[id(coder.model)] = coder.model
    assert len(models) > 5


def test_one_that_disagrees_is_passed_over(made: dict[str, Tokenizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(made["bpe"].save(tmp_path))
    right = Gigatoken.ids
    monkeypatch.setattr(Gigatoken, "ids", lambda self, raw: right(self, raw.replace(b"zebra", b"horse")))
    assert choose(path, [b"a horse"]) == ("gigatoken", {})
    chosen, passed = choose(path, [b"a horse", b"a zebra", b"two zebras"])
    assert chosen == "tiktoken" and "for 2 of " in passed["gigatoken"]
    injected = b"<|endoftext|>"
    monkeypatch.setattr(Tiktoken, "ids", lambda self, raw: [self.tokenizer.eod_id] if raw == injected else self.native.ids(raw))
    chosen, passed = choose(path, [b"a zebra"])  # no control name in the sample: the probes have one
    assert chosen == "native" and set(passed) == {"gigatoken", "tiktoken"}


def test_one_that_is_asked_for_has_to_agree(made: dict[str, Tokenizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(made["bpe"].save(tmp_path))
    for name in ("tiktoken", "native"):
        assert choose(path, [b"a horse"], name) == (name, {})
    monkeypatch.setattr(Tiktoken, "ids", lambda self, raw: [0])
    with pytest.raises(UserError, match="corpus.encoder=tiktoken: other ids than.*; use corpus.encoder=auto"):
        choose(path, [b"a horse"], "tiktoken")
    with pytest.raises(UserError, match="corpus.encoder=gigatoken: gigatoken has nothing for a ByteTokenizer"):
        choose(str(ByteTokenizer().save(tmp_path)), [b"x"], "gigatoken")


def test_missing_packages_fall_through(made: dict[str, Tokenizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(made["bpe"].save(tmp_path))
    encoders._built.cache_clear()
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    chosen, passed = choose(path, [b"x"])
    assert chosen == "tiktoken" and "gigatoken is not installed" in passed["gigatoken"]
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    encoders._built.cache_clear()
    chosen, passed = choose(path, [b"x"])
    assert chosen == "native" and "tiktoken is not installed" in passed["tiktoken"]
    with pytest.raises(UserError, match="corpus.encoder=gigatoken: gigatoken is not installed.*use corpus.encoder=auto") as error:
        load_encoder(path, "gigatoken")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("space", [" ", "\t\u00a0"])
def test_a_million_spaces(made: dict[str, Tokenizer], space: str, capfd: pytest.CaptureFixture[str]) -> None:
    """tiktoken's regexes overflow their stack, which raises what is no Exception: it must not end a worker."""
    raw = (space * (1_200_000 // len(space)) + "x").encode()
    assert Tiktoken(made["gpt2"]).encode([raw, b"a b"])[1].tolist() == Native(made["gpt2"]).encode([raw, b"a b"])[1].tolist()
    capfd.readouterr()  # what Rust says about it


def test_other_ends_are_not_taken_for_the_text_s(made: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a Rust panic is left to `native`: Ctrl-C and a full memory end the task."""
    coder = Tiktoken(made["gpt2"])
    for kind in (KeyboardInterrupt, MemoryError):

        class Failing:
            error = kind

            def encode_ordinary(self, text: str) -> list[int]:
                raise self.error

        coder.model = Failing()
        with pytest.raises(kind):
            coder.ids(b"x")


def test_native_keeps_to_its_thread(made: dict[str, Tokenizer]) -> None:
    """Workers are the parallelism: SentencePiece is told one thread, tokenizers gets one text at a time."""
    assert Native(train_tokenizer.sentencepiece_bpe(TEXTS, 900)).tokenizer.threads == 1
    batches: list[int] = []
    tokenizer = made["bpe"]

    class Counted:
        def encode_batch_fast(self, texts: list[str], add_special_tokens: bool) -> Any:
            batches.append(len(texts))
            return tokenizer.model.encode_batch_fast(texts, add_special_tokens=add_special_tokens)

    other = HFTokenizer(tokenizer.content)
    other.model = Counted()
    tokens = Native(other).encode([b"a b c"] * 5)[1]
    assert tokens.tolist() == [len(tokenizer.encode("a b c"))] * 5 and batches == [1] * 5


def test_no_texts(made: dict[str, Tokenizer]) -> None:
    for encoder, name in PAIRS:
        ids, lengths = CLASSES[encoder](made[name]).encode([])
        assert ids.shape == (0,) and lengths.shape == (0,)


def test_a_tokenizer_file_that_is_given_is_read_once(made: dict[str, Tokenizer], tmp_path: Path) -> None:
    path = str(made["bpe"].save(tmp_path))
    (tmp_path / "copy").mkdir()
    copy = str(made["bpe"].save(tmp_path / "copy"))
    assert load_encoder(path, "native") is load_encoder(copy, "native"), "known by what it says"
    made["gpt2"].save(tmp_path)
    assert load_encoder(path, "native") is not load_encoder(copy, "native")
    assert load_tokenizer(path).sha256 == made["gpt2"].sha256
