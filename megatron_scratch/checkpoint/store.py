"""Save and load: any layout's state into one set of global tensors, and out of it into any other's; collective, verified.

Nothing that is read can run: tensors are safetensors, all else is JSON, also between the ranks. No rank holds more of the model
than it trains, and each writes and hashes its share.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_scratch.checkpoint import manifest as manifests
from megatron_scratch.checkpoint import reading
from megatron_scratch.checkpoint.attempt import Attempt
from megatron_scratch.checkpoint.manifest import CorruptCheckpoint, File, Manifest
from megatron_scratch.checkpoint.plan import Offset, Plan, Planner, State, as_bytes, boxes
from megatron_scratch.checkpoint.shard import Slot, header, write_file
from megatron_scratch.parallel.collectives import gather_json
from megatron_scratch.parallel.topology import Topology
from megatron_scratch.util.errors import RunFailed, UserError

Views = dict[tuple[str, Offset], torch.Tensor]  # (name, where it begins) -> live memory


def save(root: Path, step: int, state: State, extra: dict[str, Any], topo: Topology, attempt: Attempt | None = None) -> Path:
    """Write `state` (every rank its share) and `extra` (JSON, rank 0's) as the checkpoint of `step`; collective.

    Args:
        attempt: the run's; None: one of its own.

    Raises:
        RunFailed: it could not be written, on every rank, with the first one's reason; the checkpoints before are whole.
    """
    if attempt is None:
        attempt = Attempt(root, on_main(lambda: Attempt.claim(root).number, topo, step))
    plan = Planner(topo).plan(state)
    stage(attempt, step, plan, topo)
    return commit(attempt, step, plan, write(attempt.staged(step), plan, state), extra, topo)


def stage(attempt: Attempt, step: int, plan: Plan, topo: Topology) -> None:
    """Make the folder to write into, if there is room for what is to come; collective."""

    def make() -> None:
        attempt.stage(step)
        free = shutil.disk_usage(attempt.folder).free
        if free < plan.bytes:
            raise OSError(f"no space left: it needs {plan.bytes / 2**30:.2f} GiB, and {attempt.root} has {free / 2**30:.2f} GiB")

    on_main(make, topo, step)


def write(folder: Path, plan: Plan, state: State) -> dict[str, Any]:
    """Write this rank's files. Returns {"files": name -> [bytes, sha256]}, or {"error": why not}."""
    views = views_of(state)
    try:
        return {"files": {name: _pair(write_file(folder / name, _contents(slots, views))) for name, slots in plan.files.items()}}
    except OSError as error:
        return {"error": str(error)}


def _pair(file: File) -> list[Any]:
    return [file.bytes, file.sha256]


def _contents(slots: list[Slot], views: Views) -> Iterator[memoryview]:
    """The bytes of a file, a chunk at a time: of a model on a device, no more than one chunk is on the host."""
    yield memoryview(header(slots)[0])
    for slot in slots:
        yield memoryview(as_bytes(views[slot.name, slot.offset]).cpu().numpy())


def views_of(state: State) -> Views:
    return {(name, offset): view for name, tensor in state.items() for offset, view in boxes(tensor)}


def commit(attempt: Attempt, step: int, plan: Plan, written: dict[str, Any], extra: dict[str, Any], topo: Topology) -> Path:
    """Write the manifest once every rank has written its files, and rename; collective. `written`: this rank's, from `write`."""
    answers = gather_json(written, topo)
    problem = next((answer["error"] for answer in answers if "error" in answer), "")
    if problem:
        raise _failed(step, problem)
    files = {name: File(*pair) for answer in answers for name, pair in answer["files"].items()}

    def seal() -> None:
        manifests.write(attempt.staged(step), Manifest(step, {**extra, "attempt": attempt.number}, files, plan.tensors))
        attempt.commit(step)

    on_main(seal, topo, step)
    return manifests.step_folder(attempt.root, step)


def on_main(work: Callable[[], Any], topo: Topology, step: int) -> Any:
    """Let the main rank do something, and every rank know the JSON that it returns, or that it failed; collective."""
    answer = {}
    if topo.is_main:
        try:
            answer = {"value": work()}
        except (OSError, RunFailed) as error:
            answer = {"error": str(error)}
    answer = gather_json(answer, topo)[0]
    if "error" in answer:
        raise _failed(step, answer["error"])
    return answer["value"]


def _failed(step: int, problem: str) -> RunFailed:
    return RunFailed(f"the checkpoint of step {step} could not be written ({' '.join(problem.split())}); "
                     "the ones before it are whole")  # fmt: skip


def shapes(manifest: Manifest) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (saved.shape, getattr(torch, saved.dtype)) for name, saved in manifest.tensors.items()}


def load(folder: Path, manifest: Manifest, state: State, topo: Topology, only: str = "") -> None:
    """Fill the tensors of `state` in place, whatever layout wrote them; strict both ways; collective.

    Every file is hashed as it is read: what is loaded is what was written, or nothing is kept.

    Args:
        only: a prefix; tensors of the checkpoint under other names are left alone (`model.`: weights without optimizer).

    Raises:
        UserError: names, shapes or dtypes differ: this checkpoint is of another model or optimizer.
        CorruptCheckpoint: on every rank, naming the first file that is not as it was written; `state` holds anything.
    """
    saved = {name: shape for name, shape in shapes(manifest).items() if name.startswith(only)}
    here = set(state) if topo.size("pp") == 1 else {name for stage in gather_json(sorted(state), topo, "pp") for name in stage}
    for names, where in ((sorted(set(saved) - here), "the checkpoint but not in this run"),
                         (sorted(set(state) - set(saved)), "this run but not in the checkpoint")):  # fmt: skip
        if names:
            raise UserError(f"{folder}: {len(names)} tensors are in {where}, e.g. {names[0]}; resume with the model and optimizer "
                            "that wrote it, or start a new run directory")  # fmt: skip
    for name in sorted(state):
        shape, dtype = saved[name]
        if (tuple(state[name].shape), state[name].dtype) != (shape, dtype):
            raise UserError(f"{folder}: {name} is {dtype} {list(shape)} in the checkpoint and {state[name].dtype} "
                            f"{list(state[name].shape)} in this run")  # fmt: skip
    problem = ""
    try:
        reading.fill(folder, manifest, state)
    except CorruptCheckpoint as error:
        problem = str(error)
    if problem := next((found for found in gather_json(problem, topo) if found), ""):
        raise CorruptCheckpoint(problem)
