"""Text to ids at speed, behind one interface. `native` is the tokenizer's own library; the others are faster, and used where they
give the same ids on a sample of the corpus at hand.

    gigatoken   Rust, 80 MB a second and core on web text; SentencePiece BPE with bytes, and byte-level BPE with a regex it knows
    tiktoken    Rust, 13 MB a second and core; byte-level BPE with any regex
    native      tokenizers 4, SentencePiece 6 to 19 MB a second and core

Each works on the calling thread: the workers of a preparation are the parallelism. No text can inject a control id: what a fast
encoder is known to read otherwise than the tokenizer's library goes to that library, document by document.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from megatron_scratch import registry
from megatron_scratch.data.tokenizer import BYTE_LEVEL, SPACE, HFTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer
from megatron_scratch.util.errors import UserError

HEAD = 512  # bytes of each document of the sample
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # what ByteLevel(use_regex=true) splits by


RENEW = 1 << 27  # bytes of text after which gigatoken starts anew: it keeps every word that it ever saw, at about 100 bytes each


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
    """The tokenizer's own library, a text at a time: more of them at once would wake the threads of both libraries."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__(tokenizer)
        if isinstance(tokenizer, SentencePieceTokenizer):
            tokenizer.threads = 1

    def ids(self, raw: bytes) -> Any:
        return self.tokenizer.encode(raw.decode("utf-8"))


