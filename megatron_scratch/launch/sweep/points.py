"""From a point's words to a config that can start, or the reason why it cannot."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from megatron_scratch.config import Config, compose
from megatron_scratch.config.launcher import ClusterConfig, SlurmConfig
from megatron_scratch.config.logging import WandbConfig, sinks
from megatron_scratch.launch import slurm
from megatron_scratch.launch.resolve import resolve, world_size
from megatron_scratch.launch.sweep.here import check_gpus
from megatron_scratch.launch.sweep.record import Point, Sweep, check_name
from megatron_scratch.launch.sweep.words import Words
from megatron_scratch.util.env import everything
from megatron_scratch.util.errors import UserError

Ready = list[tuple[Point, Config, int]]
"""Points that can start, each with its config and the number of its processes."""


def name_of(fixed: list[str], points: Iterable[list[str]], folders: list[str]) -> str:
    """The name of a sweep: `name` as the first point that composes has it, or as it is given."""
    name = ([word.partition("=")[2] for word in fixed if word.startswith("name=")] or ["run"])[-1]
    for words in points:
        try:
            name = compose.load([*fixed, *words], folders).name
            break
        except UserError:
            continue
    check_name(name)
    return name


def legal(sweep: Sweep, points: list[Point], asked: Words, folders: list[str]) -> Ready:
    """The points that can start; the others are dropped, with the reason, before anything is started.

    Raises:
        UserError: what is wrong is wrong with the sweep.
    """
    found: Ready = []
    for point in points:
        try:
            found.append((point, *_config(sweep, point, asked, folders)))
        except UserError as error:
            point.drop(error)
    launchers = {cfg.launcher.name for _, cfg, _ in found}
    if len(launchers) > 1:
        raise UserError(f"the points have different launchers: {', '.join(sorted(launchers))}; sweep each launcher by itself")
    for _, cfg, _ in found[:1]:
        _check_sweep(cfg, asked)
    return found


def _config(sweep: Sweep, point: Point, asked: Words, folders: list[str]) -> tuple[Config, int]:
    """Checked as `train` checks it, and for what the points of a sweep could share."""
    cfg = compose.load([*sweep.fixed, *point.overrides, f"name={sweep.name_of(point)}", f"dir='{sweep.home(point)}'"], folders)
    world = world_size(cfg)
    cfg = resolve(cfg, world)
    for _, settings in sinks(cfg.logging):
        if isinstance(settings, WandbConfig) and settings.group is None:
            settings.group = sweep.name
    remote = cfg.checkpoint.remote
    if remote is not None and cfg.name not in remote:
        raise UserError(f"checkpoint.remote={remote} is the same for all points; write checkpoint.remote='.../${{name}}'")
    if isinstance(cfg.launcher, SlurmConfig):
        slurm.check_names(cfg, Path(cfg.dir).absolute())
        slurm.carried(cfg.launcher, everything())
    if not isinstance(cfg.launcher, ClusterConfig):
        check_gpus(world, asked.at_once)
    return cfg, world


def _check_sweep(cfg: Config, asked: Words) -> None:
    """Refuse a launcher that has no sweeps, and a sweeper or a launcher of Hydra's that cannot do anything with ours."""
    launcher = cfg.launcher
    if not isinstance(launcher, ClusterConfig):
        return
    if not isinstance(launcher, SlurmConfig):
        raise UserError(
            f"launcher={launcher.name} has no sweeps; give launcher=local or launcher=slurm, or start each point by itself"
        )
    if asked.at_once > 1:
        raise UserError(f"hydra.launcher.n_jobs={asked.at_once} has no effect on launcher=slurm: jobs run as the cluster has room; "
                        "leave hydra/launcher=joblib out")  # fmt: skip
    if asked.sweeper != "basic" and launcher.print_only:
        raise UserError("hydra/sweeper=optuna needs what its points come to; leave launcher.print_only out")
