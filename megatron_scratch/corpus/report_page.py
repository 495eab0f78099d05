"""The report as one page: no network, no script, light and dark, as wide as the window. Its numbers lie in it as JSON, too.

Every text that is not ours goes through `_e`: a document that holds markup is shown, not obeyed.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_scratch.corpus.report_style import STYLE
from megatron_scratch.util.files import atomic_write

DATA = re.compile(r'<script type="application/json" id="report">(.*?)</script>', re.DOTALL)
SEAL = re.compile(rb"<!-- sha256 of all before: ([0-9a-f]{64}) -->\n\Z")


def write_report(path: Path, report: dict[str, Any]) -> None:
    """The page with its checksum at the end."""
    raw = page(report).encode("utf-8", "replace")
    with atomic_write(path) as f:
        f.write(raw + f"<!-- sha256 of all before: {hashlib.sha256(raw).hexdigest()} -->\n".encode())


def read_report(path: Path) -> dict[str, Any] | None:
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


def page(report: dict[str, Any]) -> str:
    """`report.collect`'s numbers as HTML."""
    name = _e(Path(report["output"]).name)
    sections = [_tiles(report), _flow(report), _sources(report), _dropped(report), _near(report), _copies(report), _lengths(report),
                _tokenizer(report), _cost(report), _settings(report)]  # fmt: skip
    data = json.dumps(report).replace("<", "\\u003c")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
        f'initial-scale=1"><meta name="color-scheme" content="light dark"><title>{name}: corpus report</title>\n'
        f"<style>{STYLE}</style></head><body><main>\n<header><p class=kicker>Corpus report</p><h1>{name}</h1>"
        f"<p class=muted>data {_e(report['verb'])} · {_e(report['finished'])} · {_seconds(report['total']['seconds'])} · "
        f"megatron_scratch {_e(report['version'])}</p></header>\n"
        + "\n".join(section for section in sections if section)
        + f"\n<footer class=muted>Look inside: <code>megatron-scratch data inspect {_e(report['output'])}</code><br>"
        f"Check every byte: <code>megatron-scratch data verify {_e(report['output'])}</code></footer></main>\n"
        f'<script type="application/json" id="report">{data}</script></body></html>\n'
    )


# words and numbers


def _e(text: Any) -> str:
    return html.escape(str(text), quote=True)


def _n(n: float) -> str:
    """12 345 with thin spaces."""
    return f"{n:,.0f}".replace(",", "&#8239;")


