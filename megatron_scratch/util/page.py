"""Pieces of self-contained HTML pages: no network, light and dark, as wide as the window. Their numbers lie in them as JSON, too.

Every text that is not ours goes through `escape`: one that holds markup is shown, not obeyed. A page may load nothing at all; what
script it has is named by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_scratch.util.files import atomic_write
from megatron_scratch.util.page_style import STYLE

DATA = re.compile(r'<script type="application/json" id="report">(.*?)</script>', re.DOTALL)
SEAL = re.compile(rb"<!-- sha256 of all before: ([0-9a-f]{64}) -->\n\Z")


def write_page(path: Path, page: str) -> None:
    """The page with its checksum at the end."""
    raw = page.encode("utf-8", "replace")
    with atomic_write(path) as f:
        f.write(raw + f"<!-- sha256 of all before: {hashlib.sha256(raw).hexdigest()} -->\n".encode())


def read_page(path: Path) -> dict[str, Any] | None:
    """The numbers of a page; None where there is no page of ours."""
    try:
        found = DATA.search(path.read_text("utf-8"))
        return json.loads(found[1]) if found else None
    except (OSError, ValueError):
        return None


def whole(path: Path) -> bool:
    """Whether a page is as it was written."""
    raw = path.read_bytes()
    found = SEAL.search(raw)
    return bool(found) and hashlib.sha256(raw[: found.start()]).hexdigest().encode() == found[1]


def document(title: str, body: str, data: Any, style: str = "", scripts: Sequence[str] = ()) -> str:
    """A whole page.

    Args:
        title, style, scripts: as they are: the title is escaped already.
        data: what `read_page` gives back; a script finds it under `#report`. It may hold no NaN: JavaScript could not read it.
    """
    held = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; style-src 'unsafe-inline'; script-src "
    none = "'none'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
        'initial-scale=1"><meta name="color-scheme" content="light dark">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}{hashes or none}">'
        f"<title>{title}</title>\n<style>{STYLE}{style}</style></head><body><main>\n{body}</main>\n"
        f'<script type="application/json" id="report">{held}</script>'
        + "".join(f"\n<script>{script}</script>" for script in scripts)
        + "</body></html>\n"
    )


# words and numbers


def escape(text: Any) -> str:
    return html.escape(str(text), quote=True)


def count(n: float) -> str:
    """12 345 with thin spaces."""
    return f"{n:,.0f}".replace(",", "&#8239;")


def short(n: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size * 0.9995:
            return f"{n / size:.3g}&#8239;{unit}" if n / size < 999.5 else f"{n / size:.0f}&#8239;{unit}"
    return f"{n:.0f}"


def large(n: float) -> str:
    return count(n) if n < 1e6 else short(n)


def in_bytes(n: float | None) -> str:
    return "–" if n is None else f"{short(n)}B" if n >= 999.5 else f"{n:.0f}&#8239;B"


def duration(s: float) -> str:
    if s >= 3600:
        return f"{int(s // 3600)}&#8239;h {int(s % 3600 // 60)}&#8239;min"
    return f"{int(s // 60)}&#8239;min {s % 60:.0f}&#8239;s" if s >= 60 else f"{s:.3g}&#8239;s" if s >= 0.1 else f"{s:.2f}&#8239;s"


def share(part: float, of: float) -> str:
    percent = 100 * part / of if of else 0.0
    return f"{percent:.1f}&#8239;%" if percent >= 0.1 or not part else "&lt;&#8239;0.1&#8239;%"


def told(value: Any) -> str:
    """Any value of JSON."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return count(value)
    return escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def flat(tree: dict[str, Any], prefix: str = "", joint: str = ".") -> Iterable[tuple[str, Any]]:
    """The leaves of a tree by their whole names."""
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{name}{joint}", joint)
        else:
            yield f"{prefix}{name}", value


# pieces


def section(title: str, note: str, *body: str) -> str:
    return f"<section><h2>{title}</h2>" + (f"<p class=muted>{note}</p>" if note else "") + "".join(body) + "</section>"


def tiles(cells: Iterable[tuple[str, str, str]]) -> str:
    """(name, value, note) each."""
    drawn = (f"<span class=muted>{name}</span><b>{value}</b><span class=muted>{note}</span>" for name, value, note in cells)
    return "<div class=tiles>" + "".join(f"<div class=tile>{cell}</div>" for cell in drawn) + "</div>"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], text: int = 1) -> str:
    """The first `text` columns are words, the others numbers."""
    kinds = ["" if i < text else " class=n" for i in range(len(heads))]

    def line(cell: str, row: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{cell}{kind}>{told}</{cell}>" for kind, told in zip(kinds, row, strict=True)) + "</tr>"

    body = "".join(line("td", row) for row in rows)
    return f"<div class=scroll><table><thead>{line('th', heads)}</thead><tbody>{body}</tbody></table></div>"


def bars(rows: Sequence[tuple[str, float, str]], kind: str = "") -> str:
    """Lines of (name, size, what it says), drawn on one scale."""
    most = max((size for _, size, _ in rows), default=0) or 1
    lines = (
        f"<span class=name>{name}</span>{track((kind, size / most))}<span class=value>{said}</span>" for name, size, said in rows
    )
    return "<div class=bars>" + "".join(f"<div class=row>{line}</div>" for line in lines) + "</div>"


def track(*parts: tuple[str, float]) -> str:
    """A bar of (class, share of its width)."""
    return "<span class=track>" + "".join(f'<i class="{k}" style="width:{100 * part:.2f}%"></i>' for k, part in parts) + "</span>"


def folded(title: str, *body: str) -> str:
    """A section that opens at a click."""
    return f"<section><details><summary><h2>{title}</h2></summary>{''.join(body)}</details></section>"
