"""The `logging` section: where a run can be watched, beside its own files. One sub-section for each sink that is on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, ClassVar, Optional

from megatron_scratch.util.errors import UserError, choice

MODES = ("online", "offline")


@dataclass
class SinkConfig:
    """What settings of a sink can say of themselves. Every sink is a part of kind `logging`, and these are its `Config`."""

    package: ClassVar[str] = ""  # a module that has to be there
    install: ClassVar[str] = ""  # what brings it

    def check(self) -> None:
        """
        Raises:
            UserError: values that cannot be meant.
        """


@dataclass
class WandbConfig(SinkConfig):
    """Weights & Biases. The server and the key come from the environment: WANDB_BASE_URL, WANDB_API_KEY, or `wandb login`."""

    package: ClassVar[str] = "wandb"
    install: ClassVar[str] = 'pip install "megatron-scratch[wandb]"'

    project: str = "megatron_scratch"
    entity: Optional[str] = None  # a team; None: the account's own
    name: Optional[str] = None  # None: the run's
    group: Optional[str] = None  # runs that belong together; a sweep gives its name
    job_type: Optional[str] = None
    tags: list[str] = field(default_factory=list)
    notes: Optional[str] = None
    mode: str = "online"  # online | offline: into RUN/wandb, to be sent later by `wandb sync`
    artifacts: bool = True  # by reference: checkpoints, samples.jsonl; nothing of them is uploaded. And samples as tables
    alerts: bool = True  # spikes, hangs, failures, ... as the account is set to hear of alerts

    def check(self) -> None:
        choice("logging.wandb.mode", self.mode, MODES)
        if not self.project.strip() or "/" in self.project:
            raise UserError(f"logging.wandb.project={self.project!r} must be a name without '/'; a team is logging.wandb.entity")
        for key in ("entity", "name", "group", "job_type"):
            if (value := getattr(self, key)) is not None and not value.strip():
                raise UserError(f"logging.wandb.{key}={value!r} is empty; leave it out, or give a name")


@dataclass
class TensorboardConfig(SinkConfig):
    """Event files, for `tensorboard --logdir`."""

    package: ClassVar[str] = "tensorboard"
    install: ClassVar[str] = 'pip install "megatron-scratch[tensorboard]"'

    dir: Optional[str] = None  # None: RUN/tensorboard
    flush_seconds: float = 5.0  # how often what is new reaches the disk

    def check(self) -> None:
        if not 0 < self.flush_seconds < float("inf"):
            raise UserError(f"logging.tensorboard.flush_seconds={self.flush_seconds} must be above 0")


def sinks(logging: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """(name, settings) of what is on, from a config's `logging`."""
    return [(name, settings) for name, settings in logging.items() if settings is not None]


def check_logging(logging: Mapping[str, Any], here: bool) -> None:
    """Refuse values that cannot be meant and, where the run starts `here`, a sink whose package is not installed."""
    for name, settings in sinks(logging):
        if not isinstance(settings, SinkConfig):  # a plugin's own
            continue
        settings.check()
        if here and settings.package and not _installed(settings.package):
            raise UserError(f"logging={name} needs the package {settings.package}, which is not installed: {settings.install}")


def _installed(package: str) -> bool:
    """A folder of that name, as wandb leaves one wherever it has been run, is found, too; but it has no file to load."""
    found = find_spec(package)
    return found is not None and found.origin is not None
