"""The tests of faults are worth what they catch: bugs, put in one at a time, and each is seen. Forked ranks inherit them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import poison
import pytest
from runs import run
from test_guard_runs import BAD, killed, skipped, spiking
from test_replica_runs import UP, found

from megatron_scratch.engine.torch_engine import TorchEngine
from megatron_scratch.train import replicas, rollback, saving, step
from megatron_scratch.train.guard import Guard

Patch = Callable[[pytest.MonkeyPatch], None]


def replace(owner: Any, name: str, new: Any) -> Patch:
    return lambda patch: patch.setattr(owner, name, new)


def at_once(self: TorchEngine, scale: float | None = None) -> Any:
    """Update first, look at the norm then."""
    before = norm(self, scale)
    update(self, 1e-2, before)
    return before


norm, update, checksum, load = TorchEngine.norm, TorchEngine.update, replicas.checksum, Guard.load
SKIPS: list[tuple[str, Patch, str, str]] = [  # name, mutant, layout, what must be among the findings
    ("each rank decides by its own loss", replace(step, "all_reduce_world", lambda x, topo: x if len(x) == 3 else summed(x, topo)),
     "fsdp", "step 5: weights changed"),
    ("each rank decides by its own norm", replace(step, "shared_numbers", lambda part, norm, topo: (1.0, float(norm))),
     "ddp", "exit codes"),
    ("the norm of another rank is not asked for", replace(step, "math", SimpleNamespace(isfinite=lambda x: True)), "ddp",
     "exit codes"),
    ("the update is applied before it is judged", replace(TorchEngine, "norm", at_once), "ddp", "exit codes"),
    ("a dropped step counts", replace(TorchEngine, "drop", lambda self: count(self)), "ddp", "step 3: weights changed"),
]  # fmt: skip
summed = step.all_reduce_world


def count(engine: TorchEngine) -> None:
    for parameter in (*engine.named.values(), *engine.plain.values()):
        parameter.grad = None
    for state in engine.optimizer.state.values():
        state["step"] += 1


@pytest.mark.parametrize(("mutant", "layout", "finding"), [m[1:] for m in SKIPS], ids=[m[0] for m in SKIPS])
def test_skips(mutant: Patch, layout: str, finding: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(monkeypatch)
    problems = skipped(corpus, tmp_path, layout)
    assert any(problem.startswith(finding) for problem in problems), problems


def forget(self: Guard, extra: Any) -> None:
    load(self, {})


def forget_newest(self: Guard, extra: Any) -> None:
    load(self, {**extra, "guard": {**extra["guard"], "losses": extra["guard"]["losses"][:-1]}})


ROLLBACKS: list[tuple[str, Patch, str]] = [
    ("a guard does not come back", replace(Guard, "load", forget), "while it goes back"),
    ("a guard comes back without its newest loss", replace(Guard, "load", forget_newest), "while it goes back"),
    ("a guard is not saved", replace(Guard, "state", lambda self: {}), "before the next checkpoint"),
]


@pytest.mark.parametrize(("mutant", "at"), [m[1:] for m in ROLLBACKS], ids=[m[0] for m in ROLLBACKS])
def test_rollbacks(mutant: Patch, at: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a healthy run that was never killed."""
    cfg, world = spiking(corpus, tmp_path / "whole", "rollback")
    assert run(cfg, world, arm=BAD) == [0]
    mutant(monkeypatch)
    assert killed(corpus, tmp_path / "killed", "one", at, tmp_path / "whole")


def test_the_same_data_again(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rollback that forgets to pass over the samples comes to the same spike until it is stopped."""
    monkeypatch.setattr(rollback.BatchPlan, "rebase", lambda *_: None)
    cfg, world = spiking(corpus, tmp_path, "rollback")
    assert run(cfg, world, arm=BAD) == [1]


FLIPS: list[tuple[str, Patch]] = [
    ("a checksum that misses the sign", replace(replicas, "checksum", lambda t: checksum(t.abs()))),
    ("a checksum of numbers rounded to bf16", replace(replicas, "checksum", lambda t: checksum(t.bfloat16()))),
    ("copies are compared after the commit", replace(saving, "check_replicas", lambda *_: None)),
    ("every rank looks at itself", replace(replicas, "gather_json", lambda value, *_: [value])),
]


@pytest.mark.parametrize(("name", "mutant"), FLIPS, ids=[m[0] for m in FLIPS])
def test_flips(name: str, mutant: Patch, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sign, or the lowest bit, that `test_the_lowest_bit_and_the_sign_just_before_a_commit` asks for is then committed."""
    mutant(monkeypatch)
    _, steps, _ = found(corpus, tmp_path, 2, poison.flip(1, 6, UP, *((0, 0) if "bf16" in name else (3, 7))))
    assert 6 in steps
