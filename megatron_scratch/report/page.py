"""The page of one run, or of several side by side, of `util/page`'s pieces. The browser draws the curves: uPlot, `charts.js`."""

from __future__ import annotations

import base64
from collections import Counter
from importlib import resources
from pathlib import Path
from typing import Any

from megatron_scratch.report import tables
from megatron_scratch.util import page as ui
from megatron_scratch.util.page import count, escape

AXES = {"step": "steps", "tokens": "tokens", "wall": "wall clock", "train": "time in steps", "flops": "FLOPs"}
SMOOTHING = 40  # of 100, as the slider stands at first
PLOTS = {
    "Speed": (("tokens_per_second", "mfu", "memory_gib"), "Tokens per second of the whole run; MFU counts causal attention."),
    "Optimisation": (("grad_norm", "lr", "spike_score", "loss_scale"), ""),
}
"""Section -> its small charts, and a note."""


def page(report: dict[str, Any], picture: Path | None = None) -> str:
    """`collect`'s numbers as HTML.

    Args:
        picture: of the loss, for browsers that run no scripts.
    """
    runs = report["runs"]
    one = runs[0] if len(runs) == 1 else None
    name = escape(one["name"] if one else f"{len(runs)} runs")
    sections = [_notes(runs), tables.tiles(one) if one else tables.finals(runs), _loss(runs, picture), _events(runs), *_plots(runs),
                _split(runs), _layers(runs), _samples(runs), tables.spent(runs), tables.mix(runs), tables.machines(runs),
                tables.settings(runs)]  # fmt: skip
    body = (
        f"<header><p class=kicker>Training {'run' if one else 'runs'}</p><h1>{name}</h1><p class=muted>"
        + (f"{tables.line(one)}<br>" if one else "")
        + f"As of {escape(report['made'])} · megatron_scratch {escape(report['version'])}</p></header>\n"
        + "\n".join(section for section in sections if section)
        + "\n<footer class=muted>Drawn with uPlot 1.6.32, © 2022 Leon Sorokin, MIT licence. This page loads nothing from anywhere; "
        "its numbers lie in it as JSON.</footer>"
    )
    style = _file("vendor/uplot.css") + _file("style.css")
    licence = f"/*\n{_file('vendor/uplot.LICENSE')}*/\n"
    scripts = (licence + _file("vendor/uplot.js"), _file("charts.js"), _file("app.js"))
    return ui.document(f"{name}: training report", body, report, style, scripts)


def _file(name: str) -> str:
    return resources.files("megatron_scratch.report").joinpath(name).read_text("utf-8")


def _notes(runs: list[dict[str, Any]]) -> str:
    notes = [f"{escape(run['name'])}: {escape(note)}" for run in runs for note in run["notes"]]
    notes += [f"{escape(run['name'])}: no step is logged yet" for run in runs if not run["rows"]]
    return f"<section class=notes>{'<br>'.join(notes)}</section>" if notes else ""


def _plot(name: str, run: int | None = None, kind: str = "") -> str:
    which = "" if run is None else f' data-run="{run}"'
    return f'<div class="plot {kind}" data-chart="{name}"{which}></div>'


def _loss(runs: list[dict[str, Any]], picture: Path | None) -> str:
    if not any(run["curves"].get("loss") or run["valid"] for run in runs):
        return ""
    axes = [axis for axis in AXES if all(axis in run["axes"] or axis == "flops" and "tokens" in run["axes"]
                                         and run["facts"]["flops_per_token"] for run in runs if run["rows"])]  # fmt: skip
    radios = "".join(
        f"<label><input type=radio name=x value={axis}{' checked' if axis == 'step' else ''}><span>{AXES[axis]}</span></label>"
        for axis in axes
    )
    controls = (
        f'<div class=controls><fieldset class=choice><legend>against</legend>{radios}</fieldset>'
        '<label class=check><input type=checkbox id=log> log scale</label>'
        f"<label class=slide>smoothing <input type=range id=smooth min=0 max=100 value={SMOOTHING}>"
        "<output id=smoothed></output></label>"
        '<button type=button id=reset hidden>whole run</button></div>'
    )  # fmt: skip
    shown = ""
    if picture is not None:
        raw = base64.b64encode(picture.read_bytes()).decode()
        shown = f'<noscript><img class=still alt="loss" src="data:image/png;base64,{raw}"></noscript>'
    return ui.section("Loss", f"Nats per token. Drag to zoom in all charts, double-click to go back.{_thinned(runs)}", controls,
                      _plot("loss", kind="tall"), '<p class=marks id=marks></p>', shown)  # fmt: skip


