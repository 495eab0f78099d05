"""Killed anywhere, a run goes on by itself, bitwise equal to one that never was; and bugs that would break this are seen.

By default at least 46 kills (two in each of 23 scenarios) over all points, on one and two ranks, synchronous and
asynchronous; `--full`: 500, drawn.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kills import BASE, Kill, Layout, differences, suffer
from points import POINTS, count, owner_of, wrap
from runs import config, run

LAYOUTS = {
    "one": Layout(1),
    "two": Layout(2),
    "async": Layout(1, ("checkpoint.async_save=true",)),
    "async_two": Layout(2, ("checkpoint.async_save=true",)),
}
ONLY_MAIN = {"claim", "claim.sweep", "load.done", "config", "metrics", "ledger", "save.stage", "save.manifest",
             "save.manifest.done", "save.rename", "save.renamed", "retire", "retire.rename"}  # fmt: skip
ONLY_SYNC = {"save.file", "save.file.half", "save.file.fsync", "save.file.done"}
ONLY_ASYNC = {"copy", "copy.done", "poll.answer"}
ONCE = {"claim", "claim.sweep", "load.manifest", "load.file", "load.done", "config"}  # a start
ONLY_RESUMED = {"claim.sweep", "load.manifest", "load.file", "load.done"}


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Never killed, once for each number of ranks; how the checkpoints are written must not matter."""
    root = tmp_path_factory.mktemp("whole")
    for world in (1, 2):
        assert run(config(corpus, root / str(world), *BASE, world=world), world) == [0] * world
    yield {name: root / str(layout.world) for name, layout in LAYOUTS.items()}


def drawn(rng: random.Random, point: str, world: int, calls: tuple[int, ...]) -> Kill:
    return Kill(point, 0 if point in ONLY_MAIN else rng.randrange(world), rng.choice(calls))


def scenarios() -> list[Any]:
    """Every point at least once; the starts of one run die one after the other, so that recovering dies too."""
    rng = random.Random(5)
    out = []
    for name, layout in LAYOUTS.items():
        wrong = ONLY_SYNC if "async" in name else ONLY_ASYNC
        points = [p for p in POINTS if p not in wrong]
        rng.shuffle(points)
        points = [p for p in points if p not in ONLY_RESUMED] if name != "two" else points
        points = points if name in ("two", "async_two") else points[:3]
        for at in range(0, len(points), 3):
            some = points[at : at + 3]
            victims = [drawn(rng, p, layout.world, (1,) if p in ONCE else (1, 2)) for p in some]
            # A first kill late enough that there is something to go back to.
            out.append(pytest.param(name, [Kill("update", layout.world - 1, 4), *victims], id=f"{name}-{'-'.join(some)}"))
    return out


@pytest.mark.parametrize(("layout", "victims"), scenarios())
def test_killed_again_and_again(layout: str, victims: list[Kill], corpus: Path, tmp_path: Path, whole: dict[str, Path]) -> None:
    happened, problems = suffer(corpus, tmp_path / "r", LAYOUTS[layout], victims)
    assert problems + differences(tmp_path / "r", whole[layout]) == []
    assert happened >= 2, "most of them are there to happen"


def test_every_point_is_come_to(corpus: Path, tmp_path: Path) -> None:
    """A point that has been renamed away would kill nobody."""
    came: set[str] = set()
    for name, overrides in (("sync", ()), ("async", ("checkpoint.async_save=true",))):
        for steps in (4, 7):
            cfg = config(corpus, tmp_path / name, *BASE, *overrides, f"train.steps={steps}", "schedule.steps=7")
            folder = tmp_path / f"{name}{steps}"
            folder.mkdir()
            assert run(cfg, arm=lambda rank, folder=folder: count(rank, folder)) == [0]
            came |= set(json.loads((folder / "0.json").read_text()))
    assert came == set(POINTS)


@pytest.mark.full
def test_500_kills(corpus: Path, tmp_path: Path, whole: dict[str, Path]) -> None:
    rng, happened, number, problems = random.Random(0), 0, 0, []
    while happened < 500:
        name = rng.choice(list(LAYOUTS))
        victims = [drawn(rng, p, LAYOUTS[name].world, (1, 1, 1, 2, 2, 3, 4, 5)) for p in rng.choices(list(POINTS), k=4)]
        died, wrong = suffer(corpus, tmp_path / str(number), LAYOUTS[name], victims)
        wrong += differences(tmp_path / str(number), whole[name])
        problems += [f"{name} {victims}: {w}" for w in wrong]
        happened, number = happened + died, number + 1
    print(f"{happened} kills in {number} runs, {len(problems)} problems")
    assert problems == [], "\n".join(problems)


# Deliberate bugs. Each is put into every start of a run that is killed once; the harness has to see it.


def in_place() -> None:
    """Written under its final name."""
    from megatron_scratch.checkpoint import attempt
    from megatron_scratch.checkpoint.manifest import step_folder

    attempt.Attempt.staged = lambda self, step: step_folder(self.root, step)  # type: ignore[method-assign]
    attempt.Attempt.commit = lambda self, step: self.staged(step)  # type: ignore[method-assign]