def _short(n: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size * 0.9995:
            return f"{n / size:.3g}&#8239;{unit}" if n / size < 999.5 else f"{n / size:.0f}&#8239;{unit}"
    return f"{n:.0f}"


def _large(n: float) -> str:
    return _n(n) if n < 1e6 else _short(n)


def _bytes(n: float | None) -> str:
    return "–" if n is None else f"{_short(n)}B" if n >= 999.5 else f"{n:.0f}&#8239;B"


def _seconds(s: float) -> str:
    if s >= 3600:
        return f"{int(s // 3600)}&#8239;h {int(s % 3600 // 60)}&#8239;min"
    return f"{int(s // 60)}&#8239;min {s % 60:.0f}&#8239;s" if s >= 60 else f"{s:.3g}&#8239;s" if s >= 0.1 else f"{s:.2f}&#8239;s"


def _share(part: float, of: float) -> str:
    share = 100 * part / of if of else 0.0
    return f"{share:.1f}&#8239;%" if share >= 0.1 or not part else "&lt;&#8239;0.1&#8239;%"


# pieces


def _section(title: str, note: str, *body: str) -> str:
    return f"<section><h2>{title}</h2>" + (f"<p class=muted>{note}</p>" if note else "") + "".join(body) + "</section>"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], text: int = 1) -> str:
    """The first `text` columns are words, the others numbers."""
    kinds = ["" if i < text else " class=n" for i in range(len(heads))]

    def line(cell: str, row: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{cell}{kind}>{told}</{cell}>" for kind, told in zip(kinds, row, strict=True)) + "</tr>"

    body = "".join(line("td", row) for row in rows)
    return f"<div class=scroll><table><thead>{line('th', heads)}</thead><tbody>{body}</tbody></table></div>"


def _bars(rows: Sequence[tuple[str, float, str]], kind: str = "") -> str:
    """Lines of (name, size, what it says), drawn on one scale."""
    most = max((size for _, size, _ in rows), default=0) or 1
    lines = (
        f"<span class=name>{name}</span>{_track((kind, size / most))}<span class=value>{told}</span>" for name, size, told in rows
    )
    return "<div class=bars>" + "".join(f"<div class=row>{line}</div>" for line in lines) + "</div>"


def _track(*parts: tuple[str, float]) -> str:
    """A bar of (class, share of its width)."""
    return "<span class=track>" + "".join(f'<i class="{k}" style="width:{100 * share:.2f}%"></i>' for k, share in parts) + "</span>"


def _text(place: str, head: str) -> str:
    shown = _e(head) if head.strip() else "<i class=muted>nothing</i>"
    return f"<figure><figcaption>{_e(place)}</figcaption><pre>{shown}</pre></figure>"


# sections


def _tiles(r: dict[str, Any]) -> str:
    first, last = r["steps"][0], r["steps"][-1]
    share = _share(last["bytes_out"], first["bytes_out"])
    tiles = [("documents left", _large(last["documents_out"]), f"of {_large(first['documents_in'])} in the input"),
             ("text left", _bytes(last["bytes_out"]), f"{share} of what passed cleaning")]  # fmt: skip
    if r["splits"]:
        sides = [r["splits"][side] for side in ("train", "valid") if side in r["splits"]]
        tokens = sum(side["tokens"] for side in sides)
        tiles += [("tokens", _large(tokens), f"{sum(side['bytes'] for side in sides) / max(1, tokens):.2f} bytes each")]
    cpu = r["total"]["cpu_seconds"]
    tiles.append(("CPU time", _seconds(cpu), f"{first['bytes_out'] / 1e6 / cpu:.3g} MB of text per CPU-second" if cpu else ""))
    cells = (f"<span class=muted>{name}</span><b>{value}</b><span class=muted>{note}</span>" for name, value, note in tiles)
    return "<div class=tiles>" + "".join(f"<div class=tile>{cell}</div>" for cell in cells) + "</div>"


def _flow(r: dict[str, Any]) -> str:
    """One bar a step: what stays, what goes here."""
    whole = max(1, r["steps"][0]["documents_in"])
    lines = []
    for step in r["steps"]:
        gone = step["documents_in"] - step["documents_out"]
        if step["name"] in ("tokenizer", "encode", "write"):
            continue
        cut = (step["bytes_in"] or 0) - step["bytes_out"] if step["name"] == "spans" else 0
        less = f"−{_bytes(cut)}" if cut else "nothing"
        told = f"<b>−{_n(gone)}</b> {_share(gone, step['documents_in'])}" if gone else less
        lines.append(
            f"<div class=row><span class=name>{_e(step['label'])}</span>"
            f"{_track(('', step['documents_out'] / whole), ('gone', gone / whole))}<span class=value>{told}</span></div>"
        )
    note = "Documents that stay, and <span class=key></span> those that each step takes out."
    return _section("What happened to the documents", note, "<div class=bars>" + "".join(lines) + "</div>")


def _sources(r: dict[str, Any]) -> str:
    rows = [[f"<code>{_e(s['input'])}</code>", _n(s["files"]), _n(s["documents"]), _bytes(s["bytes"]), _n(s["documents_left"]),
             _bytes(s["bytes_left"]), _share(s["bytes_left"], s["bytes"])] for s in r["sources"]]  # fmt: skip
    heads = ["source", "files", "documents", "text", "documents left", "text left", "share left"]
    return _section("What went in", "Per entry of corpus.input, after reading and cleaning.", _table(heads, rows))


def _dropped(r: dict[str, Any]) -> str:
    most = max((d["count"] for d in r["dropped"]), default=0) or 1
    seen = max(1, r["steps"][0]["documents_in"])
    items = []
    for d in r["dropped"]:
        texts = "".join(_text(place, head) for place, head in d["samples"])
        items.append(
            f"<details><summary><span class=name>{_e(d['reason'])}<small>{_e(d['step'])}</small></span>"
            f"{_track(('gone', d['count'] / most))}<span class=value><b>{_n(d['count'])}</b> {_share(d['count'], seen)}</span>"
            f"</summary>{texts}</details>"
        )
    note = "Open a line for texts that went for this reason. All of them are in <code>removed.jsonl</code>."
    return _section("What was dropped, and why", note if items else "Nothing.", f'<div class="bars drops">{"".join(items)}</div>')


def _near(r: dict[str, Any]) -> str:
    near = r["near"]
    if not near:
        return ""
    pairs = "".join(
        f"<details><summary>Similarity {p['similarity']:.3f}</summary><div class=pair><div><h4>went</h4>{_text(**p['gone'])}</div>"
        f"<div><h4>stayed</h4>{_text(**p['kept'])}</div></div></details>" for p in near["least"])  # fmt: skip
    note = (f"Jaccard similarity of each removed document to the one that stayed; threshold {near['threshold']:g}."
            if near["threshold"] else "Jaccard similarity of each removed document to the one that stayed. No threshold: a shared "
            "band of hashes was enough.")  # fmt: skip
    least = f"<h3>The least similar pairs</h3>{pairs}" if pairs else ""
    return _section("Near copies", note if near["bins"] else "None found.", _histogram(near["bins"]), least)


def _histogram(bins: Sequence[Sequence[float]]) -> str:
    """Columns over similarity, as SVG: [from, to, documents]."""
    if not bins:
        return ""
    most, count, low = max(b[2] for b in bins) or 1, len(bins), bins[0][0]
    columns = "".join(
        f'<rect x="{(100 * i + 8) / count:.2f}" y="{100 - 100 * n / most:.2f}" width="{84 / count:.2f}" '
        f'height="{100 * n / most:.2f}"><title>{a:.2f} to {b:.2f}: {n:.0f}</title></rect>' for i, (a, b, n) in enumerate(bins)
    )  # fmt: skip
    ticks = "".join(f"<span>{low + (1 - low) * k / 4:.2f}</span>" for k in range(5))
    return (f'<div class=chart><span class=top>{_n(most)}</span><svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" '
            f'aria-label="near copies by similarity">{columns}</svg><div class=axis>{ticks}</div></div>')  # fmt: skip


def _copies(r: dict[str, Any]) -> str:
    copies = r["copies"]
    if not copies or not copies["bins"]:
        return ""
    rows = [(_range(a, b), n, _n(n)) for a, b, n in copies["bins"]]
    largest = "".join(f"<details><summary>{_n(c['documents'])} documents</summary>{_text(c['place'], c['head'])}</details>"
                      for c in copies["largest"])  # fmt: skip
    return _section("Groups of copies", "Documents in a group, the one that stays among them, and how many such groups there are.",
                    _bars(rows), f"<h3>The largest</h3>{largest}")  # fmt: skip


def _range(a: int, b: int) -> str:
    return _n(a) if a == b else f"{_n(a)} – {_n(b)}"


def _lengths(r: dict[str, Any]) -> str:
    blocks = []
    for name, told in r["lengths"].items():
        facts = f"; median {_n(told['median'])}, mean {_n(told['mean'])}, longest {_n(told['longest'])}" if "median" in told else ""
        rows = [(_range(a, b), n, _n(n)) for a, b, n in told["bins"]]
        blocks.append(f"<div><h3>{_e(name)}</h3><p class=muted>{_n(told['documents'])} documents{facts}</p>{_bars(rows)}</div>")
    return _section("Length of documents", "", "<div class=pair>" + "".join(blocks) + "</div>")


def _tokenizer(r: dict[str, Any]) -> str:
    told = dict(r["tokenizer"] or {})
    if not told:
        return ""
    judged = dict(told.pop("report", None) or {})
    sides = {name: judged.pop(name) for name in ("train", "valid") if isinstance(judged.get(name), dict)}
    longest = judged.pop("longest", [])
    rows = [[_e(name).replace("_", " "), _value(value)] for name, value in _flat({**told, **judged}) if value not in ({}, [], None)]
    columns = list(next(iter(sides.values()), {}))
    table = _table(["sample of", *(_e(name).replace("_", " ") for name in columns)],
                   [[name, *(_value(side.get(column)) for column in columns)] for name, side in sides.items()])  # fmt: skip
    chips = "".join(f"<code>{_e(token)}</code> " for token in longest)
    return _section("Tokenizer", "", _table(["what", "value"], rows, text=2), table if sides else "",
                    f"<h3>The longest tokens</h3><p class=chips>{chips}</p>" if longest else "")  # fmt: skip


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}, ")
        else:
            yield prefix + name, value


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return _n(value)
    return _e(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _cost(r: dict[str, Any]) -> str:
    rows = []
    for s in r["steps"]:
        size = s["bytes_in"] or s["bytes_out"]
        rate = f"{size / 1e6 / s['cpu_seconds']:.3g}" if s["cpu_seconds"] >= 0.01 else "–"
        rows.append([_e(s["label"]), _n(s["documents_in"]), _bytes(s["bytes_in"]), _n(s["documents_out"]), _bytes(s["bytes_out"]),
                     _n(s["tasks"]), _seconds(s["seconds"]), _seconds(s["cpu_seconds"]), rate])  # fmt: skip
    heads = ["step", "documents in", "in", "documents out", "out", "tasks", "time", "CPU time", "MB per CPU-s"]
    bars = _bars([(_e(s["label"]), s["cpu_seconds"], _seconds(s["cpu_seconds"])) for s in r["steps"]])
    note = "CPU time of each step. What an earlier, interrupted start has finished counts; what it lost does not."
    return _section("What it cost", note, bars, _table(heads, rows))


def _settings(r: dict[str, Any]) -> str:
    rows = [[f"<code>corpus.{_e(name)}</code>", f"<code>{_e(json.dumps(value, ensure_ascii=False))}</code>"]
            for name, value in _flat(r["config"] or {}) if value not in (None, {}, [])]  # fmt: skip
    rows = [[name.replace(", ", "."), value] for name, value in rows]
    return f"<section><details><summary><h2>Settings</h2></summary>{_table(['key', 'value'], rows, text=2)}</details></section>"
