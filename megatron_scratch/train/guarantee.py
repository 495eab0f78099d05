"""What a resumed run has in common with one that was never stopped: in words, for the ledger and the screen. Pure, no torch.

The state itself (weights, optimizer, schedule, data position) is bitwise the same under every layout. What may differ afterwards is
the order in which floating-point numbers are added, which follows from the layout, the threads and the kernels; and what the user
has changed on purpose. A checkpoint remembers both, under `written_by`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from megatron_scratch.config import Config
from megatron_scratch.config.optim import schedule_steps
from megatron_scratch.config.pipeline import virtual_stages

WRITTEN_BY = "written_by"  # its key in a manifest

# Largest difference of a loss over 30 steps, where only sums are in another order. Measured in fp32: 1e-6 from dp 1 to 4, and 1e-6
# from tp 1 to 4; in bf16: 7.5e-4 from tp 1 to 4. fp16 rounds at an eighth of bf16's.
TOLERANCES = {"fp64": 1e-10, "fp32": 1e-5, "bf16": 5e-3, "fp16": 5e-3}
SAME = ("dp", "engine.bucket_mb")  # what may change under train.canonical_reduction without a bit of the numbers

Changes = dict[str, tuple[Any, Any]]  # what -> before, now


def facts(cfg: Config, degrees: Mapping[str, int], machine: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What the numbers of a run depend on besides what must not change at all (`build.facts`), as JSON.

    Args:
        degrees: sizes of the axes.
        machine: threads, torch, device.

    Returns:
        "order": what decides in which order numbers are added; "recipe": what decides what is computed.
    """
    p, t, m = cfg.parallel, cfg.train, cfg.model
    order = {
        **degrees, "schedule": p.schedule if p.pp > 1 else None, "virtual_stages": virtual_stages(p), "stages": p.stages,
        "sequence_parallel": p.tp > 1 and p.sequence_parallel is not False, "engine": asdict(cfg.engine),
        "micro_batch_size": t.micro_batch_size, "canonical_reduction": t.canonical_reduction, "compile": t.compile,
        "precision": cfg.precision.name, "attention": m.attention, "norm_kernel": m.norm_kernel, **machine,
    }  # fmt: skip
    recipe = {
        "train": {"global_batch_size": t.global_batch_size, "ramp": asdict(t.ramp), "z_loss": t.z_loss},
        "model": {"dropout": m.dropout}, "optim": asdict(cfg.optim), "schedule": asdict(cfg.schedule),
        "precision": {k: v for k, v in asdict(cfg.precision).items() if k != "name"},
    }  # fmt: skip
    order["recompute"] = [p.recompute, p.recompute_every, p.recompute_save, p.recompute_budget]
    order["optim.kernel"] = recipe["optim"].pop("kernel", None)
    if "steps" in recipe["schedule"]:
        recipe["schedule"]["steps"] = schedule_steps(cfg.schedule, t.steps)
    return json.loads(json.dumps({"order": order, "recipe": recipe}))  # type: ignore[no-any-return]


def guarantee(saved: Mapping[str, Any] | None, mine: Mapping[str, Any]) -> str:
    """What holds from here on. `saved`: the `facts` of the run that wrote the checkpoint, None if it does not say; `mine`: of this
    one."""
    if not saved:
        return "state bitwise; the checkpoint does not say what wrote it, so nothing is known of the losses"
    order, recipe = changes(saved["order"], mine["order"]), changes(saved["recipe"], mine["recipe"])
    if not mine["order"]["compile"]:  # plain torch computes the same bits again, compiled code may round otherwise
        order.pop("recompute", None)
    if "micro_batch_size" in order and mine["recipe"]["model"]["dropout"] > 0:
        recipe["micro_batch_size, and with it dropout masks,"] = order.pop("micro_batch_size")
    if recipe:
        also = f"; and sums in another order: {told(order)}" if order else ""
        return f"state bitwise; other losses from here on, as asked: {told(recipe)}{also}"
    if not order:
        same = "the same layout, threads, torch and device"
        return f"bitwise: {same}" if _fixed(mine) else f"state bitwise; {same}: losses too where its kernels add in a fixed order"
    if mine["order"]["canonical_reduction"] and set(order) <= set(SAME) and _fixed(mine):
        return f"bitwise: sums have one order at every dp (train.canonical_reduction): {told(order)}"
    return f"state bitwise; {_tolerance(order, mine['order']['precision'])}: {told(order)}"


def _fixed(mine: Mapping[str, Any]) -> bool:
    """Whether the same operation on the same numbers gives the same bits: it does on CPUs. On GPUs some kernels add as it comes."""
    return str(mine["order"]["device"]).startswith("cpu")


def _tolerance(order: Changes, precision: str) -> str:
    if "precision" in order:
        return "computed in another precision: losses to its rounding"
    if precision not in TOLERANCES:
        return f"sums in another order: losses to an unknown tolerance ({precision})"
    return f"sums in another order: losses to {TOLERANCES[precision]:g} ({precision})"


def changes(saved: Mapping[str, Any], mine: Mapping[str, Any], prefix: str = "") -> Changes:
    """Every value that differs, by its dotted name. Of two entries of a group (engines, schedules) that have other names, the names
    only: their options are not each other's."""
    if saved.get("name") != mine.get("name"):
        return {prefix.rstrip("."): (saved.get("name"), mine.get("name"))}
    found: Changes = {}
    for key in [*mine, *(k for k in saved if k not in mine)]:
        before, now = saved.get(key), mine.get(key)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            found |= changes(before, now, f"{prefix}{key}.")
        elif before != now:
            found[f"{prefix}{key}"] = (before, now)
    return found


def told(changed: Changes) -> str:
    return ", ".join(f"{name} {_short(before)} -> {_short(now)}" for name, (before, now) in changed.items())


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
