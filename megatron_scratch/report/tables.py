"""Tiles and tables of a page about runs: what they came to, where the time went, what they read, on which machines, how set."""

from __future__ import annotations

from typing import Any

from megatron_scratch.report.listed import differences
from megatron_scratch.util import page as ui
from megatron_scratch.util.page import count, duration, escape, in_bytes, large, share, short

NONE = "–"
PARTS = {"computing": "stay", "waiting for data": "data", "saving": "save", "evaluating and sampling": "eval", "starting": "begin",
         "lost in rewinds": "lost", "down": "down", "other": "other"}  # fmt: skip
"""Part of the time -> the class that colours it."""
NAMES = {"hosts": "hosts", "device": "device", "engine": "engine", "commit": "commit"}


def line(run: dict[str, Any]) -> str:
    """One line on top: when, on what."""
    f = run["facts"]
    layout = " · ".join(f"{name}&#8239;{n}" for name, n in f["layout"].items() if n > 1)
    world = f"{count(f['world'])} process{'es' if f['world'] != 1 else ''}" if f["world"] else ""
    times = f"{escape(f['began'])} to {escape(f['last_sign'])}" if f["began"] and f["last_sign"] else ""
    parts = [times, world, layout, escape(f["engine"]), escape(f["device"]),
             f"{large(f['parameters'])} parameters" if f["parameters"] else ""]  # fmt: skip
    return " · ".join(part for part in parts if part)


def tiles(run: dict[str, Any]) -> str:
    f, s = run["facts"], run["spent"]
    of = f" of {count(f['steps'])}" if f["steps"] else ""
    best = f"best {_loss(f['best_val_loss'])}" if f["best_val_loss"] is not None else ""
    cells = [
        ("state", escape(f["state"]), f"step {_n(f['step'], count)}{of}"),
        ("tokens", _n(f["tokens"], large), _flop(f["flops"]) if f["flops"] else ""),
        ("training loss", _n(f["loss"], _loss), "mean of the last rows"),
        ("validation loss", _n(f["val_loss"], _loss), best),
        ("throughput", _n(f["tokens_per_second"], short), f"tokens/s; MFU {_percent(f['mfu'])}"),
        ("goodput", _percent(s["goodput"]), f"of {duration(s['total'])}, {s['starts']} start{'s' if s['starts'] != 1 else ''}"),
    ]
    return ui.tiles([cell for cell in cells if cell[1] != NONE])


def finals(runs: list[dict[str, Any]]) -> str:
    heads = [
        "run",
        "state",
        "steps",
        "tokens",
        "training loss",
        "validation loss",
        "best",
        "tokens/s",
        "MFU",
        "GiB",
        "goodput",
        "time",
    ]
    rows = []
    for i, run in enumerate(runs):
        f, s = run["facts"], run["spent"]
        rows.append([f'<i class="key k{i % 8}"></i> {escape(run["name"])}', escape(f["state"]), _n(f["step"], count),
                     _n(f["tokens"], large), _n(f["loss"], _loss), _n(f["val_loss"], _loss), _n(f["best_val_loss"], _loss),
                     _n(f["tokens_per_second"], large), _percent(f["mfu"]), _n(f["memory_gib"], lambda v: f"{v:.3g}"),
                     _percent(s["goodput"]), duration(s["total"])])  # fmt: skip
    names = list(dict.fromkeys(name for run in runs for name in run["facts"]["sets"]))
    sets = ui.table(["validation set", *(escape(run["name"]) for run in runs)],
                    [[escape(name), *(_n(run["facts"]["sets"].get(name), _loss) for run in runs)] for name in names])  # fmt: skip
    return ui.section("What they came to", "Training loss: mean of the last rows. Speeds: medians.", ui.table(heads, rows, text=2),
                      sets if names else "", _differences(runs))  # fmt: skip


def _differences(runs: list[dict[str, Any]]) -> str:
    rows = [[f"<code>{escape(key)}</code>", *(f"<code>{escape(value)}</code>" for value in values)]
            for key, values in differences([run["config"] for run in runs])]  # fmt: skip
    if not rows:
        return "<p class=muted>Their configs are the same but for name and dir.</p>"
    return "<h3>What their configs differ in</h3>" + ui.table(
        ["key", *(escape(run["name"]) for run in runs)], rows, text=len(runs) + 1
    )


