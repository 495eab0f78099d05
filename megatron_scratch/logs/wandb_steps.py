"""What goes to W&B, by training step. No wandb in here.

W&B takes the steps of a run once each, in rising order: what comes late or again is dropped. But a run's rows lie in several files,
which are read in turn; and a run that goes back to a checkpoint computes steps again. So rows wait here until all of their step are
there, and W&B's step is the training step plus an offset, which grows by as much as the run goes back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Row = dict[str, Any]

SAMPLES = "samples"
TIME = "_timestamp"  # W&B's own; what is sent late then lies where it belongs
# Names in metrics.jsonl -> in W&B, where "/" makes sections of charts. Others go there under their own.
NAMES = {
    "time": TIME,
    "loss": "train/loss", "lr": "train/lr", "grad_norm": "train/grad_norm", "loss_scale": "train/loss_scale",
    "spike_score": "train/spike_score", "skipped": "train/skipped",
    "tokens_per_second": "speed/tokens_per_second", "step_seconds": "speed/step_seconds", "mfu": "speed/mfu",
    "mfu_full_attention": "speed/mfu_full_attention",
    "data_seconds": "time/data_seconds", "forward_backward_seconds": "time/forward_backward_seconds",
    "optimizer_seconds": "time/optimizer_seconds", "checkpoint_seconds": "time/checkpoint_seconds",
    "memory_gib": "memory/gib",
    "val_loss": "val/loss", "val_perplexity": "val/perplexity", "val_tokens": "val/tokens",
    "val_bits_per_byte": "val/bits_per_byte",
}  # fmt: skip


def metrics(row: Mapping[str, Any]) -> Row:
    """A row of metrics.jsonl in W&B's names: `val_loss/wiki` is `val/loss/wiki`."""
    out = {}
    for key, value in row.items():
        head, slash, name = key.partition("/")
        out[NAMES.get(head, head) + slash + name] = value
    return out


def layers(row: Mapping[str, Any]) -> Row:
    """A row of layers.jsonl: `layers/7/grad_norm`, `layers/embed/weight_norm`. A dot in a name would mean a level to W&B."""
    out = {NAMES.get(key, key): value for key, value in row.items() if key != "layers"}
    for layer, values in row.get("layers", {}).items():
        name = layer.removeprefix("layers.").replace(".", "/")
        out |= {f"layers/{name}/{key}": value for key, value in values.items()}
    return out


def joined(one: Row, other: Row) -> Row:
    """Two parts of a step. Its time is the earlier one, as files are read in no order that could be relied on."""
    times = [part[TIME] for part in (one, other) if TIME in part]
    return {**one, **other, **({TIME: min(times)} if times else {})}


class Steps:
    """Rows by training step. `last`: the newest step that W&B has, as `last + offset`; `high`: steps up to it are there already."""

    def __init__(self, last: int = -1, offset: int = 0, high: int = -1) -> None:
        self.last, self.offset, self.high = last, offset, high
        self.waiting: dict[int, Row] = {}
        self.seen = -1  # the newest step of which there was a row at the last look; all rows of earlier ones have come since

    def add(self, values: Row) -> None:
        """Part of a step, in W&B's names. What W&B has is passed over."""
        if (step := values.get("step", -1)) > self.last:
            self.waiting[step] = joined(self.waiting.get(step, {}), values)

    def add_sample(self, row: Row) -> None:
        """One of maybe several texts of a step; the same one again changes nothing."""
        there = self.waiting.get(row.get("step", -1), {}).get(SAMPLES, [])
        if row not in there:
            self.add({"step": row.get("step", -1), SAMPLES: [*there, row]})

    def rewound(self, step: int) -> None:
        """The steps after `step` are computed again: they follow those that are there, and are marked."""
        self.waiting = {number: values for number, values in self.waiting.items() if number <= step}
        self.seen = min(self.seen, step)
        if self.last > step:
            self.high = max(self.high, self.last)
            self.offset += self.last - step
            self.last = step

    def ready(self, all_of_it: bool = False) -> Iterator[tuple[int, Row]]:
        """(W&B's step, values) of what is whole: a run writes nothing more of a step once it has written of a later one."""
        limit, self.seen = self.seen, max(self.waiting, default=self.seen)
        for step in sorted(self.waiting):
            if step < limit or all_of_it:
                values = self.waiting.pop(step)
                self.last = step
                yield step + self.offset, {**values, **({"overlap": 1} if step <= self.high else {})}
