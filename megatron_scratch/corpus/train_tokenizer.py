"""Tokenizers from text. Each function: (texts, vocab_size) -> Tokenizer, the same one every time.

All of them give back any text exactly: no normalisation, no added or removed spaces, bytes where a character has no piece.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from megatron_scratch.data.tokenizer import BYTE_LEVEL, SPACE, ByteTokenizer, HFTokenizer, SentencePieceTokenizer, Tokenizer
from megatron_scratch.util.errors import UserError

EOD_PIECE = "<|endoftext|>"
CONTROL = 2  # SentencePiece insists on an unknown piece; EOD is the other
COVERAGE = 0.9995  # of the characters in the text; the rest, rare ones, become bytes (SentencePiece's advice for large alphabets)
PIECE_CHARS = 8192  # of text handed to the trainer at once: longer pieces make it slow, and it skips those over 16 MiB silently
SETTINGS = {
    "normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True, "split_digits": True, "max_sentence_length": 1 << 24, "num_threads": 2, "minloglevel": 9,
    "unk_id": 0, "eos_id": 1, "bos_id": -1, "pad_id": -1, "eos_piece": EOD_PIECE,
}  # fmt: skip
# Llama 3's, by which GPT-4 and Qwen cut too, but for the digits; gigatoken has a fast path for it
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
          r"\s+(?!\S)|\s+")  # fmt: skip
# num_threads also decides how unigram's sums are cut, hence the result: it is a constant, not the number of cores


def _blocks(texts: Iterable[str], size: int = PIECE_CHARS) -> Iterator[str]:
    """The texts in pieces of at most `size` characters, cut after a line where there is one."""
    for text in texts:
        start = 0
        while start < len(text):
            end = min(start + size, len(text))
            if end < len(text):
                end = text.rfind("\n", start + 1, end) + 1 or end
            yield text[start:end]
            start = end


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for block in _blocks(texts):
        yield from block.splitlines(keepends=True)


def _train(pieces: Iterator[str], vocab_size: int, **settings: Any) -> SentencePieceTokenizer:
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(sentence_iterator=pieces, model_writer=model, vocab_size=vocab_size, **SETTINGS, **settings)
    except (RuntimeError, OSError) as error:
        raise UserError(_one_line(str(error), vocab_size)) from error
    return SentencePieceTokenizer(model.getvalue())


def _one_line(message: str, vocab_size: int) -> str:
    """SentencePiece's complaint in our words."""
    if high := re.search(r"set it to a value <= (\d+)", message):
        return f"corpus.vocab_size={vocab_size} is too large for this text; allowed: at most {high[1]}; lower it, or add text"
    if low := re.search(r"(\d+) vs (\d+)", message):
        return f"corpus.vocab_size={vocab_size} is too small: bytes and characters alone need {low[2]}; raise it to that or more"
    return f"no tokenizer of corpus.vocab_size={vocab_size} can be trained on this text: {' '.join(message.split())[:300]}"


def bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE (GPT-2; arXiv 1508.07909) by Hugging Face tokenizers, cut by Llama 3's regex: a `tokenizer.json`.

    Ids: EOD, the 256 bytes, then the merges in the order they were learned. The package counts words on all cores, and ties
    between merges are broken by id: the result does not depend on threads.
    """
    least = len(BYTE_LEVEL) + 1
    if vocab_size < least:
        raise UserError(f"corpus.vocab_size={vocab_size} is too small: bytes and the end of a document alone need {least}; raise "
                        "it to that or more")  # fmt: skip
    tokenizers = _tokenizers()
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    cut = tokenizers.pre_tokenizers
    model.pre_tokenizer = cut.Sequence([cut.Split(tokenizers.Regex(LLAMA3), "isolated"),
                                        cut.ByteLevel(add_prefix_space=False, use_regex=False)])  # fmt: skip
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[EOD_PIECE], show_progress=False,
                                             initial_alphabet=sorted(BYTE_LEVEL))  # fmt: skip
    model.train_from_iterator(_blocks(texts), trainer)
    if model.get_vocab_size() < vocab_size:
        raise UserError(f"corpus.vocab_size={vocab_size} is too large for this text; allowed: at most {model.get_vocab_size()}; "
                        "lower it, or add text")  # fmt: skip
    return HFTokenizer(model.to_str().encode())


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise UserError("corpus.tokenizer=bpe needs the package tokenizers, which is not installed; run: pip install "
                        "'megatron-scratch[hf]', or use corpus.tokenizer=sentencepiece_bpe") from error  # fmt: skip
    return tokenizers


def sentencepiece_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-pair encoding (arXiv 1508.07909) with byte fallback. Pieces may hold line ends: 7 % fewer tokens on source code."""
    return _train(_blocks(texts), vocab_size, model_type="bpe", byte_fallback=True, character_coverage=COVERAGE)


def sentencepiece_unigram(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """The unigram language model (arXiv 1804.10959) with byte fallback. Trained line by line: whole texts take 15 times as long."""
    return _train(_lines(texts), vocab_size, model_type="unigram", byte_fallback=True, character_coverage=COVERAGE)


def sentencepiece_char(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """One id for each character of the text, and two control ids; `vocab_size` is an upper bound.

    It must see the whole corpus (`whole_corpus`): a character it never saw would be unknown. Only counts are kept: memory
    does not grow with the text.
    """
    counts: Counter[str] = Counter()
    for block in _blocks(texts):
        counts.update(block)
    if SPACE in counts:
        raise UserError("corpus.tokenizer=sentencepiece_char cannot tell U+2581, which is in this text, from a space; "
                        "use corpus.tokenizer=sentencepiece_bpe or byte")  # fmt: skip
    need = len(counts) + CONTROL
    if need > vocab_size:
        raise UserError(f"corpus.vocab_size={vocab_size} is too small: this text has {len(counts)} different characters; "
                        f"raise it to {need} or more, or use corpus.tokenizer=sentencepiece_bpe")  # fmt: skip
    letters = "".join(sorted(counts))
    tokenizer = _train(iter([letters * 2]), need, model_type="char", byte_fallback=False, character_coverage=1.0)
    if lost := sorted(set(letters) - set(tokenizer.decode(tokenizer.encode(letters)))):
        raise UserError(f"corpus.tokenizer=sentencepiece_char cannot hold {lost[0]!r} of this text; use sentencepiece_bpe")
    return tokenizer


sentencepiece_char.whole_corpus = True


def byte(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """UTF-8 bytes: nothing is trained, `vocab_size` is an upper bound."""
    if vocab_size < ByteTokenizer().vocab_size:
        raise UserError(f"corpus.vocab_size={vocab_size} is too small: corpus.tokenizer=byte has 257 ids; raise it to 257 or more")
    return ByteTokenizer()


Trainer = Callable[[Iterable[str], int], Tokenizer]
