"""The report as one page, of `util/page`'s pieces: no script."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_scratch.corpus.report_style import STYLE
from megatron_scratch.util import page as ui
from megatron_scratch.util.page import count, duration, escape, in_bytes, large, share, whole
from megatron_scratch.util.page import read_page as read_report

__all__ = ["page", "read_report", "whole", "write_report"]
MIDDLE = ("median", "mean", "longest")


def write_report(path: Path, report: dict[str, Any]) -> None:
    """The page with its checksum at the end."""
    ui.write_page(path, page(report))


def page(report: dict[str, Any]) -> str:
    """`report.collect`'s numbers as HTML."""
    name = escape(Path(report["output"]).name)
    sections = [_tiles(report), _flow(report), _sources(report), _dropped(report), _near(report), _copies(report), _lengths(report),
                _tokenizer(report), _cost(report), _settings(report)]  # fmt: skip
    body = (
        f"<header><p class=kicker>Corpus report</p><h1>{name}</h1>"
        f"<p class=muted>data {escape(report['verb'])} · {escape(report['finished'])} · {duration(report['total']['seconds'])} · "
        f"megatron_scratch {escape(report['version'])}</p></header>\n"
        + "\n".join(section for section in sections if section)
        + f"\n<footer class=muted>Look inside: <code>megatron-scratch data inspect {escape(report['output'])}</code><br>"
        f"Check every byte: <code>megatron-scratch data verify {escape(report['output'])}</code></footer>"
    )
    return ui.document(f"{name}: corpus report", body, report, STYLE)


def _text(place: str, head: str) -> str:
    shown = escape(head) if head.strip() else "<i class=muted>nothing</i>"
    return f"<figure><figcaption>{escape(place)}</figcaption><pre>{shown}</pre></figure>"


# sections


def _tiles(r: dict[str, Any]) -> str:
    first, last = r["steps"][0], r["steps"][-1]
    part = share(last["bytes_out"], first["bytes_out"])
    cells = [("documents left", large(last["documents_out"]), f"of {large(first['documents_in'])} in the input"),
             ("text left", in_bytes(last["bytes_out"]), f"{part} of what passed cleaning")]  # fmt: skip
    if r["splits"]:
        sides = [r["splits"][side] for side in ("train", "valid") if side in r["splits"]]
        tokens = sum(side["tokens"] for side in sides)
        cells += [("tokens", large(tokens), f"{sum(side['bytes'] for side in sides) / max(1, tokens):.2f} bytes each")]
    cpu = r["total"]["cpu_seconds"]
    cells.append(("CPU time", duration(cpu), f"{first['bytes_out'] / 1e6 / cpu:.3g} MB of text per CPU-second" if cpu else ""))
    return ui.tiles(cells)


def _flow(r: dict[str, Any]) -> str:
    """One bar a step: what stays, what goes here."""
    whole = max(1, r["steps"][0]["documents_in"])
    lines = []
    for step in r["steps"]:
        gone = step["documents_in"] - step["documents_out"]
        if step["name"] in ("tokenizer", "encode", "write"):
            continue
        cut = (step["bytes_in"] or 0) - step["bytes_out"] if step["name"] == "spans" else 0
        less = f"−{in_bytes(cut)}" if cut else "nothing"
        told = f"<b>−{count(gone)}</b> {share(gone, step['documents_in'])}" if gone else less
        lines.append(
            f"<div class=row><span class=name>{escape(step['label'])}</span>"
            f"{ui.track(('', step['documents_out'] / whole), ('gone', gone / whole))}<span class=value>{told}</span></div>"
        )
    note = "Documents that stay, and <span class=key></span> those that each step takes out."
    return ui.section("What happened to the documents", note, "<div class=bars>" + "".join(lines) + "</div>")


def _sources(r: dict[str, Any]) -> str:
    rows = [[f"<code>{escape(s['input'])}</code>", count(s["files"]), count(s["documents"]), in_bytes(s["bytes"]),
             count(s["documents_left"]), in_bytes(s["bytes_left"]),
             share(s["bytes_left"], s["bytes"])] for s in r["sources"]]  # fmt: skip
    heads = ["source", "files", "documents", "text", "documents left", "text left", "share left"]
    return ui.section("What went in", "Per entry of corpus.input, after reading and cleaning.", ui.table(heads, rows))


def _dropped(r: dict[str, Any]) -> str:
    most = max((d["count"] for d in r["dropped"]), default=0) or 1
    seen = max(1, r["steps"][0]["documents_in"])
    items = []
    for d in r["dropped"]:
        texts = "".join(_text(place, head) for place, head in d["samples"])
        items.append(
            f"<details><summary><span class=name>{escape(d['reason'])}<small>{escape(d['step'])}</small></span>"
            f"{ui.track(('gone', d['count'] / most))}<span class=value><b>{count(d['count'])}</b> {share(d['count'], seen)}</span>"
            f"</summary>{texts}</details>"
        )
    note = "Open a line for texts that went for this reason. All of them are in <code>removed.jsonl</code>."
    return ui.section("What was dropped, and why", note if items else "Nothing.", f'<div class="bars drops">{"".join(items)}</div>')


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
    return ui.section("Near copies", note if near["bins"] else "None found.", _histogram(near["bins"]), least)


