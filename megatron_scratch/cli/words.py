"""The words after a verb: options, overrides of the config, bare words in their order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_scratch.util.errors import UserError

if TYPE_CHECKING:
    from megatron_scratch.config import Config

MULTIRUN = ("-m", "--multirun")


def composed(words: list[str]) -> Config | None:
    """The config of a verb, or None when it was only to be shown."""
    from omegaconf import OmegaConf

    from megatron_scratch.config import compose

    overrides, folders, show = options(words)
    cfg = compose.load(overrides, folders)
    if show:
        print(OmegaConf.to_yaml(OmegaConf.structured(cfg)), end="")
        return None
    return cfg


def options(words: list[str]) -> tuple[list[str], list[str], bool]:
    """Split words into (overrides, --config-dir folders, whether --print was given)."""
    overrides, folders, show = [], [], False
    rest = iter(words)
    for word in rest:
        if word == "--print":
            show = True
        elif word == "--config-dir" or word.startswith("--config-dir="):
            folders.append(word.partition("=")[2] or next(rest, ""))
        elif word in MULTIRUN:
            raise UserError(f"{word} sweeps `train`, no other verb")
        elif word.startswith("-"):
            raise UserError(f"{word} is not an option; allowed: --print, --config-dir DIR")
        else:
            overrides.append(word)
    return overrides, folders, show


def named(words: list[str], *names: str) -> list[str]:
    """Bare words in their order as `name=word`."""
    bare = [word for word in words if "=" not in word]
    if len(bare) > len(names):
        allowed = " ".join(name.upper() for name in names)
        raise UserError(f"{bare[len(names)]!r} is one word too many; allowed: {allowed} and key=value words")
    return [f"{name}={word}" for name, word in zip(names, bare, strict=False)] + [word for word in words if "=" in word]
