"""The loss of a run as a picture."""

from __future__ import annotations

from pathlib import Path

from megatron_scratch.train.rundir import RunDir, read_jsonl


def plot_loss(run: RunDir) -> Path | None:
    """Draw training and validation loss against steps, and tokens on top, into `loss.png`; None without any rows."""
    rows = read_jsonl(run.metrics) if run.metrics.exists() else []
    train = [(r["step"], r["loss"]) for r in rows if "loss" in r]
    valid = [(r["step"], r["val_loss"]) for r in rows if "val_loss" in r]
    if not train:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*train, strict=True), color="#3b6ea8", linewidth=1.2, label="training")
    if valid:
        axes.plot(
            *zip(*valid, strict=True), color="#c8553d", marker="o", markersize=4, label=f"validation, last {valid[-1][1]:.3f}"
        )
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=run.path.name)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    per_step = [r["tokens"] / r["step"] for r in rows if "tokens" in r and r["step"]]
    if per_step:
        ratio = per_step[-1] / 1e6
        top = axes.secondary_xaxis("top", functions=(lambda s: s * ratio, lambda t: t / ratio))
        top.set_xlabel("million tokens")
    FigureCanvasAgg(figure).print_png(str(run.plot))
    return run.plot
