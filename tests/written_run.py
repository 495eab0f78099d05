"""A run directory as a trainer would leave it, written by hand: with all that a report can show."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

BEGAN = 1_760_000_000.0
EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)></pre></script>\"'&amp;<!-- "
TOKENS = 65_536  # a step
KILLED, BACK, DOWN = 640, 600, 90.0  # killed after this step, went on from that one, this many seconds later
STEP, DATA, FORWARD, OPTIMIZER, SAVE, EVAL = 0.5, 0.02, 0.4, 0.06, 0.8, 6.0  # seconds


def stamp(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S+0000", time.gmtime(BEGAN + seconds))


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def start(seconds: float, step: int, steps: int, attempt: int) -> dict[str, Any]:
    return {"time": stamp(seconds), "event": "start", "step": step, "world": 16, "tp": 2, "pp": 2, "dp": 4, "cp": 1, "ep": 1,
            "engine": "fsdp", "steps": steps, "attempt": attempt, "hosts": ["node-a", "node-b"], "parameters": 123_456_789,
            "versions": {"python": "3.11.9", "torch": "2.13.0"}, "commit": "0123abc", "device": "NVIDIA H100",
            "flops_per_token": [8.1e8, 8.9e8], "seq_len": 1024}  # fmt: skip


def write(path: Path, steps: int = 1000, every: int = 5, lr: float = 3e-4, text: str = "", seed: float = 0.0) -> Path:
    """Train for `steps`, logging every few, killed once on the way. `text`: what stands wherever a run may have text."""
    path.mkdir(parents=True)
    rows, layers, samples, events = [], [], [], [start(0, 0, steps, 0)]
    clock, saved = 4.0, 0.0
    for step in range(every, steps + 1, every):
        clock += STEP * every + saved
        row = {"step": step, "time": BEGAN + clock, "loss": 2.4 + 8 * math.exp(-step / 90) + 0.15 * math.sin(step * 1.7 + seed),
               "lr": lr * min(1, step / 50), "grad_norm": 0.6 + 3 * math.exp(-step / 60) + 0.1 * math.sin(step * 2.3),
               "tokens": step * TOKENS, "tokens_per_second": TOKENS / STEP * (1 + 0.02 * math.sin(step)), "step_seconds": STEP,
               "data_seconds": DATA, "forward_backward_seconds": FORWARD, "optimizer_seconds": OPTIMIZER,
               "checkpoint_seconds": saved / every, "mfu": 0.41 + 0.01 * math.sin(step), "mfu_full_attention": 0.44,
               "memory_gib": 61.2, "spike_score": math.sin(step)}  # fmt: skip
        saved = 0.0
        if step == 355:
            row |= {"loss": 9.5, "grad_norm": 48.0, "spike_score": 11.5}
            events.append({"time": stamp(clock), "event": "spike", "step": step, "reason": f"loss 9.5 is 11.5 σ above {text}"})
        if step == 400:
            del row["loss"], row["grad_norm"]
            row["skipped"] = f"non-finite gradient {text}"
            events.append({"time": stamp(clock), "event": "skip", "step": step, "reason": row["skipped"]})
        rows.append(row)
        if step % 100 == 0:
            clock += EVAL
            loss = 2.45 + 7 * math.exp(-step / 95)
            row = {"step": step, "time": BEGAN + clock, "tokens": step * TOKENS, "val_loss": loss, "val_perplexity": math.exp(loss)}
            rows.append(row | {"val_tokens": 1_000_000, "val_bits_per_byte": loss / 3, f"val_loss/wiki{text}": loss + 0.3})
            events.append({"time": stamp(clock + SAVE), "event": "save", "step": step, "path": f"{path}/checkpoints/x",
                           "seconds": 2.5, "blocked": SAVE})  # fmt: skip
            saved = SAVE
            samples.append({"step": step, "time": BEGAN + clock, "tokens": step * TOKENS, "prompt": "Once upon a time" + text,
                            "text": f" at step {step} there was a model.\n{text}"})  # fmt: skip
        if step % 50 == 0:
            layers.append({"step": step, "time": BEGAN + clock, "tokens": step * TOKENS, "layers": _layers(step, text)})
        if step == BACK and steps > KILLED:
            clock += SAVE + (KILLED - BACK) * STEP + DOWN  # these steps are not in the file any more
            saved = 0.0
            events += [{"time": stamp(clock), "event": "resume", "step": BACK, "path": "x", "guarantee": f"bitwise {text}"},
                       {"time": stamp(clock), "event": "rewind", "step": BACK, "to": KILLED, "seconds": (KILLED - BACK) * STEP},
                       start(clock, BACK, steps, 1)]  # fmt: skip
            clock += 3.0
    events += [{"time": stamp(clock), "event": "straggler", "step": steps - every, "rank": 3, "host": f"node-b{text}", "ratio": 1.7,
                "slow": True}, {"time": stamp(clock + SAVE), "event": "finish", "step": steps, "reason": text}]  # fmt: skip
    for name, told in (("metrics", rows), ("layers", layers), ("samples", samples), ("ledger", events)):
        lines(path / f"{name}.jsonl", told)
    config = {"name": path.name, "dir": str(path), "data": {"dir": None, "blend": ["data/web:3", f"data/code{text}:1"]},
              "optim": {"name": "adamw", "lr": lr}, "train": {"steps": steps}, "note": text}  # fmt: skip
    (path / "config.yaml").write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    return path


def _layers(step: int, text: str) -> dict[str, dict[str, float]]:
    names = [f"embed{text}", *(f"layers.{i}" for i in range(12)), "norm", "head"]
    found = {}
    for i, name in enumerate(names):
        found[name] = {"grad_norm": 0.02 + 0.5 * math.exp(-step / 300) / (1 + i), "weight_norm": 20.0 + i + step / 100}
        if name != "norm":
            found[name] |= {"activation_rms": 0.8 + 0.1 * i, "activation_max": 9.0 + i + step / 200}
    return found
