"""Words, lines and sentences, as the heuristics count them.

FineWeb took the published thresholds for words as spaCy's rules for English cut them: a run of letters is a word, and so is a mark
of punctuation. One regular expression does nearly the same, faster; docs/cleaning.md says how many decisions differ. A script
without spaces (Chinese, Japanese, Thai) is one word from mark to mark.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache, lru_cache

MOST = 1 << 22  # characters of a document that are judged: memory is up to 100 times that, and Gopher's longest has 600,000


@cache
def _word() -> re.Pattern[str]:
    """The rules of spaCy for English that matter for counts. No part can fail late, so time is linear in any text."""
    vowels = "".join(chr(c) for c in range(0x300, 0x10000) if unicodedata.category(chr(c)) in ("Mn", "Mc"))
    w = rf"[\w{vowels}]+"  # \w lacks the vowel signs of Arabic, Hebrew, Thai and the scripts of India
    ending = r"['\u2019](?:s|t|m|ll|re|ve|d)\b"  # don|'t, it|'s
    # What holds a word together: a.b a@b f(x)->y 1,000 10:30; not a-b a/b a=b a,b, and no ellipsis.
    inner = rf"(?!{ending}|\.\.)(?:[^\w\s]{{2,8}}|[^\w\s,:<>=/~\u2013\u2014-]|[,:<>=/](?=\d))"
    before = r"(?:(?<!\S)[-/.\\@|+]{1,3})?"  # --option, /usr, .config
    return re.compile(rf"{before}{w}(?:://\S+|(?:{inner}{w})*)|{ending}|\.\.+|[-~^|/\\+]+|[^\w\s]")


@lru_cache(maxsize=1)
def words(text: str) -> list[str]:
    """The words of a text in order. Three cleaners ask for those of the same text, one after the other."""
    return _word().findall(text)


def _ranges(told: str) -> str:
    ends = [[int(x, 16) for x in piece.split("-")] for piece in told.split()]
    return "".join(chr(c) for pair in ends for c in range(pair[0], pair[-1] + 1))


# Unicode's Sentence_Terminal (PropList.txt) and three Khmer signs, as in datatrove's TERMINAL_PUNCTUATION
TERMINAL = tuple(_ranges("""21 2e 3f 589 61d-61f 6d4 700-702 7f9 837 839 83d-83e 964-965 104a-104b 1362 1367-1368 166e 1735-1736
    17d4-17d6 17d9-17da 1803 1809 1944-1945 1aa8-1aab 1b5a-1b5b 1b5e-1b5f 1b7d-1b7e 1c3b-1c3c 1c7e-1c7f 203c-203d 2047-2049 2e2e
    2e3c 2e53-2e54 3002 a4ff a60e-a60f a6f3 a6f7 a876-a877 a8ce-a8cf a92f a9c8-a9c9 aa5d-aa5f aaf0-aaf1 abeb fe52 fe56-fe57 ff01
    ff0e ff1f ff61 10a56-10a57 10f55-10f59 10f86-10f89 11047-11048 110be-110c1 11141-11143 111c5-111c6 111cd 111de-111df
    11238-11239 1123b-1123c 112a9 1144b-1144c 115c2-115c3 115c9-115d7 11641-11642 1173c-1173e 11944 11946 11a42-11a43 11a9b-11a9c
    11c41-11c42 11ef7-11ef8 11f43-11f44 16a6e-16a6f 16af5 16b37-16b38 16b44 16e98 1bc9f 1da88"""))  # fmt: skip

# A run of . ! ? at the end of a word, quotes and brackets after it; a full stop of a script that puts no space behind it.
# The first look back keeps a run of a million dots from being tried at each of them.
_END = re.compile(r"(?<![.!?])[.!?]+[\"'\u2019\u201d\u00bb)\]]*(?=\s|\Z)|[\u3002\uff01\uff1f\uff61\u0964\u06d4\u061f]+")


def sentences(text: str) -> int:
    """How many sentences; what follows the last full stop is one, too."""
    count, last = 0, 0
    for found in _END.finditer(text):
        count, last = count + 1, found.end()
    return count + bool(text[last:].strip())