def _thinned(runs: list[dict[str, Any]]) -> str:
    """A word where not every row is drawn."""
    whole = [run["curves"]["loss"] for run in runs if "whole" in run["curves"].get("loss", {})]
    if not whole:
        return ""
    rows, kept = sum(curve["whole"] for curve in whole), sum(len(curve["step"]) for curve in whole)
    return (f" Of {count(rows)} logged steps, {count(kept)} are drawn: the lowest and the highest of each piece; the smooth line "
            "and the step's parts are of the means of all.")  # fmt: skip


def _events(runs: list[dict[str, Any]]) -> str:
    if not any(run["events"] for run in runs):
        return ""
    several = len(runs) > 1
    rows = [
        [*([escape(run["name"])] if several else []), escape(e["when"]), f"<b class=event>{_words(e['event'])}</b>",
         f"{'≈ ' if e['about'] else ''}{count(e['step'])}", escape(e["text"])]
        for run in runs for e in run["events"]
    ]  # fmt: skip
    counts = Counter(e["event"] for run in runs for e in run["events"])
    chips = " ".join(f"<span class=chip>{_words(name)} <b>{count(n)}</b></span>" for name, n in counts.most_common())
    left = sum(run["events_whole"] - len(run["events"]) for run in runs)
    note = f"<p class=muted>{count(left)} older events are not listed.</p>" if left else ""
    heads = [*(["run"] if several else []), "when", "event", "step", "what"]
    body = f"<details><summary>All {count(len(rows))}, from the ledger</summary>{ui.table(heads, rows, text=len(heads))}</details>"
    return ui.section("Events", "", f"<p>{chips}</p>", note, body)


def _words(event: str) -> str:
    return escape(event.replace("_", " "))


def _plots(runs: list[dict[str, Any]]) -> list[str]:
    sections = []
    for title, (names, note) in PLOTS.items():
        there = [name for name in names if any(name in run["curves"] for run in runs)]
        if there:
            sections.append(ui.section(title, note, f"<div class=grid>{''.join(_plot(name) for name in there)}</div>"))
    return sections


def _split(runs: list[dict[str, Any]]) -> str:
    there = [i for i, run in enumerate(runs) if "split" in run["curves"]]
    if not there:
        return ""
    several = len(runs) > 1
    plots = [(f"<div><h3>{escape(runs[i]['name'])}</h3>" if several else "<div>") + _plot("split", i) + "</div>" for i in there]
    body = f"<div class=grid>{''.join(plots)}</div>" if several else plots[0]
    return ui.section("Where a step's time goes", "Milliseconds a step on the main rank, checkpoints included.", body)


def _layers(runs: list[dict[str, Any]]) -> str:
    there = [i for i, run in enumerate(runs) if run["layers"]]
    if not there:
        return ""
    kinds = list(dict.fromkeys(kind for i in there for kind in runs[i]["layers"]["values"]))
    which = _select("layer-run", [(str(i), runs[i]["name"]) for i in there]) if len(there) > 1 else ""
    what = _select("layer-kind", [(kind, kind.replace("_", " ")) for kind in kinds])
    note = "A row for each module, first to last; a column for each step that was looked at."
    controls = f"<div class=controls>{which}{what}<span id=layer-scale></span></div>"
    canvas = '<div class=heat id=layers><canvas role=img aria-label="values of layers over steps"></canvas></div>'
    return ui.section("Layers", note, controls, canvas)


def _samples(runs: list[dict[str, Any]]) -> str:
    there = [i for i, run in enumerate(runs) if run["samples"]["shown"]]
    if not there:
        return ""
    left = sum(runs[i]["samples"]["whole"] - len(runs[i]["samples"]["shown"]) for i in there)
    which = _select("sample-run", [(str(i), runs[i]["name"]) for i in there]) if len(there) > 1 else ""
    return ui.section("Samples", f"What the model writes.{f' {count(left)} others are in samples.jsonl.' if left else ''}",
                      f"<div class=controls>{which}<label class=slide>step <input type=range id=sample-step min=0 value=0>"
                      "<output id=sample-at></output></label></div><div id=samples></div>")  # fmt: skip


def _select(name: str, options: list[tuple[str, str]]) -> str:
    """A choice of (value, word); its label is its title."""
    told = "".join(f'<option value="{escape(value)}">{escape(word)}</option>' for value, word in options)
    return f'<select id="{name}" aria-label="{name.replace("-", " ")}">{told}</select>'
