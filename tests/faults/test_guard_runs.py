"""Numbers that are not finite, and spikes: one decision on all ranks, nothing applied that should not be, in every engine."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import poison
import pytest
import torch
from runs import config, ledger, rows, run, weights

from megatron_scratch.checkpoint.manifest import committed, read, step_folder, tensor
from megatron_scratch.engine.zero import import_deepspeed
from megatron_scratch.train import resume
from megatron_scratch.train.batches import BatchPlan
from megatron_scratch.train.rollback import Rollback
from megatron_scratch.train.rundir import RunDir

EVERY_STEP = ["train.steps=6", "checkpoint.every=1", "checkpoint.keep_last=0", "train.eval_every=0", "model.dropout=0.1"]
LAYOUTS = {
    "one": (1, []), "ddp": (2, []), "fsdp": (2, ["engine=fsdp"]), "hsdp": (4, ["engine=hsdp", "engine.replicas=2"]),
    "tp": (2, ["parallel.tp=2"]), "tp, whole sequences": (2, ["parallel.tp=2", "parallel.sequence_parallel=false"]),
    "pp": (2, ["parallel.pp=2"]), "dp x tp": (4, ["parallel.tp=2"]), "zero1": (2, ["engine=zero1"]),
    "zero1 x tp": (2, ["engine=zero1", "parallel.tp=2", "parallel.sequence_parallel=false"]), "zero2": (2, ["engine=zero2"]),
    "zero3": (2, ["engine=zero3"]), "fp16": (2, ["precision=fp16"]),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def deepspeed() -> None:
    import_deepspeed("zero1", torch.device("cpu"))  # once: forked ranks inherit it


def not_finite(run_dir: Path) -> list[str]:
    """Tensors of any checkpoint with a number that is not finite."""
    found = []
    for step in committed(run_dir / "checkpoints"):
        folder = step_folder(run_dir / "checkpoints", step)
        for name, saved in read(folder).tensors.items():
            assert saved.dtype in ("float32", "int64"), name
            found += [f"{name}, step {step}"] * (not np.isfinite(tensor(folder, saved)).all())
    return found


def skipped(corpus: Path, path: Path, layout: str) -> list[str]:
    """Go on past a gradient of the last rank in step 3 and a loss of it in step 5. What is not as it should be."""
    world, words = LAYOUTS[layout]
    cfg = config(corpus, path, *EVERY_STEP, *words, "fault.nonfinite=skip", world=world)
    arm = poison.both(poison.gradient(world - 1, 3), poison.loss(world - 1, 5))
    if codes := [code for code in run(cfg, world, arm=arm) if code]:
        return [f"exit codes {codes}"]
    same = {step: weights(path, step) == weights(path, step - 1) for step in range(2, 7)}
    logged = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [
        *(f"step {step}: weights {'un' * same[step]}changed" for step in same if same[step] != (step in (3, 5))),
        *not_finite(path),
        *(["the ledger"] if [row["step"] for row in ledger(path, "skip")] != [3, 5] else []),
        *(["the metrics"] if [row["step"] for row in logged if "skipped" in row] != [3, 5] or sorted(rows(path)) != [1, 2, 4, 6]
          else []),
    ]  # fmt: skip


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
def test_skip(layout: str, corpus: Path, tmp_path: Path) -> None:
    """One rank's numbers; all ranks leave out the same two steps. Weights, optimizer state and counters stay, bitwise."""
    assert skipped(corpus, tmp_path, layout) == []


@pytest.mark.parametrize(("layout", "what"), [
    ("one", poison.gradient), ("ddp", poison.loss), ("fsdp", poison.gradient), ("dp x tp", poison.gradient), ("pp", poison.loss),
    ("pp", poison.gradient), ("zero1", poison.gradient), ("zero2", poison.loss), ("zero3", poison.gradient), ("fp16", poison.loss),
])  # fmt: skip
def test_stop(
    layout: str, what: Callable[..., poison.Arm], corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """All ranks end in the same step, with the same words, before anything is applied; then the run goes on as if nothing had
    been."""
    world, words = LAYOUTS[layout]
    again, whole = (config(corpus, tmp_path / name, *EVERY_STEP, *words, "train.steps=4", world=world) for name in ("a", "w"))
    assert run(again, world, arm=what(world - 1, 3, value=float("inf"))) == [1] * world
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("failed")]
    assert len(lines) == world and len(set(lines)) == 1
    assert "step 3: loss " in lines[0] and "not finite" in lines[0] and "nothing of it was applied" in lines[0]
    assert committed(tmp_path / "a" / "checkpoints") == [1, 2] and not not_finite(tmp_path / "a")
    (failed,) = ledger(tmp_path / "a", "failed")
    assert failed["reason"] in lines[0] and sorted(rows(tmp_path / "a")) == [1, 2]
    assert run(again, world) == run(whole, world) == [0] * world
    assert rows(tmp_path / "a") == rows(tmp_path / "w") and weights(tmp_path / "a", 4) == weights(tmp_path / "w", 4)