def _histogram(bins: Sequence[Sequence[float]]) -> str:
    """Columns over similarity, as SVG: [from, to, documents]."""
    if not bins:
        return ""
    most, number, low = max(b[2] for b in bins) or 1, len(bins), bins[0][0]
    columns = "".join(
        f'<rect x="{(100 * i + 8) / number:.2f}" y="{100 - 100 * n / most:.2f}" width="{84 / number:.2f}" '
        f'height="{100 * n / most:.2f}"><title>{a:.2f} to {b:.2f}: {n:.0f}</title></rect>' for i, (a, b, n) in enumerate(bins)
    )  # fmt: skip
    ticks = "".join(f"<span>{low + (1 - low) * k / 4:.2f}</span>" for k in range(5))
    return (f'<div class=chart><span class=top>{count(most)}</span><svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img"'
            f' aria-label="near copies by similarity">{columns}</svg><div class=axis>{ticks}</div></div>')  # fmt: skip


def _copies(r: dict[str, Any]) -> str:
    copies = r["copies"]
    if not copies or not copies["bins"]:
        return ""
    rows = [(_range(a, b), n, count(n)) for a, b, n in copies["bins"]]
    largest = "".join(f"<details><summary>{count(c['documents'])} documents</summary>{_text(c['place'], c['head'])}</details>"
                      for c in copies["largest"])  # fmt: skip
    note = "Documents in a group, the one that stays among them, and how many such groups there are."
    return ui.section("Groups of copies", note, ui.bars(rows), f"<h3>The largest</h3>{largest}")


def _range(a: int, b: int) -> str:
    return count(a) if a == b else f"{count(a)} – {count(b)}"


def _lengths(r: dict[str, Any]) -> str:
    blocks = []
    for label, told in r["lengths"].items():
        facts = "".join(f"{mark} {name} {count(told[name])}" for mark, name in zip(";,,", MIDDLE, strict=True) if name in told)
        rows = [(_range(a, b), n, count(n)) for a, b, n in told["bins"]]
        blocks.append(
            f"<div><h3>{escape(label)}</h3><p class=muted>{count(told['documents'])} documents{facts}</p>{ui.bars(rows)}</div>"
        )
    return ui.section("Length of documents", "", "<div class=pair>" + "".join(blocks) + "</div>")


def _tokenizer(r: dict[str, Any]) -> str:
    told = dict(r["tokenizer"] or {})
    if not told:
        return ""
    judged = dict(told.pop("report", None) or {})
    sides = {name: judged.pop(name) for name in ("train", "valid") if isinstance(judged.get(name), dict)}
    longest = judged.pop("longest", [])
    rows = [
        [escape(name).replace("_", " "), ui.told(value)]
        for name, value in ui.flat({**told, **judged}, joint=", ")
        if value not in ({}, [], None)
    ]
    columns = list(next(iter(sides.values()), {}))
    table = ui.table(["sample of", *(escape(name).replace("_", " ") for name in columns)],
                   [[name, *(ui.told(side.get(column)) for column in columns)] for name, side in sides.items()])  # fmt: skip
    chips = "".join(f"<code>{escape(token)}</code> " for token in longest)
    return ui.section("Tokenizer", "", ui.table(["what", "value"], rows, text=2), table if sides else "",
                    f"<h3>The longest tokens</h3><p class=chips>{chips}</p>" if longest else "")  # fmt: skip


def _cost(r: dict[str, Any]) -> str:
    rows = []
    for s in r["steps"]:
        size = s["bytes_in"] or s["bytes_out"]
        rate = f"{size / 1e6 / s['cpu_seconds']:.3g}" if s["cpu_seconds"] >= 0.01 else "–"
        rows.append([escape(s["label"]), count(s["documents_in"]), in_bytes(s["bytes_in"]), count(s["documents_out"]),
                     in_bytes(s["bytes_out"]), count(s["tasks"]), duration(s["seconds"]),
                     duration(s["cpu_seconds"]), rate])  # fmt: skip
    heads = ["step", "documents in", "in", "documents out", "out", "tasks", "time", "CPU time", "MB per CPU-s"]
    bars = ui.bars([(escape(s["label"]), s["cpu_seconds"], duration(s["cpu_seconds"])) for s in r["steps"]])
    note = "CPU time of each step. What an earlier, interrupted start has finished counts; what it lost does not."
    return ui.section("What it cost", note, bars, ui.table(heads, rows))


def _settings(r: dict[str, Any]) -> str:
    rows = [[f"<code>corpus.{escape(name)}</code>", f"<code>{escape(json.dumps(value, ensure_ascii=False))}</code>"]
            for name, value in ui.flat(r["config"] or {}) if value not in (None, {}, [])]  # fmt: skip
    return ui.folded("Settings", ui.table(["key", "value"], rows, text=2))
