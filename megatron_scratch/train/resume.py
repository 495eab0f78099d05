"""Where a run goes on: the newest whole checkpoint, the same sample, the same optimizer state, or a clear refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_scratch.checkpoint import store
from megatron_scratch.checkpoint.manifest import Manifest, committed, read
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
) -> int:  # fmt: skip
    """Load what `checkpoint.resume` says into the engine and the loss scaler. Returns the step to go on from; collective.

    Raises:
        UserError: the checkpoint is of another model, data or seed; or there is one where `never` was asked for.
        RunFailed: every checkpoint of the run is corrupt.
    """
    folder = find(cfg, run_dir, topo, view)
    if folder is None:
        return 0
    manifest = read(folder)
    refuse_other_run(folder, manifest, facts)
    engine.load(store.shapes(manifest), lambda state: store.load(folder, manifest, state, topo))
    step = manifest.step
    plan.rebase(step, int(manifest.extra["samples"]))
    if scaler is not None and "scaler" in manifest.extra:  # it is not in one of another precision
        scaler.load(manifest.extra["scaler"])
    if topo.is_main:
        run_dir.rewind(step)
        run_dir.record("resume", step=step, path=str(folder), samples=manifest.extra["samples"])
    view.say(f"resuming after step {step} from {folder}")
    return step


def find(cfg: Config, run_dir: RunDir, topo: Topology, view: View) -> Path | None:
    """The checkpoint to load, the same on every rank. The run's own come before the one that it started from."""
    where = cfg.checkpoint.resume
    # Every rank waits for the main one, which makes the folder.
    own = gather_json(committed(run_dir.checkpoints), topo)[0]
    if where == "never" and own:
        raise UserError(f"checkpoint.resume=never, but {run_dir.path} already has checkpoints (step {own[-1]}); "
                        "give another dir=, or resume=auto to go on")  # fmt: skip
    if where in ("auto", "never") or own:
        return newest(run_dir.checkpoints, topo, view, run_dir) if own else None
    return named(Path(where), topo)


def newest(root: Path, topo: Topology, view: View | None = None, run_dir: RunDir | None = None) -> Path:
    """The newest whole checkpoint. In the run's own directory, corrupt newer ones are said, recorded, and set aside."""
    folder, problems = store.newest_valid(root, topo)
    if folder is None:
        raise RunFailed(
            f"every checkpoint in {root} is corrupt: {next(iter(problems.values()))}; restore one, or start in another dir="
        )
    for corrupt, problem in problems.items():
        if view is not None:
            view.say(f"passed over a corrupt checkpoint: {problem}")
        if run_dir is not None and topo.is_main:
            run_dir.record("corrupt_checkpoint", problem=problem, moved_to=str(store.set_aside(corrupt)))
    return folder


def named(path: Path, topo: Topology) -> Path:
    """A checkpoint that the user named: its own folder, or the newest of a run directory."""
    if (path / "manifest.json").is_file():
        if problem := store.find_problem(path, topo):
            raise RunFailed(f"the checkpoint is corrupt: {problem}; name another")
        return path
    root = path / "checkpoints"
    if not committed(root):
        raise UserError(f"{path} is neither a checkpoint (it has no manifest.json) nor a run directory with checkpoints")
    return newest(root, topo)


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
