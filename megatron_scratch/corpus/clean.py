"""Documents made uniform, and the empty and the repeated ones dropped."""

from __future__ import annotations

import hashlib

from megatron_scratch.corpus.sources import Document, Dropped

DIGEST = 16  # bytes of blake2b per text: two of 10^9 different texts collide with probability 10^-21


def clean_text(text: str) -> str:
    """Line ends as \\n, no byte order mark. Unicode is left as it is: a normal form would lose what the text said."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def text_digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8"), digest_size=DIGEST).digest()


class Cleaner:
    """Keeps or drops documents one at a time; remembers 16 bytes of each that it kept, to drop exact copies."""

    def __init__(self, min_chars: int, dedup: bool, dropped: Dropped):
        self.min_chars, self.dedup, self.dropped = min_chars, dedup, dropped
        self.seen: set[bytes] = set()

    def __call__(self, document: Document) -> tuple[str, bytes] | None:
        """(clean text, its digest), or None if the document goes."""
        text = clean_text(document.text)
        place = f"{document.source}@{document.offset}"
        if not text.strip():
            return self.dropped.add("empty", place)
        if len(text) < self.min_chars:
            return self.dropped.add(f"shorter than {self.min_chars} characters", place)
        digest = text_digest(text)
        if self.dedup:
            if digest in self.seen:
                return self.dropped.add("exact copy", place)
            self.seen.add(digest)
        return text, digest
