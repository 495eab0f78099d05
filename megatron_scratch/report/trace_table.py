"""What a trace came to (`report/trace.py`) as a table for people and as JSON for scripts."""

from __future__ import annotations

from typing import Any

from megatron_scratch.report.trace import PARTS, Account

MOST_COLUMNS = 6  # steps with a column of their own
MEANING = {
    "gemm": "matrix products",
    "attention": "softmax(q k^T) v, without the projections",
    "norm": "",
    "loss": "without the head's product",
    "optimizer": "norm of the gradients, clipping, update",
    "other compute": "",
    "between steps": "logging, evaluation, checkpoints",
    "communication": "waiting for messages while nothing is computed",
    "data": "waiting for the batch",
    "idle": "",
}


def table(a: Account) -> str:
    """Milliseconds a step by part, their share, and the operators that took longest."""
    count = len(a.steps)
    steps = a.steps if 1 < count <= MOST_COLUMNS else []
    span = f"step {a.steps[0].number}" if count == 1 else f"steps {a.steps[0].number} to {a.steps[-1].number}"
    facts = "".join(f"{name} {value}, " for name, value in a.facts.items())
    lines = [f"{facts}{span}: {a.wall / count / 1e6:.3f} ms a step, {a.wall / 1e6:.3f} ms in all", ""]
    lines.append(f"{'':<15}{'ms a step':>12}{'share':>8}" + "".join(f"{f'step {s.number}':>12}" for s in steps))
    rows = [(part, a.parts[part], [s.parts[part] for s in steps]) for part in PARTS]
    for part, total, each in [*rows, ("total", a.wall, [s.wall for s in steps])]:
        numbers = "".join(f"{ns / 1e6:>12.3f}" for ns in each)
        lines.append(f"{part:<15}{total / count / 1e6:>12.3f}{total / a.wall:>8.1%}{numbers}  {_meaning(part, a)}".rstrip())
    lines += ["", f"communication that runs while something is computed: {a.hidden / count / 1e6:.3f} ms a step", ""]
    lines.append(f"{'ms a step':>12}{'calls':>8}  {'part':<15}{'kernel' if a.on_gpu else 'operator, without what it calls'}")
    lines += [f"{ns / count / 1e6:>12.3f}{calls / count:>8.1f}  {part:<15}{name[:120]}" for name, part, ns, calls in a.top]
    return "\n".join(lines) + "\n"


def _meaning(part: str, a: Account) -> str:
    if part == "idle":
        return "nothing runs on the GPU" if a.on_gpu else "Python, and waiting for what is no message"
    return MEANING.get(part, "")


def as_json(a: Account) -> dict[str, Any]:
    """The same in seconds. In each step the parts add up to `seconds`."""
    return {
        **a.facts,
        "steps": [{"step": s.number, "seconds": s.wall / 1e9, "parts": _seconds(s.parts)} for s in a.steps],
        "seconds": a.wall / 1e9,
        "parts": _seconds(a.parts),
        "hidden_communication_seconds": a.hidden / 1e9,
        "top": [{"name": name, "part": part, "seconds": ns / 1e9, "calls": calls} for name, part, ns, calls in a.top],
    }


def _seconds(parts: dict[str, int]) -> dict[str, float]:
    return {part: ns / 1e9 for part, ns in parts.items()}
