"""Checkpoints of one run: committed by one rename, listed by step, kept by rule.

A folder `checkpoints/step_XXXXXXXX` under that name is whole: it is written as `.step_XXXXXXXX.tmp`, every file and the
manifest are made durable, then it is renamed and the rename made durable. A crash at any point leaves the older
checkpoints as they were and at most a `.tmp` folder, which the next save removes.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from megatron_scratch.checkpoint.manifest import CorruptCheckpoint, Manifest, committed, step_folder, verify
from megatron_scratch.checkpoint.storage import Reader, Writer
from megatron_scratch.config.train import CheckpointConfig
from megatron_scratch.parallel.collectives import barrier, gather_json
from megatron_scratch.parallel.topology import Topology
from megatron_scratch.util.errors import RunFailed, UserError
from megatron_scratch.util.files import fsync_dir

State = dict[str, torch.Tensor]


def save(root: Path, step: int, state: State, extra: dict[str, Any], topo: Topology) -> Path:
    """Write `state` (every rank its part) and `extra` (JSON, rank 0's) as the checkpoint of `step`; collective."""
    final, tmp = step_folder(root, step), root / f".{step_folder(root, step).name}.tmp"
    if topo.is_main:
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
    barrier(topo)
    writer = Writer(tmp, topo.rank, step, extra)
    try:
        with _quiet():
            dcp.save(state, storage_writer=writer, no_dist=topo.world == 1)
        if topo.is_main:
            tmp.rename(final)
            fsync_dir(root)
    except (CheckpointException, OSError) as error:  # DCP's is a BaseException that holds what each rank raised
        raise RunFailed(
            f"the checkpoint of step {step} could not be written ({_reason(error)}); the ones before it are whole"
        ) from error
    barrier(topo)
    return final


def _reason(error: BaseException) -> str:
    """The first rank's own words, in one line."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return " ".join(str(error).split())


@contextmanager
def _quiet() -> Iterator[None]:
    """DCP warns that a process group is missing although `no_dist` says so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def newest_valid(root: Path, topo: Topology) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint whose every file is as written, and {newer folder: what is wrong with it}; collective."""
    problems: dict[Path, str] = {}
    for step in reversed(committed(root)):
        folder = step_folder(root, step)
        if not (problem := find_problem(folder, topo)):
            return folder, problems
        problems[folder] = problem
    return None, problems


def find_problem(folder: Path, topo: Topology) -> str:
    """What is wrong with a checkpoint, or an empty string; collective: the ranks share the files and agree on the answer."""
    problem = ""
    try:
        verify(folder, topo.rank, topo.world)
    except CorruptCheckpoint as error:
        problem = str(error)
    return next((found for found in gather_json(problem, topo) if found), "")


def set_aside(folder: Path) -> Path:
    """Take a corrupt checkpoint out of the committed names, so that its step can be saved again; nothing is deleted."""
    aside = folder.with_name(f"corrupt_{folder.name}")
    count = 1
    while aside.exists():
        count += 1
        aside = folder.with_name(f"corrupt_{folder.name}.{count}")
    folder.rename(aside)
    fsync_dir(folder.parent)
    return aside


def shapes(manifest: Manifest) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (saved.shape, getattr(torch, saved.dtype)) for name, saved in manifest.tensors.items()}


def load(folder: Path, manifest: Manifest, state: State, topo: Topology, only: str = "") -> None:
    """Fill the tensors of `state` in place, whatever layout wrote them; strict both ways; collective.

    Args:
        only: a prefix; tensors of the checkpoint under other names are left alone (`model.`: weights without optimizer).

    Raises:
        UserError: names, shapes or dtypes differ: this checkpoint is of another model or optimizer.
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
    with _quiet():
        dcp.load(state, storage_reader=Reader(folder, manifest), no_dist=topo.world == 1)


def retire(root: Path, cfg: CheckpointConfig) -> list[int]:
    """Delete what the retention rule does not keep (one process calls this). The newest is always kept. Returns the steps."""
    steps = committed(root)
    kept = set(steps[-cfg.keep_last :]) if cfg.keep_last else set(steps)
    kept |= {s for s in steps if cfg.keep_every and s % cfg.keep_every == 0} | set(steps[-1:])
    gone = [s for s in steps if s not in kept]
    for step in gone:
        # Out of the committed name first: a crash while deleting must not leave half a checkpoint under it.
        doomed = root / f".{step_folder(root, step).name}.old"
        step_folder(root, step).rename(doomed)
        shutil.rmtree(doomed)
    return gone
