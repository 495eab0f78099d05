"""Where a run goes on: the newest whole checkpoint, the same sample, the same optimizer state, or a clear refusal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_scratch.checkpoint import store
from megatron_scratch.checkpoint.attempt import set_aside
from megatron_scratch.checkpoint.manifest import CorruptCheckpoint, Manifest, committed, read, step_folder
from megatron_scratch.config import Config
from megatron_scratch.engine import Engine
from megatron_scratch.parallel import Topology
from megatron_scratch.parallel.collectives import gather_json
from megatron_scratch.train.batches import BatchPlan
from megatron_scratch.train.metrics import View
from megatron_scratch.train.rundir import RunDir
from megatron_scratch.train.scaler import LossScaler
from megatron_scratch.util.errors import RunFailed, UserError


def resume(
    cfg: Config, run_dir: RunDir, engine: Engine, plan: BatchPlan, facts: dict[str, Any], topo: Topology, view: View,
    scaler: LossScaler | None = None,
) -> int | None:  # fmt: skip
    """Load what `checkpoint.resume` says into the engine and the loss scaler; collective.

    Returns:
        The step to go on from, None where the run begins.

    Raises:
        UserError: the checkpoint is of another model, data or seed; or there is one where `never` was asked for.
        RunFailed: every checkpoint of the run is corrupt.
    """
    folders, own = find(cfg, run_dir, topo)
    if not folders:
        return None

    def into_engine(folder: Path, manifest: Manifest) -> None:
        refuse_other_run(folder, manifest, facts)
        engine.load(store.shapes(manifest), lambda state: store.load(folder, manifest, state, topo))

    folder, manifest, problems = first_whole(folders, into_engine, topo)
    for corrupt, problem in problems.items():
        view.say(f"passed over a corrupt checkpoint: {problem}")
        if topo.is_main:
            moved = str(set_aside(corrupt)) if own else None
            run_dir.record("corrupt_checkpoint", problem=problem, moved_to=moved)
    step = manifest.step
    plan.rebase(step, int(manifest.extra["samples"]))
    if scaler is not None and "scaler" in manifest.extra:  # it is not in one of another precision
        scaler.load(manifest.extra["scaler"])
    if topo.is_main:
        run_dir.rewind(step)
        run_dir.record("resume", step=step, path=str(folder), samples=manifest.extra["samples"])
    view.say(f"resuming after step {step} from {folder}")
    return step


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
    """Compare what a checkpoint remembers with what this run is."""
    for key, mine in facts.items():
        saved = manifest.extra.get(key)
        if saved == mine:
            continue
        if isinstance(mine, dict) and isinstance(saved, dict):
            field = next(k for k in mine if mine.get(k) != saved.get(k))
            key, mine, saved = f"{key}.{field}", mine.get(field), saved.get(field)
        raise UserError(f"{key} is {mine!r} here, but {saved!r} in {folder}: the run cannot go on as the same run; "
                        "set it back, or start in another dir=")  # fmt: skip
