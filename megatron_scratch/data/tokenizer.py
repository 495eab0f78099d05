"""Text to ids and back, behind one small class: a SentencePiece `.model`, a Hugging Face `tokenizer.json`, or plain bytes.

Every tokenizer knows the bytes that each id stands for, so bits per byte is exact and text can be streamed id by id.
No document can inject a control id: "<|endoftext|>" inside a text is encoded as the letters it is.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from megatron_scratch.util.errors import UserError
from megatron_scratch.util.files import atomic_write

EOD_PIECES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<|eot_id|>", "<eos>")  # the first one present ends a document
FILES = ("tokenizer.model", "tokenizer.json")  # what load_tokenizer looks for in a folder
SPACE = "\u2581"  # SentencePiece's mark for a space
BYTE_NAME = "megatron_scratch byte tokenizer: ids 0-255 are bytes, 256 is EOD"


class StreamDecoder:
    """Ids one at a time to text: bytes of an unfinished character are held back until it is whole."""

    def __init__(self, pieces: Sequence[bytes]):
        self.pieces = pieces
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that this id completes, maybe empty; bytes that cannot be UTF-8 become U+FFFD."""
        return self.decoder.decode(self.pieces[token])

    def flush(self) -> str:
        """What is held back, as U+FFFD; call it after the last id."""
        return self.decoder.decode(b"", final=True)


class Tokenizer(ABC):
    """What every tokenizer has.

    Attributes: content (bytes of the file it is saved as); file_name; sha256 (hex, of the content); eod_id; unk_id (None if
    any text can be encoded); pieces (vocab_size byte strings, empty for control ids); vocab_size.
    """

    file_name = "tokenizer.json"

    def __init__(self, content: bytes, pieces: list[bytes], eod_id: int, unk_id: int | None = None):
        self.content, self.pieces, self.eod_id, self.unk_id = content, pieces, eod_id, unk_id
        self.sha256 = hashlib.sha256(content).hexdigest()

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    @cached_property
    def bytes_per_id(self) -> np.ndarray:
        """(vocab_size,) i64: UTF-8 bytes that each id stands for; 0 for EOD and other control ids, and for unknown.

        Their sum over an encoded text is the length of the text in bytes, exactly, for tokenizers that do not normalise
        (all that `data prepare` trains; a foreign model may add a space or fold characters).
        """
        return np.array([len(piece) for piece in self.pieces], dtype=np.int64)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without EOD."""
        return self.encode_batch([text])[0]

    @abstractmethod
    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of several texts, each without EOD."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; control ids vanish, bytes that are not UTF-8 become U+FFFD."""
        return b"".join([self.pieces[i] for i in ids]).decode("utf-8", "replace")

    def decode_stream(self) -> StreamDecoder:
        return StreamDecoder(self.pieces)

    def save(self, folder: str | Path) -> Path:
        """Write the file under its own name in `folder`; returns its path."""
        path = Path(folder) / self.file_name
        with atomic_write(path) as f:
            f.write(self.content)
        return path


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes are the ids; 256 is EOD. 257 ids, nothing to train, nothing unknown."""

    def __init__(self) -> None:
        super().__init__(b'{"type": "byte"}\n', [bytes([i]) for i in range(256)] + [b""], eod_id=256)
        self.sha256 = hashlib.sha256(BYTE_NAME.encode()).hexdigest()

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [list(text.encode("utf-8")) for text in texts]


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model` (arXiv 1808.06226).

    SentencePiece writes a space as U+2581 and so reads a real U+2581 as a space; where the model has byte pieces we encode
    that character as its three bytes, which makes every text come back exactly.
    """

    file_name = "tokenizer.model"

    def __init__(self, content: bytes, where: str = "tokenizer.model", threads: int = 2):
        from sentencepiece import SentencePieceProcessor

        try:
            self.model = SentencePieceProcessor(model_proto=content) if content else None
        except (RuntimeError, OSError):
            self.model = None
        if self.model is None or not self.model.get_piece_size():
            raise UserError(f"{where} is not a SentencePiece model ({len(content)} bytes); give a .model file, whole")
        self.threads = threads
        size = self.model.get_piece_size()
        self.has_bytes = any(self.model.is_byte(i) for i in range(size))
        self.adds_space = self.model.encode("a", out_type=str)[0].startswith(SPACE)
        super().__init__(content, [self._bytes(i) for i in range(size)], self._eod(where, size),
                         None if self.has_bytes else self.model.unk_id())  # fmt: skip

    def _bytes(self, i: int) -> bytes:
        if self.model.is_control(i) or self.model.is_unknown(i):
            return b""
        piece = self.model.id_to_piece(i)
        return bytes([int(piece[3:5], 16)]) if self.model.is_byte(i) else piece.replace(SPACE, " ").encode()

    def _eod(self, where: str, size: int) -> int:
        if self.model.eos_id() >= 0:
            return self.model.eos_id()
        names = {self.model.id_to_piece(i): i for i in range(size) if self.model.is_control(i)}
        return _find_eod(names, where)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        if self.has_bytes and not self.adds_space and any(SPACE in text for text in texts):
            return [self._encode_marks(text) for text in texts]
        return self.model.encode(texts, num_threads=self.threads)

    def _encode_marks(self, text: str) -> list[int]:
        mark = [self.model.piece_to_id(f"<0x{b:02X}>") for b in SPACE.encode()]
        first, *rest = self.model.encode(text.split(SPACE), num_threads=1)
        return first + [i for part in rest for i in mark + part]

    def decode(self, ids: Sequence[int]) -> str:
        text = super().decode(ids)
        return text.removeprefix(" ") if self.adds_space else text


