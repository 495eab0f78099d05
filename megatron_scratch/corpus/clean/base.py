"""What a cleaner is, and how the ones that `corpus.clean` names are built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Union

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_scratch import registry
from megatron_scratch.util.errors import UserError
from megatron_scratch.util.files import sha256_file


@dataclass(frozen=True)
class Drop:
    """The document goes; the reason is counted, so it has no numbers of this document in it."""

    reason: str


Cleaner = Callable[[str], Union[str, Drop]]


def build_cleaners(names: list[str], options: dict[str, dict[str, Any]]) -> list[tuple[str, Cleaner]]:
    """The cleaners by name, in order, each with its own settings. Errors: `UserError` for an unknown setting or a wrong type."""
    return [(name, registry.get("cleaner", name)(settings(name, options.get(name) or {}))) for name in names]


def files_of(cleaners: list[tuple[str, Cleaner]]) -> list[str]:
    """sha256 of the files that cleaners read (their attribute `files`): models, lists. Part of what decides the bytes."""
    return [sha256_file(path) for _, cleaner in cleaners for path in getattr(cleaner, "files", ())]


def settings(name: str, given: dict[str, Any]) -> Any:
    """The settings dataclass of a cleaner, with what the user gave."""
    kind = registry.entry("cleaner", name).config
    if kind is None:
        if given:
            raise UserError(f"corpus.options.{name} has {', '.join(given)}; cleaner {name} has no settings; leave them out")
        return None
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), given))
    except OmegaConfBaseException as error:
        known = ", ".join(kind.__dataclass_fields__)
        raise UserError(f"corpus.options.{name}: {str(error).splitlines()[0]}; allowed: {known}") from error
