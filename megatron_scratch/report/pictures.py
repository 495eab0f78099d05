"""The curves as PNGs, for a paper or a slide: one look, units in the labels, nothing that needs a legend to be read twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

COLOURS = ("#2f6fde", "#dd7a1c", "#2a9d6f", "#c8446b", "#7a5bd0", "#8a6d3b", "#1f9bb3", "#6b7785")
PARTS = {"data_seconds": ("data", "#dd7a1c"), "forward_backward_seconds": ("forward, backward", "#2f6fde"),
         "optimizer_seconds": ("optimizer", "#2a9d6f"), "checkpoint_seconds": ("checkpoint", "#c8446b"),
         "other_seconds": ("other", "#a4adb8")}  # fmt: skip
UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
WORDS = {"k": "thousand ", "M": "million ", "G": "billion ", "T": "trillion "}
SMOOTH = 0.01  # half-life of the smoothed loss, as a part of the run


def pictures(out: Path, runs: Sequence[dict[str, Any]]) -> list[Path]:
    """All that the runs have numbers for. `runs`: of `collect`."""
    made = [loss(out / "loss.png", runs)]
    made += [_figure(out / f"{name}.png", runs, draw, height) for name, (draw, height) in DRAWN.items()]
    return [path for path in made if path is not None]


def loss(path: Path, runs: Sequence[dict[str, Any]], title: str = "") -> Path | None:
    """Training loss, pale as it is and smoothed, and validation loss; tokens on top where there is one run."""
    return _figure(path, runs, _loss, 4.5, title)


Draw = Callable[[Any, Sequence[dict[str, Any]]], bool]


def _figure(path: Path, runs: Sequence[dict[str, Any]], draw: Draw, height: float, title: str = "") -> Path | None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), dpi=160, layout="constrained")
    if not draw(figure, runs):
        return None
    if len(runs) == 1:
        figure.suptitle(plain(title or runs[0]["name"]), x=0.02, ha="left", fontsize=11, fontweight="bold", parse_math=False)
    figure.align_ylabels()
    FigureCanvasAgg(figure).print_png(str(path))
    return path


def plain(text: str) -> str:
    """Without characters that the font of pictures lacks."""
    return "".join(c if c.isprintable() and ord(c) < 0x500 else "?" for c in text)[:80]


def unit(most: float) -> tuple[float, str]:
    return next(((size, name) for size, name in UNITS if most >= size), UNITS[-1])


def smooth(steps: Sequence[float], values: Sequence[float], half_life: float) -> list[float]:
    """Exponential mean over steps, however far apart they are, without the pull of its beginning."""
    out, total, weight, before = [], 0.0, 0.0, None
    for step, value in zip(steps, values, strict=True):
        keep = 0.0 if before is None else 0.5 ** ((step - before) / max(half_life, 1e-9))
        total, weight, before = total * keep + value, weight * keep + 1.0, step
        out.append(total / weight)
    return out


def _axes(figure: Any, rows: int = 1) -> list[Any]:
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color("#9aa4af")
        ax.tick_params(color="#9aa4af", labelsize=9)
        ax.grid(color="#e3e7ec", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.margins(x=0.01)
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}".replace(",", "\u2009") if x == int(x) else "")
    return list(axes)


def _legend(ax: Any, handles: Sequence[Any], names: Sequence[str], **more: Any) -> None:
    """Names may begin with an underscore or hold a dollar, which mean something to matplotlib."""
    legend = ax.legend(handles, ["x"] * len(handles), frameon=False, fontsize=9, **more)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_parse_math(False)
        text.set_text(plain(name))


def _loss(figure: Any, runs: Sequence[dict[str, Any]]) -> bool:
    drawn = [(i, run) for i, run in enumerate(runs) if "loss" in run["curves"] or run["valid"]]
    if not drawn:
        return False
    (ax,) = _axes(figure)
    ax.set_ylabel("loss (nats per token)")
    handles, names, several = [], [], len(runs) > 1
    for i, run in drawn:
        curve, colour = run["curves"].get("loss"), COLOURS[i % len(COLOURS)]
        if curve:
            ax.plot(curve["step"], curve["loss"], color=colour, alpha=0.28, linewidth=0.9)
            half_life = SMOOTH * (curve["step"][-1] or 1)
            line = ax.plot(
                curve["step"], smooth(curve["step"], curve.get("mean", curve["loss"]), half_life), color=colour, linewidth=1.6
            )
            handles, names = [*handles, line[0]], [*names, run["name"] if several else "training, smoothed"]
        for k, (name, points) in enumerate(run["valid"].items()):
            tone = colour if several else COLOURS[(k + 1) % len(COLOURS)]
            line = ax.plot(points["step"], points["loss"], color=tone, linewidth=0.9, linestyle=(0, (2, 2)), marker="os^Dv"[k % 5],
                           markersize=4.5, markeredgecolor="white", markeredgewidth=0.6)  # fmt: skip
            told = f"validation{f' {name}' if name else ''}"
            names.append(f"{run['name']}, {told}" if several else f"{told}, last {points['loss'][-1]:.3f}")
            handles.append(line[0])
    _focus(ax, drawn)
    _legend(ax, handles, names)
    if not several:
        _tokens_on_top(ax, runs[0])
    return True


def _focus(ax: Any, drawn: Sequence[tuple[int, dict[str, Any]]]) -> None:
    """One spike must not flatten all the rest: the axis ends a little above where the loss began."""
    tops = [
        max(run["curves"]["loss"]["loss"][:1] + run["curves"]["loss"].get("mean", [])[:1])
        for _, run in drawn
        if "loss" in run["curves"]
    ]
    low, high = ax.get_ylim()
    if tops and high > low + 1.6 * (max(tops) - low) > low:
        ax.set_ylim(low, low + 1.3 * (max(tops) - low))


def _tokens_on_top(ax: Any, run: dict[str, Any]) -> None:
    curve = run["curves"].get("loss") or {}
    if not curve.get("tokens") or not curve["step"][-1] or not curve["tokens"][-1]:
        return
    size, prefix = unit(curve["tokens"][-1])
    ratio = curve["tokens"][-1] / curve["step"][-1] / size
    top = ax.secondary_xaxis("top", functions=(lambda s: s * ratio, lambda t: t / ratio))
    top.set_xlabel(f"{WORDS.get(prefix, prefix)}tokens")
    top.spines["top"].set_visible(False)
    top.tick_params(color="#9aa4af", labelsize=9)


def _lines(ax: Any, runs: Sequence[dict[str, Any]], key: str, label: str, scale: float = 1.0) -> None:
    for i, run in enumerate(runs):
        curve = run["curves"].get(key)
        if curve:
            ax.plot(curve["step"], [v * scale for v in curve[key]], color=COLOURS[i % len(COLOURS)], linewidth=1.2)
    ax.set_ylabel(label)


def _stacked(keys: dict[str, str], zero: bool) -> Draw:
    """One curve below the other, of those that there are."""

    def draw(figure: Any, runs: Sequence[dict[str, Any]]) -> bool:
        shown = [key for key in keys if any(key in run["curves"] for run in runs)]
        if not shown:
            return False
        for ax, key in zip(_axes(figure, len(shown)), shown, strict=True):
            most = max(max(map(abs, run["curves"][key][key])) for run in runs if key in run["curves"])
            size, prefix = unit(most) if key == "tokens_per_second" else (0.01, "") if key == "mfu" else (1.0, "")
            _lines(ax, runs, key, keys[key].format(WORDS.get(prefix, prefix)), 1 / size)
            if zero:
                ax.set_ylim(bottom=0)
            if len(runs) > 1 and key == shown[0]:
                here = [(line, run["name"]) for line, run in zip(ax.lines, (r for r in runs if key in r["curves"]), strict=True)]
                _legend(ax, [line for line, _ in here], [name for _, name in here])
        return True

    return draw


def _time(figure: Any, runs: Sequence[dict[str, Any]]) -> bool:
    """Seconds of a step by part, a panel for each run."""
    shown = [run for run in runs if "split" in run["curves"]][:6]
    if not shown:
        return False
    for ax, run in zip(_axes(figure, len(shown)), shown, strict=True):
        curve = run["curves"]["split"]
        keys = [key for key in PARTS if any(curve[key])]
        areas = ax.stackplot(curve["step"], [curve[key] for key in keys], colors=[PARTS[key][1] for key in keys], linewidth=0)
        ax.set(ylabel="seconds a step", ylim=(0, None))
        if len(shown) > 1:
            ax.set_title(plain(run["name"]), fontsize=9, loc="left", parse_math=False)
        if run is shown[0]:
            _legend(ax, areas[::-1], [PARTS[key][0] for key in keys][::-1], loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return True


DRAWN: dict[str, tuple[Draw, float]] = {
    "throughput": (_stacked({"tokens_per_second": "{}tokens per second", "mfu": "MFU (%)"}, zero=True), 4.5),
    "time": (_time, 4.0),
    "memory": (_stacked({"memory_gib": "memory (GiB)"}, zero=True), 3.2),
    "optimisation": (
        _stacked({"grad_norm": "gradient norm", "lr": "learning rate", "spike_score": "spike score (σ)"}, zero=False),
        5.5,
    ),
}
"""Picture -> what draws it, and its height in inches."""