class HFTokenizer(Tokenizer):
    """A Hugging Face `tokenizer.json`, through the optional package `tokenizers`.

    Special tokens in a text are encoded as letters. Added tokens that the file does not mark as special still match: the
    library has no switch for those.
    """

    def __init__(self, content: bytes, where: str = "tokenizer.json"):
        try:
            import tokenizers
        except ModuleNotFoundError as error:
            raise UserError(f"{where} is a Hugging Face tokenizer and the package tokenizers is not installed; run: "
                            "pip install 'megatron-scratch[hf]'") from error  # fmt: skip
        try:
            self.model = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # the library raises a bare Exception
            raise UserError(f"{where} is not a tokenizer.json: {' '.join(str(error).split())}; give the file, whole") from error
        self.model.encode_special_tokens = True
        self.model.no_truncation()
        self.model.no_padding()
        self.added = self.model.get_added_tokens_decoder()
        eod_id = _find_eod(self.model.get_vocab(with_added_tokens=True), where)
        super().__init__(content, self._pieces(json.loads(content)), eod_id)

    def _pieces(self, tree: dict[str, Any]) -> list[bytes]:
        vocab = self.model.get_vocab(with_added_tokens=True)
        byte_level = '"ByteLevel"' in json.dumps(tree.get("decoder"))
        pieces, letters = [b""] * (max(vocab.values()) + 1), set(BYTE_LEVEL)
        for piece, i in vocab.items():
            if i in self.added:
                pieces[i] = b"" if self.added[i].special else piece.encode()
            elif byte_level and letters.issuperset(piece):
                pieces[i] = bytes(map(BYTE_LEVEL.__getitem__, piece))
            elif len(piece) == 6 and piece.startswith("<0x"):
                pieces[i] = bytes([int(piece[3:5], 16)])
            else:
                pieces[i] = piece.replace(SPACE, " ").encode()
        return pieces

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self.model.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self.model.decode(list(map(int, ids)), skip_special_tokens=True)


def _byte_level() -> dict[str, int]:
    """GPT-2's letters for bytes (openai/gpt-2 src/encoder.py): printable Latin-1 is itself, the other 68 follow U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + k): b for k, b in enumerate(others)}


BYTE_LEVEL = _byte_level()


def _find_eod(names: dict[str, int], where: str) -> int:
    for piece in EOD_PIECES:
        if piece in names:
            return names[piece]
    raise UserError(f"{where} has no end-of-document token; allowed: one of {', '.join(EOD_PIECES)}; use a tokenizer with one")


def has_tokenizer(folder: str | Path) -> bool:
    """Whether `load_tokenizer` finds one in a folder."""
    return any((Path(folder) / name).is_file() for name in FILES)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a file, or in a folder that holds `tokenizer.model` or `tokenizer.json`."""
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in FILES if (path / name).is_file()]
        if not found:
            raise UserError(f"{path} has no {' or '.join(FILES)}; give the path of a tokenizer file")
        path = found[0]
    if not path.is_file():
        raise UserError(f"tokenizer {path} does not exist; give a .model or .json file, or a folder with {' or '.join(FILES)}")
    return _parsed(_File(path.read_bytes(), path.suffix, str(path)))


@dataclass(frozen=True)
class _File:
    content: bytes
    suffix: str
    where: str = field(compare=False)  # for errors


@lru_cache(maxsize=4)
def _parsed(file: _File) -> Tokenizer:
    """Parsing 128,000 ids takes half a second, and a preparation asks for the same file, and for its copy, several times."""
    if file.suffix != ".json":
        return SentencePieceTokenizer(file.content, file.where)
    return ByteTokenizer() if file.content == ByteTokenizer().content else HFTokenizer(file.content, file.where)
