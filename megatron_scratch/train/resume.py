"""Where a run goes on: the newest whole checkpoint, the same sample, the same optimizer state, or a clear refusal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_scratch.checkpoint import store
from megatron_scratch.checkpoint.attempt import set_aside
from megatron_scratch.checkpoint.manifest import CorruptCheckpoint, Manifest, committed, read, step_folder
from megatron_scratch.config import Config
from megatron_scratch.engine import Engine
from megatron_scratch.parallel import Topology
from megatron_scratch.parallel.collectives import gather_json
from megatron_scratch.train import build
from megatron_scratch.train.batches import BatchPlan
from megatron_scratch.train.console import View
from megatron_scratch.train.guarantee import WRITTEN_BY, guarantee
from megatron_scratch.train.guard import Guard
from megatron_scratch.train.rundir import RunDir
from megatron_scratch.util.errors import RunFailed, UserError

IMPORTED = "imported"  # a key of checkpoints that no run has written: weights, and nothing else


def resume(
    cfg: Config, run_dir: RunDir, engine: Engine, plan: BatchPlan, facts: dict[str, Any], topo: Topology, view: View,
    guard: Guard, remembered: Callable[[Mapping[str, Any], bool], None] = lambda extra, own: None,
) -> int | None:  # fmt: skip
    """Load what `checkpoint.resume` says into the engine, the guard and its loss scaler; collective.

    Args:
        remembered: is called with the JSON of the checkpoint, and whether that is the run's own.

    Returns:
        The step to go on from, None where the run begins.

    Raises:
        UserError: the checkpoint is of another model, data or seed; or there is one where `never` was asked for.
        RunFailed: every checkpoint of the run is corrupt.
    """
    folders, own = find(cfg, run_dir, topo)
    if not folders:
        if topo.is_main:
            run_dir.rewind(0)  # of a start that was killed before its first checkpoint
        return None
    folder, manifest = _load_newest(folders, own, run_dir, engine, facts, topo, view)
    step = manifest.step
    plan.rebase(step, int(manifest.extra["samples"]))
    guard.load(manifest.extra)
    remembered(manifest.extra, own)
    holds = guarantee(manifest.extra.get(WRITTEN_BY), build.written_by(cfg, topo))
    if IMPORTED in manifest.extra:
        holds = "the weights of an imported model, no optimizer state"
    if topo.is_main:
        run_dir.rewind(step)
        run_dir.record("resume", step=step, path=str(folder), samples=manifest.extra["samples"], guarantee=holds)
    view.say(f"resuming after step {step} from {folder}: {holds}")
    return step


def go_back(run_dir: RunDir, engine: Engine, facts: dict[str, Any], topo: Topology, view: View, guard: Guard) -> int | None:
    """Load the run's newest whole checkpoint into the engine, the guard and its loss scaler; collective.

    Returns:
        Its step, None where there is none.
    """
    steps = gather_json(committed(run_dir.checkpoints), topo)[0]
    if not steps:
        return None
    folders = [step_folder(run_dir.checkpoints, step) for step in reversed(steps)]
    _, manifest = _load_newest(folders, True, run_dir, engine, facts, topo, view)
    guard.load(manifest.extra)
    return manifest.step


def _load_newest(folders: list[Path], own: bool, run_dir: RunDir, engine: Engine, facts: dict[str, Any], topo: Topology,
                 view: View) -> tuple[Path, Manifest]:  # fmt: skip
    """Load the first of `folders` that is whole. Those before it are said, recorded, and set aside if they are the run's `own`."""

    def into_engine(folder: Path, manifest: Manifest) -> None:
        refuse_other_run(folder, manifest, facts)
        only = "model." if IMPORTED in manifest.extra else ""

        def fill(state: dict[str, Any]) -> None:
            store.load(folder, manifest, {k: v for k, v in state.items() if k.startswith(only)}, topo, only)

        engine.load(store.shapes(manifest), fill)

    folder, manifest, problems = first_whole(folders, into_engine, topo)
    for corrupt, problem in problems.items():
        view.say(f"passed over a corrupt checkpoint: {problem}")
        if topo.is_main:
            moved = str(set_aside(corrupt)) if own else None
            run_dir.record("corrupt_checkpoint", problem=problem, moved_to=moved)
    return folder, manifest


def find(cfg: Config, run_dir: RunDir, topo: Topology) -> tuple[list[Path], bool]:
    """The checkpoints to try, newest first, the same on every rank, and whether they are the run's own: these come before the
    one that it started from."""
    where = cfg.checkpoint.resume
    own = gather_json(committed(run_dir.checkpoints), topo)[0]
    if where == "never" and own:
        raise UserError(f"checkpoint.resume=never, but {run_dir.path} already has checkpoints (step {own[-1]}); "
                        "give another dir=, or resume=auto to go on")  # fmt: skip
    if where in ("auto", "never") or own:
        return [step_folder(run_dir.checkpoints, step) for step in reversed(own)], True
    return named(Path(where)), False


def named(path: Path) -> list[Path]:
    """What a user named: one checkpoint's own folder, or all of a run directory, newest first."""
    if (path / "manifest.json").is_file():
        return [path]
    root = path / "checkpoints"
    if not committed(root):
        raise UserError(f"{path} is neither a checkpoint (it has no manifest.json) nor a run directory with checkpoints")
    return [step_folder(root, step) for step in reversed(committed(root))]


def first_whole(
    folders: list[Path], load: Callable[[Path, Manifest], None], topo: Topology
) -> tuple[Path, Manifest, dict[Path, str]]:
    """Let `load` try one checkpoint after the other until one is as it was written; collective. Returns it, and what was
    wrong with the others.

    What a failed try has left in the model, the next one overwrites.

    Raises:
        RunFailed: none is whole.
    """
    problems: dict[Path, str] = {}
    for folder in folders:
        try:
            manifest = _read(folder, topo)
            load(folder, manifest)
            return folder, manifest, problems
        except CorruptCheckpoint as error:
            problems[folder] = str(error)
    first = next(iter(problems.values()))
    if len(folders) == 1:
        raise RunFailed(f"the checkpoint is corrupt: {first}; name another, or start in another dir=")
    raise RunFailed(f"every checkpoint in {folders[0].parent} is corrupt: {first}; restore one, or start in another dir=")


def _read(folder: Path, topo: Topology) -> Manifest:
    """The manifest, if every rank can read it."""
    problem, manifest = "", None
    try:
        manifest = read(folder)
    except CorruptCheckpoint as error:
        problem = str(error)
    if problem := next((found for found in gather_json(problem, topo) if found), ""):
        raise CorruptCheckpoint(problem)
    assert manifest is not None
    return manifest


def refuse_other_run(folder: Path, manifest: Manifest, facts: dict[str, Any]) -> None:
    """Compare what a checkpoint remembers with what this run is. An imported one is of a model, and maybe of a tokenizer."""
    if IMPORTED in manifest.extra:
        facts = {key: facts[key] for key in ("model", "tokenizer") if manifest.extra.get(key) is not None}
    for key, mine in facts.items():
        saved = manifest.extra.get(key)
        if saved == mine:
            continue
        if isinstance(mine, dict) and isinstance(saved, dict):
            field = next(k for k in mine if mine.get(k) != saved.get(k))
            key, mine, saved = f"{key}.{field}", mine.get(field), saved.get(field)
        raise UserError(f"{key} is {mine!r} here, but {saved!r} in {folder}: the run cannot go on as the same run; "
                        "set it back, or start in another dir=")  # fmt: skip
