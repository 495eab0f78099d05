"""Our tokenizers as the files that transformers reads, and the proof that they encode alike.

A SentencePiece BPE model joins, of all neighbours, the two whose joined piece has the best score, the leftmost first; a
`tokenizer.json` lists pairs by rank. So every way to cut a piece into two pieces becomes a pair, ranked by the piece. Pieces are
written with plain spaces, not SentencePiece's U+2581: a real U+2581 in a text then has no piece and becomes bytes, as it does here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_scratch.data.tokenizer import BYTE_LEVEL, SPACE, ByteTokenizer, HFTokenizer, SentencePieceTokenizer, Tokenizer
from megatron_scratch.util.errors import RunFailed, UserError
from megatron_scratch.util.files import atomic_write, write_json

EOD = "<|endoftext|>"
BOS_PIECES = ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>")  # of published tokenizers; else a document begins with EOD
WITHOUT = "give tokenizer=false to export without"
SAMPLES = (
    "", " ", "\n", "\t", "  two  spaces  ", "\n\n  lead and trail \n\n", "tabs\t\t\tand\r\nreturns\r", " " * 37, "x" * 500,
    "def f(x: int) -> str:\n    if x:\n        return f'{x:>8}'\n\n\nclass A:\n\tpass\n", "It's 12345678901234567890, isn't it?",
    "caf\u00e9 na\u00efve \u65e5\u672c\u8a9e \u0440\u0443\u0441 \U0001f600\u200d\U0001f525", "combining a\u0301, ligature \ufb01",
    "mark \u2581\u2581 x", "\u2581", "nul \0 bell \x07", "\ufeffbom", "<|endoftext|></s><unk><s><0x41><0xFF>",
)  # fmt: skip
RUN = 64  # ids of a text made of the vocabulary's own pieces


def write_files(tokenizer: Tokenizer, folder: Path, max_length: int) -> tuple[int, int]:
    """Write `tokenizer.json`, `tokenizer_config.json`, and a SentencePiece model as it is.

    Returns:
        The ids that begin and end a document.

    Raises:
        UserError: a tokenizer that those files cannot say.
    """
    content = tokenizer.content if isinstance(tokenizer, HFTokenizer) else _built(tokenizer).encode()
    names = _names(content)
    eod = names[tokenizer.eod_id]
    bos = next((piece for piece in BOS_PIECES if piece in names.values()), eod)
    unknown = {} if tokenizer.unk_id is None else {"unk_token": names[tokenizer.unk_id]}
    with atomic_write(folder / "tokenizer.json") as f:
        f.write(content)
    if isinstance(tokenizer, SentencePieceTokenizer):
        tokenizer.save(folder)  # as it is, too: an import goes on with data that it has encoded
    # split_special_tokens: no text can end a document, here or there.
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eod, **unknown, "model_max_length": max_length,
        "clean_up_tokenization_spaces": False, "split_special_tokens": True})  # fmt: skip
    return next(i for i, name in names.items() if name == bos), tokenizer.eod_id


def _names(content: bytes) -> dict[int, str]:
    import tokenizers

    vocab = tokenizers.Tokenizer.from_str(content.decode()).get_vocab(with_added_tokens=True)
    return {i: piece for piece, i in vocab.items()}


def _built(tokenizer: Tokenizer) -> str:
    if isinstance(tokenizer, ByteTokenizer):
        return of_bytes()
    assert isinstance(tokenizer, SentencePieceTokenizer)
    return _sentencepiece(tokenizer)


def of_bytes() -> str:
    """The byte tokenizer as a `tokenizer.json`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = {byte: letter for letter, byte in BYTE_LEVEL.items()}
    model = Tokenizer(models.BPE({**{letters[i]: i for i in range(256)}, EOD: 256}, []))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens([AddedToken(EOD, special=True, normalized=False)])
    return model.to_str()  # type: ignore[no-any-return]


def _sentencepiece(tokenizer: SentencePieceTokenizer) -> str:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    kinds = _refuse(tokenizer)
    names = [p if kind != NORMAL else p.replace(SPACE, " ") for p, kind in zip(_pieces(tokenizer), kinds, strict=True)]
    vocab = {name: i for i, name in enumerate(names)}
    assert len(vocab) == len(names), "two pieces of one name"
    merges = _merges(tokenizer, names, kinds)
    unknown = next((name for name, kind in zip(names, kinds, strict=True) if kind == UNKNOWN), None)
    model = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=tokenizer.has_bytes))
    if not tokenizer.has_bytes:  # SentencePiece reads the mark as a space, and nothing here keeps it from that
        model.normalizer = normalizers.Replace(SPACE, " ")
    model.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    special = [name for name, kind in zip(names, kinds, strict=True) if kind in (UNKNOWN, CONTROL)]
    model.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    return model.to_str()  # type: ignore[no-any-return]