def manifest_first() -> None:
    """Committed without waiting for the other ranks' files."""

    def commit(original: Any, attempt: Any, step: int, plan: Any, written: Any, extra: Any, topo: Any) -> Any:
        from megatron_scratch.checkpoint import manifest as manifests
        from megatron_scratch.checkpoint.manifest import Manifest

        if topo.is_main:
            manifests.write(attempt.staged(step), Manifest(step, extra, {}, plan.tensors))
            attempt.commit(step)
        return original(attempt, step, plan, written, extra, topo)

    wrap("megatron_scratch.checkpoint.store:commit", commit)


def no_optimizer_state() -> None:
    """Moments start again at zero."""

    def fill(original: Any, folder: Path, manifest: Any, state: dict[str, Any]) -> None:
        original(folder, manifest, {name: t for name, t in state.items() if "exp_avg" not in name})

    wrap("megatron_scratch.checkpoint.reading:fill", fill)


def sample_off_by_one() -> None:
    wrap("megatron_scratch.train.batches:BatchPlan.rebase",
         lambda original, self, step, consumed: original(self, step, consumed + (1 if consumed else 0)))  # fmt: skip


def another_dropout() -> None:
    """Masks that depend on how long this process has been running."""
    seen = [0]

    def seed(original: Any, *parts: object) -> int:
        seen[0] += 1
        return original(*parts, seen[0])  # type: ignore[no-any-return]

    wrap("megatron_scratch.train.step:seed_from", seed)


def schedule_from_the_start() -> None:
    """The learning rate counts the steps of this process."""

    def learning_rate(original: Any, cfg: Any) -> Any:
        at, first = original(cfg), []

        def rate(step: int) -> float:
            first.append(step)
            return at(step - first[0])  # type: ignore[no-any-return]

        return rate

    wrap("megatron_scratch.train.build:learning_rate", learning_rate)


def metrics_not_rewound() -> None:
    wrap("megatron_scratch.train.rundir:RunDir.rewind", lambda original, self, step: None)


def the_oldest() -> None:
    """Goes on from the oldest checkpoint: right numbers, lost work."""

    def find(original: Any, *args: Any) -> Any:
        folders, own = original(*args)
        return folders[::-1], own

    wrap("megatron_scratch.train.resume:find", find)


def deletes_before_it_commits() -> None:
    """Retention makes room before the new one is there."""

    def stage(original: Any, self: Any, step: int) -> Any:
        import shutil

        from megatron_scratch.checkpoint.manifest import committed, step_folder

        for old in committed(self.root):
            shutil.rmtree(step_folder(self.root, old))
        return original(self, step)

    wrap("megatron_scratch.checkpoint.attempt:Attempt.stage", stage)


def half_the_weights_of_the_step_before() -> None:
    """A snapshot that is still being taken while the weights change: some tensors are a step older than others."""
    import torch

    kept: dict[str, torch.Tensor] = {}

    def views(original: Any, state: Any) -> Any:
        out = original(state)
        for key in sorted(out)[::2]:
            if key in kept and kept[key].shape == out[key].shape:
                out[key] = kept[key]
        kept.update({key: view.clone() for key, view in original(state).items()})
        return out

    wrap("megatron_scratch.checkpoint.store:views_of", views)


def copies_too_late() -> None:
    """An asynchronous save takes its copy after the next update has begun."""
    waiting: list[Any] = []

    def poll(original: Any, self: Any, wait: bool = False) -> Any:
        while waiting:
            waiting.pop()()
        return original(self, wait)

    wrap("megatron_scratch.checkpoint.saver:Saver._hand_over", lambda original, *args: waiting.append(lambda: original(*args)))
    wrap("megatron_scratch.checkpoint.saver:Saver.poll", poll)


MUTANTS = {
    copies_too_late: ("async", Kill("update", 0, 6)),
    in_place: ("two", Kill("save.file.half", 1, 3)),
    manifest_first: ("two", Kill("save.commit", 1, 2)),
    no_optimizer_state: ("one", Kill("update", 0, 4)),
    sample_off_by_one: ("one", Kill("update", 0, 4)),
    another_dropout: ("one", Kill("update", 0, 4)),
    schedule_from_the_start: ("one", Kill("update", 0, 4)),
    metrics_not_rewound: ("one", Kill("update", 0, 4)),
    the_oldest: ("one", Kill("retire", 0, 2)),
    deletes_before_it_commits: ("one", Kill("save.file", 0, 2)),
    half_the_weights_of_the_step_before: ("one", Kill("update", 0, 6)),
}


@pytest.mark.parametrize("mutate", MUTANTS, ids=lambda m: m.__name__)
def test_a_bug_is_seen(mutate: Any, corpus: Path, tmp_path: Path, whole: dict[str, Path]) -> None:
    layout, victim = MUTANTS[mutate]
    happened, problems = suffer(corpus, tmp_path / "r", LAYOUTS[layout], [victim], mutate)
    assert problems + differences(tmp_path / "r", whole[layout]), mutate.__name__


def test_mutants_find_what_they_change() -> None:
    """Every function that this file replaces is there to be replaced."""
    for point in POINTS.values():
        owner, name = owner_of(point.where)
        assert callable(getattr(owner, name)), point.where
