"""The rank's end of what watches a run: facts about it, and the followers that bring its files to trackers (`logs/`)."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from types import TracebackType
from typing import Any

import torch

from megatron_scratch import __version__
from megatron_scratch.config import Config
from megatron_scratch.logs.followers import Followers
from megatron_scratch.models.flops import count_parameters
from megatron_scratch.parallel import Topology
from megatron_scratch.parallel.collectives import gather_json
from megatron_scratch.train.console import View
from megatron_scratch.train.loop import Every
from megatron_scratch.train.rundir import RunDir
from megatron_scratch.train.step import StepResult
from megatron_scratch.util.env import node_name
from megatron_scratch.util.errors import StopRequested
from megatron_scratch.util.exits import FAILED, OK, STOPPED
from megatron_scratch.util.machine import code_version

LOGGING = "logging"  # the key of what a checkpoint remembers of trackers
ENGINES = {"zero1": "deepspeed", "zero2": "deepspeed", "zero3": "deepspeed"}  # packages whose version says something of the numbers


class Reporter:
    """A hook, and the context in which a run trains: on the main rank it ends the followers; on the others it does nothing."""

    def __init__(self, cfg: Config, topo: Topology, run_dir: RunDir, view: View) -> None:
        self.cfg, self.topo, self.view = cfg, topo, view
        self.due = Every(cfg.train.log_every)
        self.followers = Followers(cfg, run_dir.path) if topo.is_main else None
        self.kept: Mapping[str, Any] = {}

    def load(self, extra: Mapping[str, Any], own: bool) -> None:
        """From what a checkpoint remembers. One of another run, from which this one starts, says nothing of this one's trackers."""
        self.kept = extra.get(LOGGING, {}) if own else {}

    def facts(self, flops: tuple[float, float]) -> dict[str, Any]:
        """What the ledger says of a start; collective. `flops` of a token, with causal and with full attention."""
        cfg, topo = self.cfg, self.topo
        hosts = sorted(set(gather_json(node_name(), topo)))
        device = torch.cuda.get_device_name(topo.device) if topo.device.type == "cuda" else "cpu"
        return {
            "dp": topo.size("dp"),
            "cp": topo.size("cp"),
            "hosts": hosts,
            "device": device,
            "versions": _versions(cfg),
            "commit": code_version() if topo.is_main else None,
            "parameters": count_parameters(cfg.model).total,
            "flops_per_token": list(flops),
            "seq_len": cfg.train.seq_len,
        }

    def begin(self, step: int) -> None:
        """The run directory says what the run is: followers may start."""
        if self.followers is not None:
            self.followers.start(step, self.kept)

    def state(self, step: int) -> dict[str, Any]:
        """JSON for the checkpoint of `step`."""
        state = self.followers.state(step) if self.followers is not None else {}
        return {LOGGING: state} if state else {}

    def run(self, step: int, result: StepResult) -> None:
        self._pass_on()

    def _pass_on(self) -> None:
        for line in self.followers.told() if self.followers is not None else ():
            self.view.say(line)

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.followers is None:
            return
        ends = ("finished", OK) if kind is None else ("stopped", STOPPED) if issubclass(kind, StopRequested) else ("failed", FAILED)
        self.followers.close(*ends)
        self._pass_on()


def _versions(cfg: Config) -> dict[str, str]:
    out = {"megatron_scratch": __version__, "python": platform.python_version(), "torch": torch.__version__}
    if torch.version.cuda:
        out["cuda"] = torch.version.cuda
    for package in {ENGINES.get(cfg.engine.name)} - {None}:
        try:
            out[str(package)] = version(str(package))
        except PackageNotFoundError:
            continue
    return out