def spent(runs: list[dict[str, Any]]) -> str:
    shown = [run for run in runs if run["spent"]["total"]]
    if not shown:
        return ""
    several, bars = len(runs) > 1, ""
    for run in shown:
        parts = ((PARTS[part["name"]], part["seconds"] / run["spent"]["total"]) for part in run["spent"]["parts"])
        bars += (f"<h3>{escape(run['name'])}</h3>" if several else "") + ui.track(*parts)
    heads = ["part", "from", *(head for run in shown for head in ((escape(run["name"]), "") if several else ("time", "share")))]
    note = "From the first start to the last sign of life. Goodput is the first line. Estimates are of times between rows."
    untold = any(not run["spent"]["rewinds_told"] for run in shown)
    if untold:
        note += " Where a run was started again and its version wrote no rewinds, what it lost counts as down."
    return ui.section("Where the time went", note, f"<div class=spent>{bars}</div>", ui.table(heads, _parts(shown), text=2))


def _parts(runs: list[dict[str, Any]]) -> list[list[str]]:
    """A row for each part of the time, and one for all; two columns for each run."""
    told = [{part["name"]: part for part in run["spent"]["parts"]} for run in runs]
    rows = []
    for name, kind in PARTS.items():
        found = [parts[name] for parts in told if name in parts]
        if not found:
            continue
        cells = [f'<i class="key {kind}"></i> {name}', "measured" if found[0]["measured"] else "estimated"]
        for run, parts in zip(runs, told, strict=True):
            seconds = parts[name]["seconds"] if name in parts else 0.0
            cells += [duration(seconds), share(seconds, run["spent"]["total"])] if seconds else [NONE, NONE]
        rows.append(cells)
    totals = [cell for run in runs for cell in (f"<b>{duration(run['spent']['total'])}</b>", "")]
    return [*rows, ["<b>all</b>", "", *totals]]


def mix(runs: list[dict[str, Any]]) -> str:
    several, rows, sources = len(runs) > 1, [], ""
    for run in runs:
        for entry in run["mix"]:
            rows.append([*([escape(run["name"])] if several else []), f"<code>{escape(entry['path'])}</code>",
                         share(entry["weight"], 1), _n(entry["documents"], large), _n(entry["tokens"], large),
                         _n(entry["trained"], large), _n(entry["epochs"], lambda v: f"{v:.3g}")])  # fmt: skip
            held = [[escape(s["input"]), _n(s["documents"], large), in_bytes(s["bytes"])] for s in entry["sources"]]
            if held and not several:
                sources += f"<h3>Made of, for <code>{escape(entry['path'])}</code></h3>" + ui.table(
                    ["source", "documents", "text"], held
                )
    if not rows:
        return ""
    heads = [*(["run"] if several else []), "data", "weight", "documents", "tokens in it", "tokens trained on", "epochs"]
    read = all(entry["readable"] for run in runs for entry in run["mix"])
    note = "" if read else "Where no manifest.json can be read from here, only the weight is known."
    return ui.section("Data", note, ui.table(heads, rows, text=2 if several else 1), sources)


def machines(runs: list[dict[str, Any]]) -> str:
    rows = []
    for run in runs:
        f, head = run["facts"], f"{escape(run['name'])}, " if len(runs) > 1 else ""
        layout = " × ".join(f"{name} {n}" for name, n in f["layout"].items())
        told = {
            "processes": f["world"] and f"{count(f['world'])}{f': {layout}' if layout else ''}",
            "engine": escape(f["engine"]),
            "device": escape(f["device"]),
            "peak memory": f["memory_gib"] and f"{f['memory_gib']:.3g} GiB",
            "parameters": f["parameters"] and count(f["parameters"]),
            "FLOPs per token": f["flops_per_token"] and _flop(f["flops_per_token"]),
            "commit": f["commit"] and f"<code>{escape(f['commit'])}</code>",
            "versions": ", ".join(f"{escape(k)} {escape(v)}" for k, v in f["versions"].items()),
            f"hosts ({len(f['hosts'])})": "<span class=hosts>" + ", ".join(map(escape, f["hosts"])) + "</span>"
            if f["hosts"]
            else "",
        }
        rows += [[f"{head}{name}", value] for name, value in told.items() if value]  # fmt: skip
    return ui.section("Layout and machines", "", ui.table(["what", "value"], rows, text=2)) if rows else ""


def settings(runs: list[dict[str, Any]]) -> str:
    keys = list(dict.fromkeys(key for run in runs for key in run["config"]))
    rows = [
        [f"<code>{escape(key)}</code>", *(f"<code>{escape(run['config'].get(key, NONE))}</code>" for run in runs)] for key in keys
    ]
    heads = ["key", *(["value"] if len(runs) == 1 else [escape(run["name"]) for run in runs])]
    return ui.folded("Config", ui.table(heads, rows, text=len(heads))) if rows else ""


def _n(value: float | None, told: Any) -> str:
    return NONE if value is None else told(value)


def _loss(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e4 else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f}&#8239;%"


def _flop(value: float) -> str:
    for unit, size in (("Y", 1e24), ("Z", 1e21), ("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.3g}&#8239;{unit}FLOP"
    return f"{value:.3g}&#8239;FLOP"
