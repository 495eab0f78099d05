"""Shell to typed config: Hydra composes the YAML groups over the schema, OmegaConf checks keys and types, we say it in one line."""

from __future__ import annotations

import dataclasses
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from megatron_scratch import registry
from megatron_scratch.config.schema import Config
from megatron_scratch.util.errors import UserError, choice, nearest
from megatron_scratch.util.files import atomic_write

PACKAGE = "megatron_scratch.configs"
PER_ENTRY = ("engine", "optim", "schedule", "launcher")  # sections whose keys depend on the entry they name
SINK = "logging"  # the section with a sub-section for each entry that is on
FREE = r"(launcher\.sbatch|corpus\.options|data\.valid_sets)"  # dictionaries whose keys are the user's own


def _store_schema() -> None:
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for kind in PER_ENTRY:
        for name in registry.names(kind):
            store.store(group=kind, name=f"schema_{name}", node=_schema_of(kind, name))
    for name in registry.names(SINK):
        store.store(group=SINK, name=f"schema_{name}", node={name: _settings_of(name)})


@dataclasses.dataclass
class NoSettings:
    """Those of a sink that has none."""


def _settings_of(sink: str) -> type:
    return registry.entry(SINK, sink).config or NoSettings


def _schema_of(kind: str, name: str) -> type:
    """The dataclass of an entry's settings; one without has what every entry of its kind has."""
    return registry.entry(kind, name).config or type(getattr(Config(), kind))


def load(overrides: list[str], config_dirs: list[str] | None = None) -> Config:
    """Compose, type and resolve a config from `key=value` words. Every mistake is a `UserError` of one line.

    Args:
        overrides: Hydra overrides, e.g. `["experiment=quickstart", "train.steps=10"]`.
        config_dirs: folders searched for YAML groups after the packaged ones (`--config-dir`).
    """
    for word in overrides:  # before anything else: a plugin's entries have schemas and YAML groups of their own
        if word.startswith("plugins="):
            registry.load_plugins(list(OmegaConf.from_dotlist([word]).plugins))
    _store_schema()
    searchpath = [f"hydra.searchpath=[{','.join('file://' + str(Path(d).resolve()) for d in config_dirs)}]"] if config_dirs else []
    for folder in config_dirs or []:
        if not Path(folder).is_dir():
            raise UserError(f"--config-dir={folder} is not a folder")
    try:
        GlobalHydra.instance().clear()
        with initialize_config_module(PACKAGE, version_base="1.3"):
            composed = compose("config", overrides=searchpath + [_free(word) for word in overrides])
        return to_config(composed)
    except UserError:
        raise
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # the last is Hydra's for `model=null`
        raise UserError(_one_line(error, overrides)) from error


def _free(word: str) -> str:
    """`launcher.sbatch.nice=100` names a key of the user's own; Hydra adds one to a dictionary only where it is told to."""
    return f"++{word}" if re.match(FREE + r"((\.[\w-]+)+=|=\{)", word) else word


def to_config(composed: DictConfig) -> Config:
    """A composed or saved tree as typed, resolved dataclasses; unknown keys and wrong types are refused."""
    try:
        schema: Any = OmegaConf.structured(Config)
        registry.load_plugins(list(composed.get("plugins", ())))
        for kind in PER_ENTRY:
            schema[kind] = OmegaConf.structured(_schema_of(kind, str(composed[kind].name)))
        tree: Any = OmegaConf.to_container(composed)
        tree[SINK] = _sinks_on(tree.get(SINK))
        schema[SINK] = {name: OmegaConf.structured(_settings_of(name)) for name in tree[SINK]}
        _refuse_targets(tree, "")
        plain = OmegaConf.create(tree)  # a typed tree would keep keys added with "+"
        merged = OmegaConf.merge(schema, plain)
        OmegaConf.resolve(merged)
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise UserError(_one_line(error, [])) from error


def _sinks_on(section: Any) -> dict[str, Any]:
    """Name -> keys, of a `logging` section; `logging.wandb=null` takes a sink away that a file has put there."""
    section = section or {}
    if section == {"name": "console"}:  # of a run of version 0.1.0
        return {}
    for name, keys in section.items():
        choice(SINK, name, registry.names(SINK))
        if not isinstance(keys, (dict, type(None))):
            raise UserError(f"{SINK}.{name}={keys!r} must be keys and values; give {SINK}={name} {SINK}.{name}.KEY=VALUE")
    return {name: keys for name, keys in section.items() if keys is not None}


def plain(cfg: Config) -> dict[str, Any]:
    """A resolved config as dictionaries, lists and plain values."""
    return OmegaConf.to_container(OmegaConf.structured(cfg))  # type: ignore[return-value]


def save(cfg: Config, path: Path) -> None:
    """Write the resolved config as YAML."""
    with atomic_write(path, "w") as f:
        f.write(OmegaConf.to_yaml(OmegaConf.structured(cfg)))


def load_file(path: Path) -> Config:
    """Read a config that `save` wrote, with the same checks as a composed one."""
    try:
        return to_config(OmegaConf.load(path))  # type: ignore[arg-type]
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; give the folder of a run") from error
    except (ValueError, YAMLError, AttributeError) as error:  # bytes that are no text, text that is no YAML, YAML that is no config
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not a config that a run has written ({_one_line(error, [])[:200]}); restore it") from error


