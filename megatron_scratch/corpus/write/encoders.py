"""Text to ids at speed, behind one interface. `native` is the tokenizer's own library; the others are faster, and used where they
give the same ids on a sample of the corpus at hand.

    gigatoken   Rust, 80 MB a second and core on web text; SentencePiece BPE with bytes, and byte-level BPE with a regex it knows
    tiktoken    Rust, 13 MB a second and core; byte-level BPE with any regex
    native      tokenizers 4, SentencePiece 6 to 19 MB a second and core

No text can inject a control id: the fast encoders are built without any.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from megatron_scratch import registry
from megatron_scratch.data.tokenizer import BYTE_LEVEL, HFTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer
from megatron_scratch.util.errors import UserError

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # what ByteLevel(use_regex=true) splits by


class CannotEncode(Exception):
    """This encoder is not installed, or does not take this tokenizer; the message says why."""


class Encoder(ABC):
    """encode: UTF-8 texts -> (ids of all of them (n,), tokens of each (D,)), without EOD. Errors: `CannotEncode` when built."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    @abstractmethod
    def ids(self, raw: bytes) -> Any:
        """The ids of one text, a list or an array."""

    def encode(self, texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        found = [np.asarray(self.ids(raw), dtype=np.uint32) for raw in texts]
        return np.concatenate([np.empty(0, np.uint32), *found]), np.array([len(x) for x in found], np.int64)


class Native(Encoder):
    """The tokenizer's own library, a batch at a time."""

    def ids(self, raw: bytes) -> Any:
        return self.tokenizer.encode(raw.decode("utf-8"))

    def encode(self, texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        found = self.tokenizer.encode_batch([raw.decode("utf-8") for raw in texts])
        lengths = np.array([len(x) for x in found], np.int64)
        return np.fromiter((i for x in found for i in x), np.uint32, int(lengths.sum())), lengths


class Gigatoken(Encoder):
    """gigatoken's encoders, on the calling thread."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__(tokenizer)
        try:
            from gigatoken import Tokenizer as Giga
        except ImportError as error:
            raise CannotEncode(f"gigatoken is not installed ({error})") from error
        try:
            if isinstance(tokenizer, SentencePieceTokenizer):
                self.ids = Giga.from_sentencepiece(tokenizer.content).backend.encode
            elif isinstance(tokenizer, HFTokenizer):
                tree = json.loads(tokenizer.content)
                tree["added_tokens"] = [told for told in tree.get("added_tokens") or [] if not told["special"]]
                tree["post_processor"] = None
                self.ids = Giga.from_json(json.dumps(tree)).backend.encode
            else:
                raise CannotEncode(f"gigatoken has nothing for a {type(tokenizer).__name__}")
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise CannotEncode(f"gigatoken does not take this tokenizer: {' '.join(str(error).split())[:200]}") from error

    def ids(self, raw: bytes) -> Any:
        raise NotImplementedError


class Tiktoken(Encoder):
    """tiktoken with the merges and the regex of a byte-level `tokenizer.json`; its ranks are put back to the file's ids."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__(tokenizer)
        try:
            import tiktoken
        except ImportError as error:
            raise CannotEncode(f"tiktoken is not installed ({error})") from error
        if not isinstance(tokenizer, HFTokenizer):
            raise CannotEncode("tiktoken takes byte-level BPE, a tokenizer.json, only")
        try:
            ranks, self.id_of, pattern = _byte_level_bpe(json.loads(tokenizer.content))
            self.model = tiktoken.Encoding("corpus", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        except (KeyError, TypeError, ValueError) as error:
            raise CannotEncode(f"tiktoken takes byte-level BPE only: {error!r}") from error

    def ids(self, raw: bytes) -> Any:
        return self.id_of[self.model.encode_ordinary(raw.decode("utf-8"))]


def _byte_level_bpe(tree: dict[str, Any]) -> tuple[dict[bytes, int], np.ndarray, str]:
    """(bytes -> rank, rank -> id, regex) of a tokenizer.json. Errors: KeyError, ValueError where it is none, or does more."""
    model = tree["model"]
    if tree.get("normalizer") or model["type"] != "BPE" or any(not told["special"] for told in tree.get("added_tokens") or []):
        raise ValueError("it normalises, is no BPE, or has added words")
    letters = {piece: i for piece, i in model["vocab"].items() if len(piece) == 1}
    merged = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    pieces = [*sorted(letters, key=letters.__getitem__), *dict.fromkeys("".join(pair) for pair in merged)]
    ranks = {bytes(BYTE_LEVEL[c] for c in piece): rank for rank, piece in enumerate(pieces)}
    if len(ranks) != len(pieces) or len(letters) != len(BYTE_LEVEL):
        raise ValueError("it has not one piece for each byte")
    return ranks, np.array([model["vocab"][piece] for piece in pieces], np.uint32), _pattern(tree["pre_tokenizer"])


def _pattern(step: dict[str, Any]) -> str:
    steps = step["pretokenizers"] if step["type"] == "Sequence" else [step]
    if [s["type"] for s in steps] == ["ByteLevel"] and steps[0].get("use_regex", True) and not steps[0].get("add_prefix_space"):
        return GPT2
    if [s["type"] for s in steps] == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        split = steps[0]
        if split["behavior"] == "Isolated" and not split.get("invert") and not steps[1].get("add_prefix_space"):
            return split["pattern"]["Regex"]
    raise ValueError(f"pre-tokenizer {[s['type'] for s in steps]}")


@lru_cache(maxsize=2)
def load_encoder(tokenizer: str, name: str) -> Encoder:
    """The encoder of that name for the tokenizer in a file. Errors: `UserError` if it cannot be had."""
    try:
        return registry.get("encoder", name)(load_tokenizer(tokenizer))
    except CannotEncode as error:
        raise UserError(f"corpus.encoder={name}: {error}; use corpus.encoder=auto") from error


def choose(tokenizer: str, sample: Iterable[bytes]) -> tuple[str, dict[str, str]]:
    """The first encoder, in the registry's order, that loads and agrees with `native` on every text of the sample; and why others
    were passed over."""
    given, texts = load_tokenizer(tokenizer), list(sample)
    wanted = Native(given).encode(texts)
    passed: dict[str, str] = {}
    for name in registry.names("encoder"):
        try:
            found = registry.get("encoder", name)(given).encode(texts)
        except CannotEncode as error:
            passed[name] = str(error)
            continue
        if all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True)):
            return name, passed
        passed[name] = f"other ids than the tokenizer's own library on a sample of {len(texts)} documents"
    raise AssertionError("native agrees with itself")
