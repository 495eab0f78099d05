"""Settings of the cleaners that `corpus.clean` names: `corpus.options.NAME.SETTING=...`. Their defaults are the published ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional


@dataclass
class UnicodeSettings:
    form: str = "NFC"  # NFC composes and loses nothing that a reader sees; NFKC also folds widths, ligatures and superscripts


@dataclass
class LengthSettings:
    min_chars: int = 1
    max_chars: Optional[int] = None