def _pieces(tokenizer: SentencePieceTokenizer) -> list[str]:
    return [tokenizer.model.id_to_piece(i) for i in range(tokenizer.vocab_size)]


def _merges(tokenizer: SentencePieceTokenizer, names: list[str], kinds: list[int]) -> list[tuple[str, str]]:
    """Every (left, right) whose joined piece is in the vocabulary, best first."""
    normal = {name: i for i, (name, kind) in enumerate(zip(names, kinds, strict=True)) if kind == NORMAL}
    best_first = sorted(normal, key=lambda name: (-tokenizer.model.get_score(normal[name]), normal[name]))
    return [(name[:k], name[k:]) for name in best_first for k in range(1, len(name)) if name[:k] in normal and name[k:] in normal]


# The fields of sentencepiece_model.proto that decide how a text is cut (https://github.com/google/sentencepiece).
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # ModelProto.SentencePiece.Type
UNIGRAM, BPE, CHAR = 1, 2, 4  # TrainerSpec.ModelType


def _refuse(tokenizer: SentencePieceTokenizer) -> list[int]:
    """The kind of each piece, of a model that can be written as rules of another library."""
    model = dict(_fields(tokenizer.content))
    trainer, normalizer = (dict(_fields(model.get(key, b""))) for key in (2, 3))
    kinds = [int(dict(_fields(value)).get(3, NORMAL)) for key, value in _fields(tokenizer.content) if key == 1]
    reason = ""
    if trainer.get(3, UNIGRAM) == UNIGRAM:
        reason = ("is a unigram model: it adds scores in 32 bits and transformers' library in 64, so of two cuts of equal score "
                  "(runs of spaces have many) they choose different ones")  # fmt: skip
    elif trainer.get(3) not in (BPE, CHAR):
        reason = "splits text into words, which no tokenizer.json does alike"
    elif normalizer.get(3, 1) or normalizer.get(4, 1) or normalizer.get(2, b""):
        reason = "normalises text (adds or removes spaces, or folds characters), which is not the same in tokenizer.json"
    elif other := set(kinds) - {NORMAL, UNKNOWN, CONTROL, BYTE}:
        reason = f"has user-defined or unused pieces (types {sorted(other)}), which tokenizer.json does not have"
    if reason:
        raise UserError(f"the run's SentencePiece tokenizer {reason}; {WITHOUT}, and use {tokenizer.file_name} with sentencepiece")
    return kinds


def _fields(message: Any) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a protobuf message, in order: numbers, and bytes (https://protobuf.dev/programming-guides/encoding)."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(message, at)
        else:
            size, at = _varint(message, at) if wire == 2 else ({1: 8, 5: 4}[wire], at)
            value, at = message[at : at + size], at + size
        yield key >> 3, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte, at = message[at], at + 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at


def prove(folder: Path, tokenizer: Tokenizer) -> str:
    """Load what was written with AutoTokenizer, and encode and decode texts: hard ones, and the vocabulary's own pieces in a row.

    Raises:
        RunFailed: an id or a character differs.
    """
    from transformers import AutoTokenizer

    theirs, size = AutoTokenizer.from_pretrained(folder, local_files_only=True), tokenizer.vocab_size
    texts = [*SAMPLES, *(tokenizer.decode(range(i, min(i + RUN, size))) for i in range(0, size, RUN))]
    for text in texts:
        ids = tokenizer.encode(text)
        if theirs.encode(text, add_special_tokens=False) != ids:
            raise RunFailed(f"AutoTokenizer encodes {text[:60]!r} otherwise than we do; {WITHOUT}; nothing is written")
        if theirs.decode(ids, skip_special_tokens=True) != tokenizer.decode(ids):
            raise RunFailed(f"AutoTokenizer decodes the ids of {text[:60]!r} otherwise than we do; {WITHOUT}; nothing is written")
    if theirs.eos_token_id != tokenizer.eod_id:
        raise RunFailed(f"AutoTokenizer ends documents with {theirs.eos_token_id}, we with {tokenizer.eod_id}; nothing is written")
    return f"AutoTokenizer encodes and decodes {len(texts)} texts as we do, {size} ids, end of document {tokenizer.eod_id}"
