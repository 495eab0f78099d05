"""E-mail and public IP addresses are replaced, as FineWeb does (datatrove, formatters/pii.py).

Each document begins with the first replacement anew, so what comes out does not depend on the documents before it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv6Address
from itertools import cycle

from megatron_scratch.config.cleaners import PIISettings, check_settings
from megatron_scratch.util.errors import UserError

LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"  # RFC 1035
DOMAIN = re.compile(rf"@(?:(?:{LABEL}\.)+{LABEL}|\[[0-9]{{1,3}}(?:\.[0-9]{{1,3}}){{3}}\])")
LOCAL = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789.!#$%&'*+/=?^_`{|}~-"  # RFC 5322, dot-atom
IPV4 = re.compile(r"[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}(?!\w|\.\w)")
# 2000::/3 is all that is given out (IANA); the rest is C++'s a::b more often than an address
IPV6 = re.compile(r"[23][0-9A-Fa-f]{3}:[0-9A-Fa-f:.]{1,45}")
Span = tuple[int, int]


class PII:
    """A text without them. Names, telephone numbers and street addresses stay: no published recipe masks those."""

    def __init__(self, settings: PIISettings):
        check_settings("pii", settings)
        tables: list[tuple[str, Callable[[str], Iterator[Span]]]] = []
        tables += [("email_replacement", emails)] if settings.remove_emails else []
        tables += [("ipv6_replacement", ipv6), ("ip_replacement", ipv4)] if settings.remove_ips else []
        if not tables:
            raise UserError("corpus.options.pii has remove_emails=false and remove_ips=false, so it does nothing; leave pii out of "
                            "corpus.clean")  # fmt: skip
        for name, _ in tables:
            if not getattr(settings, name):
                raise UserError(f"corpus.options.pii.{name}=[] is empty; give at least one, '' to delete addresses")
        self.steps = [(find, getattr(settings, name)) for name, find in tables]

    def __call__(self, text: str) -> str:
        for find, replacements in self.steps:
            text = replaced(text, find(text), replacements)
        return text


def replaced(text: str, spans: Iterator[Span], replacements: list[str]) -> str:
    """The text with each span put out for the next replacement."""
    pieces, end, given = [], 0, cycle(replacements)
    for begin, stop in spans:
        pieces += [text[end:begin], next(given)]
        end = stop
    return "".join([*pieces, text[end:]]) if pieces else text


def emails(text: str) -> Iterator[Span]:
    """From each @ with a domain behind it to the left, as far as a name can go; never beyond the one before, so time is linear."""
    end = 0
    for found in DOMAIN.finditer(text):
        before = text[end : found.start()]
        name = before[len(before.rstrip(LOCAL)) :].rpartition("..")[2].lstrip(".!#$%&'*+/=?^`{|}~-")
        if name and name[-1] != ".":
            yield found.start() - len(name), (end := found.end())


def ipv4(text: str) -> Iterator[Span]:
    """Public ones; four numbers inside a longer row of numbers or behind a letter (v1.2.3.4) are no address."""
    for found in IPV4.finditer(text):
        begin = found.start()
        if begin and (text[begin - 1].isalnum() or text[begin - 1] in "._"):
            continue
        try:
            public = IPv4Address(found[0]).is_global
        except ValueError:  # a number above 255, or 01
            continue
        if public:
            yield found.span()


def ipv6(text: str) -> Iterator[Span]:
    """Public ones."""
    for found in IPV6.finditer(text):
        begin, shown = found.start(), found[0].rstrip(".")
        shown = shown[:-1] if shown.endswith(":") and not shown.endswith("::") else shown
        end = begin + len(shown)
        if begin and (text[begin - 1].isalnum() or text[begin - 1] in ":._") or text[end : end + 1].isalnum():
            continue
        try:
            public = IPv6Address(shown).is_global
        except ValueError:
            continue
        if public:
            yield begin, end