def parse_args(schema: type, words: list[str], positional: str) -> Any:
    """`key=value` words as a small typed section, for verbs that do not compose a run; a bare word is `positional`."""
    words = [word if "=" in word else f"{positional}={word}" for word in words]
    fields = [f.name for f in dataclasses.fields(schema)]
    for key in (word.partition("=")[0] for word in words):
        choice("key", key, fields)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.from_dotlist([_quoted(w) for w in words]))
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(_one_line(error, words)) from error


def _quoted(word: str) -> str:
    """`prompt=a: b` would be read as YAML; free text that is not a list, number or null keeps its characters."""
    key, _, value = word.partition("=")
    if value[:1] in "[{" or re.fullmatch(r"-?[\d.]+(e-?\d+)?|null|true|false", value, re.IGNORECASE):
        return word
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    return f'{key}="{escaped}"'


def _refuse_targets(node: Any, where: str) -> None:
    """A config names registry entries and nothing else: a `_target_` would let a config run code."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("_target_", "_partial_", "_args_"):
                raise UserError(f"{where}{key}={value!r} is refused: configs name parts (see `registry`), they do not call code")
            _refuse_targets(value, f"{where}{key}.")
    elif isinstance(node, list):
        for item in node:
            _refuse_targets(item, where)


def _keys(node: Any, prefix: str = "") -> list[str]:
    out = []
    for key, value in node.items():
        out.append(prefix + key)
        if isinstance(value, dict):
            out += _keys(value, f"{prefix}{key}.")
    return out


def _all_keys() -> list[str]:
    keys = set(_keys(OmegaConf.to_container(OmegaConf.structured(Config))))
    for name in registry.names(SINK):
        keys |= {f"{SINK}.{name}.{k}" for k in _keys(OmegaConf.to_container(OmegaConf.structured(_settings_of(name))))}
    for kind in PER_ENTRY:
        for name in registry.names(kind):
            keys |= {f"{kind}.{k}" for k in _keys(OmegaConf.to_container(OmegaConf.structured(_schema_of(kind, name))))}
    return sorted(keys)


def _one_line(error: Exception, overrides: list[str]) -> str:
    """Hydra's and OmegaConf's messages run over several lines and name Python types; keep what a user can act on."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    chain = " ".join(re.sub(r"\s+", " ", str(e)) for e in (error, error.__cause__) if e)
    if found := re.search(r"Could not (?:override|append to config\. An item is already at) '([\w.\[\]]+)'", chain):
        key = found.group(1)
        sink = key.split(".")[1] if key.startswith(f"{SINK}.") else ""
        if sink in registry.names(SINK) and f"Key '{sink}' is not" in chain:
            return f"{key} has no effect without {SINK}={sink}"
        if "not in" in chain or "not in struct" in chain:
            return f"{key} is not a key{nearest(key, _all_keys())}; `megatron-scratch train --print` shows them all"
    if found := re.search(r"Could not (?:find|load) '([^']+)'(?: Available options in '[\w/]+': )?(.*)", chain):
        return _unknown_option(found.group(1))
    if found := re.search(r"Key '(\w+)' (?:is )?not in '\w+'.*?full_key: ([\w.]+)", chain):
        return f"{found.group(2)} is not a key{nearest(found.group(2), _all_keys())}"
    if found := re.search(r"(Value .*?)\s+full_key: ([\w.\[\]]+)", chain):
        value, key = found.group(1), found.group(2)
        return f"{key}: {_plain(value)}{_given(key, overrides)}"
    if re.search(r"mismatched input|NoViableAlt|extraneous input|token recognition", text):
        shown = re.sub(r"^\w+Exception: | \^? ?See https.*", "", text)
        return f"{shown}: write a value with one of []{{}}(),:&= or a space in two pairs of quotes, key='\"a[1-3]\"'"
    if found := re.search(r"Interpolation key '([\w.]+)' not found", chain):
        return f"${{{found.group(1)}}} in a config points to no key{nearest(found.group(1), _all_keys())}"
    return text


def _plain(value: str) -> str:
    value = re.sub(r"Value '(.*)' of type '\w+' could not be converted to (\w+)", r"got '\1', allowed: \2", value)
    for python, plain in (("Integer", "a whole number"), ("Float", "a number"), ("Boolean", "true or false"), ("String", "text")):
        value = value.replace(python, plain)
    return value


def _given(key: str, overrides: list[str]) -> str:
    words = [o for o in overrides if o.lstrip("+~").split("=")[0] == key]
    return f" (from {words[-1]!r})" if words else ""


def _unknown_option(path: str) -> str:
    group, _, name = path.rpartition("/")
    folder = files(PACKAGE) / group
    options = sorted(p.name[:-5] for p in folder.iterdir() if p.name.endswith(".yaml")) if folder.is_dir() else []
    if options:
        return f"{group}={name} is not known; allowed: {', '.join(options)}{nearest(name, options)}"
    return f"{path} is not a config group{nearest(path, [p.name for p in files(PACKAGE).iterdir()])}"