def test_a_row_of_skips_ends_the_run(corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cfg = config(corpus, tmp_path, *EVERY_STEP, "fault.nonfinite=skip", "fault.max_skips=2", world=2)
    assert run(cfg, 2, arm=poison.loss(1, 2, 3, 4)) == [1, 1]
    assert capfd.readouterr().err.count("step 4: loss nan") == 2
    assert committed(tmp_path / "checkpoints") == [1, 2, 3] and [row["step"] for row in ledger(tmp_path, "skip")] == [2, 3]


# ---- spikes: the ninth batch is garbage

SPIKE = ["train.steps=14", "checkpoint.every=3", "checkpoint.keep_last=0", "train.eval_every=0", "model.dropout=0.1",
         "fault.sigma=3", "fault.window=6", "fault.warmup=4"]  # fmt: skip
BAD = poison.garbage(64)  # samples of the ninth step
ROLLBACK = {"one": (1, []), "fsdp": (2, ["engine=fsdp"]), "ddp": (2, []), "tp": (2, ["parallel.tp=2"]),
            "pp": (2, ["parallel.pp=2", "precision=bf16"]), "zero1": (2, ["engine=zero1"]), "zero3": (2, ["engine=zero3"]),
            "async": (2, ["checkpoint.async_save=true"])}  # fmt: skip


def spiking(corpus: Path, path: Path, spike: str, layout: str = "one") -> tuple[Any, int]:
    world, words = ROLLBACK[layout]
    return config(corpus, path, *SPIKE, f"fault.spike={spike}", *words, world=world), world


def extra(path: Path, step: int) -> dict[str, Any]:
    return dict(read(step_folder(path / "checkpoints", step)).extra)


def test_log(corpus: Path, tmp_path: Path) -> None:
    """It is said, and applied all the same."""
    for name, words in (("log", []), ("never", ["fault.sigma=1000"])):
        cfg = config(corpus, tmp_path / name, *SPIKE, *words, "train.steps=10")
        assert run(cfg, arm=BAD) == [0]
    (event,) = ledger(tmp_path / "log", "spike")
    found = rows(tmp_path / "log")
    assert event["step"] == 9 and f"loss {found[9][0]:.6g} is above" in event["reason"] and not ledger(tmp_path / "never", "spike")
    assert found == rows(tmp_path / "never") and weights(tmp_path / "log", 10) == weights(tmp_path / "never", 10)


@pytest.mark.parametrize("layout", ["one", "fsdp"])
def test_skip_a_spike(layout: str, corpus: Path, tmp_path: Path) -> None:
    """Nothing is applied, the data moves on, and the losses that others are measured against are the accepted ones."""
    cfg, world = spiking(corpus, tmp_path, "skip", layout)
    cfg.checkpoint.every = 1
    assert run(cfg, world, arm=BAD) == [0] * world
    (event,) = ledger(tmp_path, "skip")
    assert event["step"] == 9 and "is above" in event["reason"]
    assert weights(tmp_path, 8) == weights(tmp_path, 9) != weights(tmp_path, 10)
    assert extra(tmp_path, 9)["samples"] == 72 and extra(tmp_path, 9)["guard"]["skips"] == 1
    want = [rows(tmp_path)[step][0] for step in (8, 10, 11, 12, 13, 14)]
    assert extra(tmp_path, 14)["guard"] == {"losses": want, "skips": 0, "rollbacks": 0}


@pytest.fixture(scope="module")
def rolled_back(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A run of a layout with one rollback, never killed."""
    done: dict[str, Path] = {}

    def of(layout: str) -> Path:
        if layout not in done:
            path = tmp_path_factory.mktemp("whole") / layout
            cfg, world = spiking(corpus, path, "rollback", layout)
            assert run(cfg, world, arm=BAD) == [0] * world
            done[layout] = path
        return done[layout]

    return of


def _past_the_garbage(rank: Any) -> None:
    """Whatever the checkpoint says: the next sample is 72."""
    whole = BatchPlan.rebase
    BatchPlan.rebase = lambda self, step, consumed: whole(self, step, 72)  # type: ignore[method-assign]


def some(names: Iterable[str], fast: set[str]) -> list[Any]:
    return [pytest.param(name, marks=() if name in fast else pytest.mark.full) for name in names]


@pytest.mark.parametrize("layout", some(ROLLBACK, {"one", "fsdp", "pp", "zero1", "async"}))
def test_rollback(layout: str, corpus: Path, tmp_path: Path, rolled_back: Callable[[str], Path]) -> None:
    """As if the run had been started again by hand from the checkpoint before, with the samples after the garbage."""
    path = rolled_back(layout)
    (event,) = ledger(path, "rollback")
    assert (event["step"], event["to"], event["passed_over"]) == (9, 6, [48, 72]) and "is above" in event["reason"]
    assert sorted(rows(path)) == list(range(1, 15)), "every step once"
    assert extra(path, 6)["samples"] == 48 and extra(path, 9)["samples"] == 96 and extra(path, 14)["guard"]["rollbacks"] == 1
    cfg, world = spiking(corpus, tmp_path, "rollback", layout)
    cfg.train.steps, cfg.schedule.steps = 6, 14
    assert run(cfg, world) == [0] * world
    cfg.train.steps = 14
    assert run(cfg, world, arm=_past_the_garbage) == [0] * world
    assert not ledger(tmp_path, "rollback")
    assert rows(tmp_path) == rows(path) and weights(tmp_path, 14) == weights(path, 14)


KILLS = {
    "in the step that spikes": lambda on: poison.kill_in_step(on, 9),
    "before it is judged": lambda on: poison.kill(on, poison.TorchEngine, "norm", 9),
    "while it goes back": lambda on: poison.kill(on, poison.TorchEngine, "load", 1),
    "before the first step after it": lambda on: poison.kill_in_step(on, 10),
    "before the next checkpoint": lambda on: poison.kill_in_step(on, 12),
    "after the next checkpoint": lambda on: poison.kill_in_step(on, 13),
    "when it is to be recorded": lambda on: poison.kill(on, Rollback, "_record", 1),
    "when metrics are rewound": lambda on: poison.kill(0, RunDir, "rewind", 1),
}


def killed(corpus: Path, path: Path, layout: str, at: str, whole: Path) -> list[str]:
    """Kill a run with a rollback, let it go on; what differs from one that was never killed."""
    cfg, world = spiking(corpus, path, "rollback", layout)
    codes = run(cfg, world, arm=poison.both(BAD, KILLS[at](world - 1)))
    if -signal.SIGKILL not in codes:
        return [f"was not killed: {codes}"]
    if any(run(cfg, world, arm=BAD)):
        return ["did not go on"]
    facts = ("samples", "guard")
    return [
        *(["rows"] if rows(path) != rows(whole) else []),
        *(["weights"] if weights(path, 14) != weights(whole, 14) else []),
        *(["reason"] if len({row["reason"] for p in (path, whole) for row in ledger(p, "rollback")}) > 1 else []),
        *(fact for fact in facts if extra(path, 14).get(fact) != extra(whole, 14)[fact]),
    ]


QUICK = {("one", at) for at in KILLS} - {("one", "in the step that spikes")} | {("fsdp", "before the next checkpoint")}


@pytest.mark.parametrize(("layout", "at"), [pytest.param(layout, at, marks=() if (layout, at) in QUICK else pytest.mark.full)
                                            for layout in ("one", "fsdp") for at in KILLS])  # fmt: skip
def test_killed_and_resumed_is_never_killed(
    layout: str, at: str, corpus: Path, tmp_path: Path, rolled_back: Callable[[str], Path]
) -> None:
    assert killed(corpus, tmp_path, layout, at, rolled_back(layout)) == []


def test_rollbacks_are_bounded(corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Whatever comes after the first spike is one, too."""
    cfg, _ = spiking(corpus, tmp_path, "rollback")
    cfg.fault.max_rollbacks = 2
    assert run(cfg, arm=poison.loss(0, *range(9, 30), value=100.0)) == [1]
    found = [(row["step"], row["to"], row["passed_over"]) for row in ledger(tmp_path, "rollback")]
    assert found == [(9, 6, [48, 72]), (7, 6, [72, 80])]
    assert "step 7: loss" in (said := capfd.readouterr().err) and "after fault.max_rollbacks=2 rollbacks" in said
    assert committed(tmp_path / "checkpoints") == [3, 6]


def test_without_a_checkpoint_there_is_no_going_back(corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cfg, _ = spiking(corpus, tmp_path, "rollback")
    cfg.checkpoint.every = 10
    assert run(cfg, arm=BAD) == [1]
    assert "there is no checkpoint yet to go back to" in capfd.readouterr().err
    assert committed(tmp_path / "checkpoints") == []


def test_a_damaged_checkpoint_is_passed_over(corpus: Path, tmp_path: Path) -> None:
    """The newest one is damaged after it was written: back to the one before."""
    cfg, _ = spiking(corpus, tmp_path, "rollback")

    def damage(rank: Any) -> None:
        def spoil(*_: Any) -> None:
            file = next((tmp_path / "checkpoints" / "step_00000006").glob("*.safetensors"))
            content = bytearray(file.read_bytes())
            content[-1] ^= 1
            file.write_bytes(content)

        poison.around(poison.TorchEngine, "norm", {9: spoil}, before=True)

    assert run(cfg, arm=poison.both(BAD, damage)) == [0]
    (event,) = ledger(tmp_path, "rollback")
    assert (event["to"], event["passed_over"]) == (3, [24, 72]) and "step_00000006" in ledger(tmp_path, "corrupt_checkpoint")[0][
        "problem"
    ]
    assert sorted(rows(tmp_path)) == list(range(1, 15)) and resume.committed(tmp_path / "checkpoints") == [3, 6, 9, 12, 14]