class Gigatoken(Encoder):
    """gigatoken's encoders. It knows a SentencePiece model's control pieces in a text, and reads U+2581 as a space; and the added
    words of a tokenizer.json have rules about what stands beside them: a text that holds any of these is left to `Native`."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__(tokenizer)
        try:
            from gigatoken import Tokenizer as Giga
        except ImportError as error:
            raise CannotEncode(f"gigatoken is not installed ({error})") from error
        try:
            if isinstance(tokenizer, SentencePieceTokenizer):
                self.make: Callable[[], Any] = lambda: Giga.from_sentencepiece(tokenizer.content).backend
                names = [SPACE, *_not_text(tokenizer)]
            elif isinstance(tokenizer, HFTokenizer):
                tree, names = _without_specials(tokenizer.content)
                told = json.dumps(tree)
                self.make = lambda: Giga.from_json(told).backend
            else:
                raise CannotEncode(f"gigatoken has nothing for a {type(tokenizer).__name__}")
            self.model, self.seen = self.make(), 0
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise CannotEncode(f"gigatoken does not take this tokenizer: {' '.join(str(error).split())[:200]}") from error
        self.native = Native(tokenizer)
        self.special = re.compile(b"|".join(re.escape(name.encode()) for name in names)) if names else None

    def ids(self, raw: bytes) -> Any:
        if self.special and self.special.search(raw):
            return self.native.ids(raw)
        self.seen += len(raw)
        if self.seen > RENEW:
            self.model, self.seen = self.make(), len(raw)
        return self.model.encode(raw)


def _not_text(tokenizer: SentencePieceTokenizer) -> list[str]:
    """The pieces of a model that stand for no text: control, unknown."""
    model = tokenizer.model
    numbers = range(tokenizer.vocab_size)
    return [model.id_to_piece(i) for i in numbers if model.is_control(i) or model.is_unknown(i) or model.is_unused(i)]


def _without_specials(content: bytes) -> tuple[dict[str, Any], list[str]]:
    """(a tokenizer.json whose special tokens are text and whose template adds none, its other added words)."""
    tree = json.loads(content)
    tree["added_tokens"] = [told for told in tree.get("added_tokens") or [] if not told["special"]]
    tree["post_processor"] = None
    return tree, [told["content"] for told in tree["added_tokens"]]


class Tiktoken(Encoder):
    """tiktoken with the merges and the regex of a byte-level `tokenizer.json`; its ranks are put back to the file's ids.

    Its regexes run on a stack of their own, which about a million spaces in a row overflow: such a text is left to `Native`.
    """

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
        self.native = Native(tokenizer)

    def ids(self, raw: bytes) -> Any:
        try:
            return self.id_of[self.model.encode_ordinary(raw.decode("utf-8"))]
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # what a Rust library raises; it is no Exception, and has no public name
                raise
            return self.native.ids(raw)


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
def _built(tokenizer: Tokenizer, name: str) -> Encoder:
    return registry.get("encoder", name)(tokenizer)


def load_encoder(tokenizer: str, name: str) -> Encoder:
    """The encoder of that name for the tokenizer in a file. Errors: `UserError` if it cannot be had."""
    try:
        return _built(load_tokenizer(tokenizer), name)
    except CannotEncode as error:
        raise UserError(f"corpus.encoder={name}: {error}; use corpus.encoder=auto") from error


def choose(tokenizer: str, sample: Iterable[bytes], wanted: str = "auto") -> tuple[str, dict[str, str]]:
    """The first encoder, in the registry's order, that loads and agrees with `native` on every text of the sample and on `probes`;
    and why others were passed over. Errors: `UserError` if `wanted` names one, and it does not."""
    given = load_tokenizer(tokenizer)
    heads = (raw[:HEAD].decode("utf-8", "ignore").encode() for raw in sample)  # many beginnings show more than a few whole texts
    texts = [*heads, *(text.encode() for text in probes(given))]
    right = Native(given).encode(texts)
    passed: dict[str, str] = {}
    for name in registry.names("encoder") if wanted == "auto" else [wanted]:
        try:
            found = _built(given, name).encode(texts)
        except CannotEncode as error:
            passed[name] = str(error)
            continue
        other = _differ(found, right)
        if not other:
            return name, passed
        passed[name] = f"other ids than the tokenizer's own library for {other} of {len(texts)} texts of a sample"
    assert wanted != "auto", "native agrees with itself"
    raise UserError(f"corpus.encoder={wanted}: {passed[wanted]}; use corpus.encoder=auto")


def _differ(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> int:
    """How many texts have other ids in one than in the other."""
    cuts = [np.split(ids, np.cumsum(lengths)[:-1]) for ids, lengths in (a, b)]
    return sum(not np.array_equal(x, y) for x, y in zip(*cuts, strict=True))


def probes(tokenizer: Tokenizer) -> list[str]:
    """Texts that encoders are apt to read differently: the names of the tokenizer's control ids, alone and inside a line; spaces
    of all kinds and lengths; digits, contractions, marks, other scripts."""
    names = _not_text(tokenizer) if isinstance(tokenizer, SentencePieceTokenizer) else []
    if isinstance(tokenizer, HFTokenizer):
        names = [told.content for told in tokenizer.added.values()]
    runs = [f"{lead}{space * n}{end}" for space in (" ", "\n", "\t", "\u00a0", SPACE) for n in (1, 2, 3, 17)
            for lead, end in (("", ""), ("a", "b"))]  # fmt: skip
    return [*HOSTILE, *runs, *names, *(f"of {name}s, {name} {name}\n{name}" for name in names)]


HOSTILE = (
    "", "<|endoftext|>", "</s><s><unk><0x41><|begin_of_text|>", "I'll can't WE'RE 'S \u017f's '\u017f",
    "1 12 123 1234 12345 1,234.5", "\u0661\u0662\u0663\u0664 \u00b2\u00bd\u2167 \U0001d7ce\U0001d7cf",
    "\u0130\u0131\u212a \u1e9e \ufb01 \uff21\uff11", "e\u0301 \u00e9 a\u0300\u0301\u0302",
    "\u4e2d\u6587\u3002\u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4 \u0e44\u0e17\u0e22",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u05e2\u05d1 \u0939\u093f\u0928",
    "\U0001f600\U0001f468\u200d\U0001f469 \U0001f1e9\U0001f1ea \ufe0f",
    "\ufeffbom \u200b\u2060 \x00\x07\x1b \ufffd \U0010ffff \ue000",
    "a\r\nb\rc\x0bd\x0ce\x85f\u2028g\u2029h\u3000i", "\r\n\r\n  \n \t\n",
    "x = {'a': [1,2]}  # c\n\tif (!y) {\n\t\treturn;\n\t}\n", "----====####....!!!!", "a" * 40,
)  # fmt: skip
