"""Our tokenizers in transformers: the same ids, the same text, or a refusal."""

from __future__ import annotations

import inspect
import json
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hf_models import LLAMA, VOCAB, do_export, do_import, make_run
from transformers import AutoTokenizer

from megatron_scratch.corpus import train_tokenizer as trainers
from megatron_scratch.data.tokenizer import ByteTokenizer, HFTokenizer, Tokenizer, load_tokenizer
from megatron_scratch.train.hf import tokenizer as tokenizers
from megatron_scratch.train.hf.tokenizer import SAMPLES
from megatron_scratch.util.errors import RunFailed, UserError

TEXTS = [inspect.getsource(textwrap), inspect.getsource(json), "\tif x:\n\t\tprint('hello world')\n" * 50]


def hf_tokenizer() -> Tokenizer:
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer

    model = Library(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(
        TEXTS, BpeTrainer(vocab_size=290, special_tokens=special, show_progress=False, initial_alphabet=alphabet)
    )
    model.post_processor = processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)])
    return HFTokenizer(model.to_str().encode())


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "byte": ByteTokenizer,
    "bpe": lambda: trainers.sentencepiece_bpe(TEXTS, 600),
    "char": lambda: trainers.sentencepiece_char(TEXTS, 600),
    "hf": hf_tokenizer,
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokenizers_agree(kind: str, tmp_path: Path) -> None:
    ours = TOKENIZERS[kind]()
    make_run(tmp_path / "run", replace(LLAMA, vocab_size=max(ours.vocab_size, VOCAB)), ours)
    lines = do_export(tmp_path / "run", tmp_path / "out")
    assert f"{ours.vocab_size} ids, end of document {ours.eod_id}" in lines[-1]
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in [*SAMPLES, *TEXTS]:
        ids = ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)
        assert ours.eod_id not in ids
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["eos_token_id"] == theirs.eos_token_id == ours.eod_id
    assert config["bos_token_id"] == theirs.bos_token_id == (0 if kind == "hf" else ours.eod_id)
    do_import(tmp_path / "out", tmp_path / "back")
    assert load_tokenizer(tmp_path / "back").sha256 == ours.sha256, "data that it has encoded is its data"


def test_a_tokenizer_that_encodes_otherwise_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "run", replace(LLAMA, vocab_size=600), TOKENIZERS["bpe"]())
    right = tokenizers._merges
    monkeypatch.setattr(tokenizers, "_merges", lambda *args: right(*args)[::-1])
    with pytest.raises(RunFailed, match="AutoTokenizer encodes .* otherwise than we do; give tokenizer=false"):
        do_export(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_unigram_tokenizer_is_refused_unless_left_out(tmp_path: Path) -> None:
    make_run(tmp_path / "run", replace(LLAMA, vocab_size=600), trainers.sentencepiece_unigram(TEXTS, 600))
    with pytest.raises(UserError, match="is a unigram model: .* give tokenizer=false"):
        do_export(tmp_path / "run", tmp_path / "out")
    do_export(tmp_path / "run", tmp_path / "out", tokenizer=False)
    assert not list((tmp_path / "out").glob("tokenizer*"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["eos_token_id"] is None, "transformers would take Llama's 2 for it"
    assert "none" in do_import(tmp_path / "out", tmp_path / "back")[2]
