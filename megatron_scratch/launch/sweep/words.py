"""The words of `train -m`: what all points share, what is swept, and what is Hydra's own.

Hydra's grammar of overrides (hydra.cc/docs/advanced/override_grammar) is parsed by Hydra's own parser. Hydra's multirun itself is
not used: it composes one config out of the words that are not swept, with the default engine, and refuses a key that only a
swept engine has; one point that does not compose ends the whole sweep; and it would hand each job to a launcher that makes folders,
log files and a pickled function. `compose.load` takes a point's words as it takes those of a single run.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException

from megatron_scratch.config.compose import PACKAGE
from megatron_scratch.config.launcher import PATH, fits
from megatron_scratch.util.errors import UserError, choice

SWEEPERS, LAUNCHERS = ("basic", "optuna"), ("basic", "joblib")
MOST = 1000  # points: a range that was meant to be shorter must not fill a cluster's queue
CALLS = ("_target_", "_partial_", "_args_", "custom_search_space")  # they name Python to call


@dataclass(frozen=True)
class Words:
    """What was asked for."""

    fixed: list[str]
    swept: list[Override]
    sweeper: str = "basic"  # Hydra's, by its name
    settings: tuple[str, ...] = ()  # of the sweeper, as words for Hydra
    at_once: int = 1  # points that run here at a time
    folder: str | None = None  # hydra.sweep.dir
    metric: str | None = None  # sweep.metric: what optuna optimises


def read(words: list[str], folders: list[str]) -> Words:
    """Sort the words of a sweep; refuse what it cannot follow.

    Args:
        folders: `--config-dir`, where a glob looks for names, too.
    """
    metric = _metric([word for word in words if word.startswith("sweep.")])
    parsed = [_globbed(_parse(word), folders) for word in words if not word.startswith("sweep.")]
    hydra = [o for o in parsed if o.is_hydra_override() or o.key_or_group == "hydra"]
    last = {o.key_or_group: o for o in parsed}  # of two words on one key the later counts, as in a single run
    swept = [o for o in parsed if o not in hydra and o.is_sweep_override() and o is last[o.key_or_group]]
    fixed = [o for o in parsed if o not in hydra and not (o.is_sweep_override() or last[o.key_or_group].is_sweep_override())]
    _refuse(swept, fixed, hydra)
    values = {o.key_or_group: o for o in hydra}
    sweeper, launcher = (str(values[key].value()) if key in values else "basic" for key in ("hydra/sweeper", "hydra/launcher"))
    choice("hydra/sweeper", sweeper, SWEEPERS)
    if launcher not in LAUNCHERS:
        raise UserError(
            f"hydra/launcher={launcher} is not known; allowed: {', '.join(LAUNCHERS)}; to submit jobs give launcher=slurm"
        )
    settings = tuple(str(o.input_line) for o in hydra if o.key_or_group.startswith(("hydra.sweeper.", "hydra/sweeper/")))
    if sweeper == "basic" and (settings or metric):
        raise UserError(f"{settings[0] if settings else f'sweep.metric={metric}'} has no effect with hydra/sweeper=basic; "
                        "give hydra/sweeper=optuna, or leave it out")  # fmt: skip
    if not swept and not any("hydra.sweeper.params" in word for word in settings):
        raise UserError("-m has nothing to sweep; give a key several values, such as optim.lr=1e-3,1e-4, or leave -m out")
    folder = str(values["hydra.sweep.dir"].value()) if "hydra.sweep.dir" in values else None
    if folder is not None:
        fits("hydra.sweep.dir", folder, PATH, "runs/sweeps/try2")
    return Words([str(o.input_line) for o in fixed], swept, sweeper, settings, _at_once(values, launcher), folder, metric)


def grid(swept: Sequence[Override]) -> list[list[str]]:
    """Every combination of the swept values, the last key's changing fastest, as Hydra's basic sweeper has them."""
    lists = []
    for override in swept:
        if not override.is_discrete_sweep():
            raise UserError(
                f"{override.input_line!r} has no end of values; give hydra/sweeper=optuna, which draws from it, or range()"
            )
        values = list(itertools.islice(override.sweep_string_iterator(), MOST + 1))
        lists.append([f"{override.get_key_element()}={value}" for value in values])
    count = math.prod(len(values) for values in lists)
    if not 0 < count <= MOST:
        raise UserError(f"these are {'no' if not count else f'more than {MOST}'} points; a sweep has 1 to {MOST}")
    return [list(words) for words in itertools.product(*lists)]


def _parse(word: str) -> Override:
    try:
        return OverridesParser.create().parse_overrides([word])[0]
    except HydraException as error:
        raise UserError(f"{word!r} is no override: {' '.join(str(error).split()).partition(' See http')[0]}") from error


def _globbed(override: Override, folders: list[str]) -> Override:
    """`model=glob(llama*)` as the names that match. Hydra itself would also match the schemas that our groups keep beside them."""
    glob = override.value()
    if not isinstance(glob, Glob):
        return override
    groups = [files(PACKAGE) / override.key_or_group, *(Path(folder) / override.key_or_group for folder in folders)]
    names = sorted(
        {file.name[:-5] for group in groups if group.is_dir() for file in group.iterdir() if file.name.endswith(".yaml")}
    )
    found = glob.filter(names)
    if not found:
        raise UserError(f"{override.input_line!r} matches nothing; there is: {', '.join(names) or 'no such group'}")
    return _parse(f"{override.get_key_element()}=choice({','.join(found)})")


def _refuse(swept: list[Override], fixed: list[Override], hydra: list[Override]) -> None:
    for override in (*swept, *fixed):
        if override.key_or_group == "dir":
            raise UserError(
                f"{override.input_line!r}: each point of a sweep has its own dir; give hydra.sweep.dir=DIR, in which they lie"
            )
    for override in swept:
        key = override.key_or_group
        if key in ("name", "launcher"):
            raise UserError(f"{override.input_line!r}: all points share one {key}"
                            + ("; each gets its number added" if key == "name" else "; sweep twice"))  # fmt: skip
    for override in hydra:
        _refuse_hydra(override)


def _refuse_hydra(override: Override) -> None:
    word, key = str(override.input_line), override.key_or_group
    if any(call in word for call in CALLS):
        raise UserError(f"{word!r} is refused: it names code to call")
    if override.is_sweep_override():
        raise UserError(f"{word!r}: Hydra's own settings cannot be swept")
    names = ("hydra.sweep.dir", "hydra/sweeper", "hydra/launcher", "hydra.launcher.n_jobs")
    if key not in names and not key.startswith(("hydra.sweeper.", "hydra/sweeper/")):
        raise UserError(f"{word!r} has no effect here; of Hydra's own there are {', '.join(names)} and hydra.sweeper.*")


def _metric(words: list[str]) -> str | None:
    for word in words:
        key, _, value = word.partition("=")
        choice("key", key, ["sweep.metric"])
        if not value:
            raise UserError("sweep.metric is empty; give a key of metrics.jsonl, such as val_loss")
    return words[-1].partition("=")[2] if words else None


def _at_once(values: dict[str, Override], launcher: str) -> int:
    given = values["hydra.launcher.n_jobs"].value() if "hydra.launcher.n_jobs" in values else None
    if launcher == "basic" and given is not None:
        raise UserError(f"hydra.launcher.n_jobs={given} has no effect with hydra/launcher=basic; give hydra/launcher=joblib")
    if launcher == "joblib" and (type(given) is not int or given < 1):
        raise UserError(
            f"hydra.launcher.n_jobs={given}: hydra/launcher=joblib wants the number of points that run at a time, 1 or more"
        )
    return given if type(given) is int else 1
