"""C4's heuristics (Raffel et al., 2019, arXiv 1910.10683, section 2.2), in the order of its code: first lines go, then documents.

Words here are what spaces separate, as in that code: a web address or a lump of base64 counts as one. Its list of bad words is not
part of this: it comes by download.
"""

from __future__ import annotations

import re

from megatron_scratch.config.cleaners import C4Settings, check_settings
from megatron_scratch.corpus.clean.base import Drop
from megatron_scratch.corpus.clean.words import sentences

CITATION = re.compile(r"\[[0-9]*\]|\[edit\]|\[citation needed\]")
END = (".", "?", "!", '"', "'")
POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")


class C4:
    """Keeps the lines of prose, and the documents that have enough of them."""

    def __init__(self, settings: C4Settings):
        check_settings("c4", settings)
        self.s = settings

    def __call__(self, text: str) -> str | Drop:
        kept: list[str] = []
        for line in text.splitlines():
            if not (line := self._prose(line.strip())):
                continue
            lowered = line.lower()
            if self.s.filter_lorem_ipsum and "lorem ipsum" in lowered:
                return Drop("c4: lorem ipsum")
            if self.s.filter_javascript and "javascript" in lowered:
                continue
            if self.s.filter_curly_bracket and "{" in line:
                return Drop("c4: curly bracket")
            if not (self.s.filter_policy and any(phrase in lowered for phrase in POLICY)):
                kept.append(line)
        least = self.s.min_num_sentences
        if least is not None and sum(map(sentences, kept)) < least:
            return Drop(f"c4: fewer than {least} sentences")
        return "\n".join(kept) if kept else Drop("c4: no line is left")

    def _prose(self, line: str) -> str:
        """The line without citations; empty if it has too long or too few words or ends as no sentence does."""
        if not line:
            return ""
        s, parts = self.s, line.split()
        if s.max_word_length is not None and len(line) > s.max_word_length and max(map(len, parts)) > s.max_word_length:
            return ""
        if s.remove_citations and "[" in line:
            line = CITATION.sub("", line)
            parts = line.split()
        if s.filter_no_terminal_punct and (not line.endswith(END) or line.endswith("...")):
            return ""
        return line if s.min_words_per_line is None or len(parts) >= s.min_words_per_line else ""
