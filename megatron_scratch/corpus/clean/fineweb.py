"""FineWeb's own heuristics (Penedo et al., 2024, arXiv 2406.17557, section 3.6), as datatrove computes them."""

from __future__ import annotations

from megatron_scratch.config.cleaners import FineWebSettings, check_settings
from megatron_scratch.corpus.clean.base import Drop
from megatron_scratch.corpus.clean.gopher import Test, above, below, duplicates, judged
from megatron_scratch.corpus.clean.words import MOST, TERMINAL, words


class FineWeb:
    """Texts whose lines are short, end without a full stop, or repeat."""

    def __init__(self, settings: FineWebSettings):
        check_settings("fineweb", settings)
        self.s = settings
        self.ends = TERMINAL if settings.stop_chars is None else tuple(settings.stop_chars)

    def __call__(self, text: str) -> str | Drop:
        return judged("fineweb", text, self._tests(text[:MOST]))

    def _tests(self, text: str) -> Test:
        s, lines = self.s, [line for line in text.split("\n") if line and not line.isspace()]
        yield not lines, "no lines"
        share = sum(line.endswith(self.ends) for line in lines) / len(lines)
        enough = s.line_punct_exclude_zero and not share
        yield below(share, s.line_punct_thr) and not enough, f"fewer than {s.line_punct_thr} of lines end in punctuation"
        share = sum(len(line) <= s.short_line_length for line in lines) / len(lines)
        yield above(share, s.short_line_thr), f"more than {s.short_line_thr} of lines have up to {s.short_line_length} characters"
        share = duplicates(lines)[1] / (len(text) - text.count("\n"))
        yield above(share, s.char_duplicates_ratio), f"more than {s.char_duplicates_ratio} of characters are in repeated lines"
        yield above(text.count("\n") / len(words(text)), s.new_line_ratio), f"more than {s.new_line_ratio} line ends per word"
