"""`hydra/sweeper=optuna`: Hydra's own sweeper chooses the points, a batch at a time, from what the batches before came to.

Only the sweeper is Hydra's: it is made by Hydra, from Hydra's config of it, and asks for launches through the attribute `launcher`,
which is ours. (As a launcher plugin of Hydra's, ours would have to be importable from a package `hydra_plugins` of ours.)
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import HydraContext
from omegaconf import DictConfig, ListConfig
from omegaconf.errors import OmegaConfBaseException

from megatron_scratch.config.compose import PACKAGE
from megatron_scratch.launch.sweep.record import Point, Sweep
from megatron_scratch.launch.sweep.table import newest
from megatron_scratch.launch.sweep.words import Words
from megatron_scratch.util.errors import RunFailed, UserError, choice

METRIC = "val_loss"


class TrialFailed(RunFailed):
    """A point has no value: illegal, failed, or not a finite number."""


@dataclass
class Value:
    """What a sweeper asks of a job that has ended, as `hydra.core.utils.JobReturn` answers it."""

    value: float | None
    reason: str

    @property
    def return_value(self) -> float:
        if self.value is None:
            raise TrialFailed(self.reason)
        return self.value


class Study:
    """Asks for points until the sweeper has had enough.

    Args:
        run: trains points and returns when they are over.
    """

    def __init__(self, sweep: Sweep, words: Words, run: Callable[[list[Point]], None]) -> None:
        self.sweep, self.metric, self.train = sweep, words.metric or METRIC, run
        self.searched = [str(override.input_line) for override in words.swept]
        config = _settings(words, sweep)
        self.maximize = _name(config.hydra.sweeper.direction) == "maximize"
        self.sweeper = _sweeper(config, self)
        self.values: dict[int, float] = {}

    def run(self) -> str:
        """All trials; the best one as a line. RunFailed: not one came to a number."""
        from sqlalchemy.exc import SQLAlchemyError  # it is here: the sweeper has been made

        logging.getLogger("hydra_plugins").setLevel(logging.CRITICAL)  # it would say again what each trial has come to
        logging.getLogger("optuna").setLevel(logging.WARNING)
        try:
            self.sweeper.sweep(list(self.searched))
        except (UserError, RunFailed):
            raise
        except RuntimeError as error:
            if "Study.stop" not in str(error):  # a grid that ends with a failed trial, for which Hydra's sweeper is not prepared
                raise
        except (HydraException, OmegaConfBaseException, SQLAlchemyError, ValueError, AssertionError, NotImplementedError) as error:
            if self.sweep.points and not self.values:
                raise self._nothing() from error
            kind = RunFailed if self.sweep.begun else UserError
            raise kind(f"hydra/sweeper=optuna: {_said(error) or type(error).__name__}") from error
        if not self.values:
            raise self._nothing()
        best = (max if self.maximize else min)(self.values, key=lambda number: self.values[number])
        return f"best: point {best}, {self.metric} {self.values[best]:.6g}, {' '.join(self.sweep.points[best].overrides)}"

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[Value]:
        """Hydra's `Launcher.launch`: train a batch of points, in its order."""
        first = len(self.sweep.points)
        batch = [Point(first + i, list(words)) for i, words in enumerate(job_overrides)]
        self.sweep.points += batch
        self.train(batch)
        return [self._value(point) for point in batch]

    def _value(self, point: Point) -> Value:
        if point.state != "finished":
            return Value(None, f"point {point.number} {point.state}: {point.reason}")
        value = newest(self.sweep.home(point) / "metrics.jsonl", (self.metric,))[self.metric]
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            self.sweep.mark(point, "failed", f"{self.metric} is {'not in its metrics.jsonl' if value is None else value}")
            return Value(None, f"point {point.number} failed: {point.reason}")
        self.values[point.number] = float(value)
        return Value(float(value), "")

    def _nothing(self) -> Exception:
        points = self.sweep.points
        said = f"the first: {points[0].reason}"
        if all(point.state == "dropped" for point in points):
            return UserError(f"all {len(points)} points are illegal, {said}")
        return RunFailed(f"none of {len(points)} points came to a {self.metric}, {said}")


def _settings(words: Words, sweep: Sweep) -> DictConfig:
    settings = list(words.settings)
    if not any("max_failure_rate" in word for word in settings):
        settings.append("hydra.sweeper.max_failure_rate=1.0")  # Hydra's 0.0 would end the study at the first illegal point
    config = _config(["hydra/sweeper=optuna", *settings, f"hydra.sweep.dir='{sweep.path}'"])
    _check(config.hydra.sweeper)
    return config


def _sweeper(config: DictConfig, launcher: Any) -> Any:
    """Hydra's sweeper, with `launcher` in the place of Hydra's."""
    context = HydraContext(config_loader=None, callbacks=None)  # type: ignore[arg-type]  # nobody asks them for anything
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # optuna 2 is of SQLAlchemy 1's time
            made = Plugins.instance().instantiate_sweeper(hydra_context=context, task_function=_never, config=config)
    except (HydraException, ImportError, TypeError, AssertionError) as error:
        raise UserError(f"hydra/sweeper=optuna cannot be made: {_said(error)}") from error
    made.sweeper.launcher = launcher  # type: ignore[attr-defined]
    return made


def _never(config: Any) -> None:
    """What Hydra's launcher would have run."""
    raise AssertionError("Hydra's launcher is not used")


def _config(words: list[str]) -> DictConfig:
    """Hydra's own config alone."""
    try:
        GlobalHydra.instance().clear()
        with initialize_config_module(PACKAGE, version_base="1.3"):
            return compose(None, overrides=words, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        if "Could not find 'hydra/sweeper/optuna'" in str(error):
            raise UserError("hydra/sweeper=optuna is not installed; pip install 'megatron-scratch[sweep]'") from error
        raise UserError(f"hydra/sweeper=optuna: {_said(error)}") from error


def _check(sweeper: DictConfig) -> None:
    """What the sweeper would refuse without a word, or should not be given."""
    if isinstance(sweeper.direction, ListConfig):
        raise UserError(f"hydra.sweeper.direction={list(sweeper.direction)}: a sweep has one metric; give minimize or maximize")
    choice("hydra.sweeper.direction", _name(sweeper.direction), ("minimize", "maximize"))
    if str(sweeper.storage or "").startswith("redis"):
        raise UserError("hydra.sweeper.storage=redis... is refused: what optuna keeps there is pickled; give sqlite:///FILE")
    for key in ("n_trials", "n_jobs"):
        if sweeper[key] < 1:
            raise UserError(f"hydra.sweeper.{key}={sweeper[key]} must be at least 1")
    if not 0 <= sweeper.max_failure_rate <= 1:
        raise UserError(f"hydra.sweeper.max_failure_rate={sweeper.max_failure_rate} must be in [0, 1]")


def _name(direction: object) -> str:
    return str(getattr(direction, "name", direction))


def _said(error: Exception) -> str:
    """An error and what caused it, in one line and without Hydra's list of places."""
    both = f"{error} {error.__cause__ or ''}"
    return " ".join(both.partition("Config search path:")[0].split())[:400]
