"""Names to parts. A part is named in a config, found here, and imported only when it is built.

A target is a callable or a lazy "module:attribute" string, so that listing every name costs no import of torch and a
login-node command can refuse a misspelt name at once. Configs never hold a target, only a name: a config cannot run code.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from megatron_scratch.util.errors import UserError, choice


@dataclass(frozen=True)
class Entry:
    """One part: what builds it, and the dataclass of its own settings (None where it takes the whole section's)."""

    target: Callable[..., Any] | str
    config: type | None = None


_ENTRIES: dict[str, dict[str, Entry]] = {}


def register(kind: str, name: str, target: Callable[..., Any] | str, config: type | None = None) -> None:
    """Add a part. `kind` is where it can be named (`position`, `optim`, ...). A second one under one name is refused."""
    table = _ENTRIES.setdefault(kind, {})
    if name in table and table[name].target != target:
        raise UserError(f"{kind}={name!r} is registered twice: {table[name].target} and {target}; choose another name")
    table[name] = Entry(target, config)


def _table(kind: str) -> dict[str, Entry]:
    """The entries of a kind; the package's own parts are listed at the first look, so nobody has to remember to."""
    if "builtin" not in _ENTRIES:
        _ENTRIES["builtin"] = {}
        from megatron_scratch.builtin import register_all

        register_all()
    return _ENTRIES.get(kind, {})


def names(kind: str) -> list[str]:
    """All names of a kind, in order of registration."""
    return list(_table(kind))


def entry(kind: str, name: str) -> Entry:
    """The entry, or a `UserError` with the allowed names and the nearest spelling."""
    choice(kind, name, names(kind))
    return _table(kind)[name]


def get(kind: str, name: str) -> Callable[..., Any]:
    """The part itself, imported now if it was registered by its path."""
    target = entry(kind, name).target
    if not isinstance(target, str):
        return target
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def build(kind: str, cfg: Any, **runtime: Any) -> Any:
    """Build the part that a section names (`cfg.name`) from that section and runtime objects."""
    return get(kind, cfg.name)(cfg, **runtime)


def load_plugins(modules: list[str]) -> None:
    """Import the user's modules (`plugins=[my_package.parts]`) and installed `megatron_scratch.plugins` entry points.

    Each is expected to call `register` when imported.
    """
    for point in entry_points(group="megatron_scratch.plugins"):
        point.load()
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise UserError(f"plugins={module!r} cannot be imported: {error}; give a module on PYTHONPATH") from error
