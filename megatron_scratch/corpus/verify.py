"""Is every file of a dataset as it was written? Each byte is read and compared with the checksums beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_scratch.corpus.report_page import whole
from megatron_scratch.data.indexed import IndexedDataset, paths
from megatron_scratch.data.sidecar import Sidecar, folder_of
from megatron_scratch.util.errors import UserError
from megatron_scratch.util.files import sha256_file
from megatron_scratch.util.sealed import changed

MANIFEST, REPORT = "manifest.json", "report.html"
SEALED = 2  # the first format of a manifest that holds its own checksum
Say = Callable[[str], Any]


def verify(path: str | Path, say: Say, progress: Say = lambda line: None) -> list[str]:
    """Read everything; `say` gets a line per file that differs (with the bytes, where blocks tell them) and a line per dataset.

    Args:
        path: a folder that a `data` verb wrote, or a Megatron prefix, of which only a sidecar tells what it should be.

    Returns what differs; empty: all is whole, or (said as "unverified") there is nothing to compare with.
    """
    path = Path(path)
    wrong = _folder(path, say, progress) if path.is_dir() else _prefix(path, say, progress)
    for line in wrong:
        say(line)
    return wrong


def _prefix(prefix: Path, say: Say, progress: Say) -> list[str]:
    """One dataset: its structure, its blocks, its sidecar."""
    missing = [str(p) for p in paths(prefix) if not p.is_file()]
    if len(missing) == 2:
        raise UserError(f"{prefix} is neither a folder nor a prefix: {missing[1]} does not exist; give what a data verb wrote")
    if missing:
        return [f"{missing[0]}: is missing"]
    wrong = []
    try:
        if sidecar := Sidecar.of(prefix):
            wrong = sidecar.verify(progress)
        IndexedDataset(prefix)
    except UserError as error:
        wrong = wrong or [str(error)]
    if not wrong:
        say(f"{prefix}: whole" if sidecar else f"{prefix}: opens, but is unverified: no {folder_of(prefix).name} beside it")
    return wrong


def _folder(folder: Path, say: Say, progress: Say) -> list[str]:
    sides = [folder / side for side in ("train", "valid") if any(p.exists() for p in paths(folder / side))]
    if not (folder / MANIFEST).is_file():
        if not sides:
            raise UserError(f"{folder} has no {MANIFEST} and no dataset; give a folder that data prepare has finished, or a prefix")
        say(f"{folder} has no {MANIFEST}: its datasets are compared with what lies beside each, nothing else is")
        return [line for side in sides for line in _prefix(side, say, progress)]
    wrong, told = _manifest(folder / MANIFEST)
    for name, expected in told.items():
        progress(f"{folder / name}")
        wrong += _file(folder / name, expected)
    wrong += [line for side in sides if folder_of(side).is_dir() for line in _blocks(side, wrong, progress)]
    if (folder / REPORT).is_file() and not whole(folder / REPORT):
        wrong.append(f"{folder / REPORT}: not as it was written (it tells of the data, no data is in it)")
    if not wrong:
        say(f"{folder}: whole, {len(told)} files, {sum(e['bytes'] for e in told.values())} bytes")
    return wrong


def _manifest(path: Path) -> tuple[list[str], dict[str, Any]]:
    """(what is wrong with it, its files). Of a damaged one only what can still be read is used."""
    try:
        value = json.loads(path.read_text("utf-8"))
        files = {name: told for name, told in value["files"].items() if {"bytes", "sha256"} <= set(told)}
        if value["format"] < SEALED:
            return [], files
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        files = {}
    why = changed(path)
    return ([f"{path}: {why}"] if why else []), files


def _file(path: Path, told: dict[str, Any]) -> list[str]:
    if not path.is_file():
        return [f"{path}: is missing"]
    size = path.stat().st_size
    if size != told["bytes"]:
        return [f"{path}: {size} bytes, {told['bytes']} were written"]
    return [] if sha256_file(path) == told["sha256"] else [f"{path}: another sha256 than when it was written"]


def _blocks(prefix: Path, wrong: list[str], progress: Say) -> list[str]:
    """Which bytes of a .bin changed that is known to differ."""
    if not any(line.startswith(f"{prefix}.bin: ") for line in wrong):
        return []
    try:
        sidecar = Sidecar.of(prefix)
        return [line for line in sidecar.verify(progress) if line.startswith(f"{prefix}.bin: bytes ")] if sidecar else []
    except (UserError, OSError):
        return []
