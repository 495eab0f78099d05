"""A run that is killed again and again, and started again, against one that never was."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from points import kill
from runs import config, ledger, rows, run

from megatron_scratch.checkpoint.manifest import CorruptCheckpoint, committed, step_folder, verify
from megatron_scratch.util.env import Rank

STEPS = 7
# Dropout on, or a lost random state would not show; a checkpoint every 2nd step and one kept, so that retention is at work too.
BASE = [f"train.steps={STEPS}", "checkpoint.every=2", "checkpoint.keep_last=1", "model.dropout=0.1", "train.eval_every=3",
        "train.micro_batch_size=4", "model.num_layers=1"]  # fmt: skip

Mutation = Callable[[], None]


@dataclass(frozen=True)
class Kill:
    point: str
    rank: int = 0
    nth: int = 1


@dataclass(frozen=True)
class Layout:
    world: int
    overrides: tuple[str, ...] = ()


def tensors(run_dir: Path, step: int) -> dict[str, object]:
    """Everything that a checkpoint says and holds, but for when and by which start it was written."""
    manifest = verify(step_folder(run_dir / "checkpoints", step))
    told = {key: value for key, value in manifest.extra.items() if key not in ("attempt", "written")}
    return {**told, "files": {name: file.sha256 for name, file in manifest.files.items()}}


def unreadable(run_dir: Path) -> list[str]:
    """What is wrong with the checkpoints under committed names."""
    out = []
    for step in committed(run_dir / "checkpoints"):
        try:
            verify(step_folder(run_dir / "checkpoints", step))
        except CorruptCheckpoint as error:
            out.append(f"unreadable: {error}")
    return out


def suffer(corpus: Path, run_dir: Path, layout: Layout, kills: list[Kill], mutate: Mutation | None = None) -> tuple[int, list[str]]:
    """Start a run as often as it is killed, and once more. (kills that happened, what was wrong on the way)."""
    cfg = config(corpus, run_dir, *BASE, *layout.overrides, world=layout.world)
    problems: list[str] = []
    happened = 0
    for victim in [*kills, None]:

        def arm(rank: Rank, victim: Kill | None = victim) -> None:
            if mutate is not None:
                mutate()
            if victim is not None and rank.rank == victim.rank:
                kill(victim.point, victim.nth)

        before = committed(run_dir / "checkpoints")
        codes = run(cfg, layout.world, arm=arm)
        if -signal.SIGKILL in codes:
            happened += 1
            problems += unreadable(run_dir)
            after = committed(run_dir / "checkpoints")
            if 0 in codes and STEPS not in after:  # once all is saved, nobody waits for whoever dies while writing the last line
                problems.append(f"finished in spite of a dead rank: {codes}, with steps {after}")
            told = [e["step"] for e in ledger(run_dir, "save")] if (run_dir / "ledger.jsonl").exists() else []
            if max([*before, *told], default=0) > max(after, default=0):
                problems.append(f"steps {before} were there, {told} were said to be saved, and {after} are left")
        elif codes != [0] * layout.world:
            return happened, [*problems, f"a start ended with {codes}"]
        resumed = ledger(run_dir, "resume") if (run_dir / "ledger.jsonl").exists() else []
        if before and codes == [0] * layout.world and (not resumed or resumed[-1]["step"] != max(before)):
            problems.append(f"went on from {resumed[-1:]}, not from step {max(before)}")
    return happened, problems


def differences(run_dir: Path, whole: Path) -> list[str]:
    """In what a run that went through `suffer` is not the one that was never killed."""
    out = []
    try:
        mine, theirs = rows(run_dir), rows(whole)
    except AssertionError as error:
        return [str(error)]
    out += [f"step {s}: {mine.get(s)} instead of {theirs[s]}" for s in theirs if mine.get(s) != theirs[s]]
    steps = committed(run_dir / "checkpoints")
    if steps != committed(whole / "checkpoints"):
        return [*out, f"checkpoints {steps} instead of {committed(whole / 'checkpoints')}"]
    return out + [f"step {s}: another state" for s in steps if tensors(run_dir, s) != tensors(whole, s)]
