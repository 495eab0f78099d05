"""What a run is trained on: its sources with their weights, and what the manifests of their folders say of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_scratch.report.run import Run, number

MANIFEST = "manifest.json"  # of a folder from `data prepare`
LARGEST_MANIFEST = 64 << 20


def mix(run: Run, tokens: float | None) -> list[dict[str, Any]]:
    """A row for each entry of the config: {"path", "weight": share of all, "documents", "tokens": in the set, or None where the
    manifest cannot be read, "trained": tokens taken so far, "epochs", "sources"}.

    Args:
        tokens: that the run has been trained on so far.
    """
    data = run.config.get("data")
    data = data if isinstance(data, dict) else {}
    given = _entries(data)
    whole = sum(weight for _, weight in given) or 1.0
    rows = []
    for path, weight in given:
        manifest = _manifest(run, path)
        held = _split(manifest, path)
        trained = None if tokens is None else tokens * weight / whole
        size = number(held.get("tokens"))
        rows.append({"path": path, "weight": weight / whole, "documents": number(held.get("documents")), "tokens": size,
                     "trained": trained, "epochs": trained / size if trained is not None and size else None,
                     "sources": _sources(manifest), "readable": bool(manifest)})  # fmt: skip
    return rows


def _entries(data: dict[str, Any]) -> list[tuple[str, float]]:
    blend = data.get("blend")
    if isinstance(blend, list) and blend:
        pairs = (str(item).rpartition(":") for item in blend)
        return [(path, weight) for path, _, told in pairs if path and (weight := _float(told)) and weight > 0]
    return [(str(data[key]), 1.0) for key in ("dir", "train") if data.get(key)][:1]


def _float(text: str) -> float | None:
    try:
        return number(float(text))
    except ValueError:
        return None


def _manifest(run: Run, path: str) -> dict[str, Any]:
    """Of a folder, or of the folder of a prefix; a relative path is looked for where the run was started, too."""
    for base in (Path(), _started_in(run)):
        for folder in (base / path, (base / path).parent):
            file = folder / MANIFEST
            try:
                if file.is_file() and file.stat().st_size < LARGEST_MANIFEST:
                    told = json.loads(file.read_text("utf-8", "replace"))
                    return told if isinstance(told, dict) else {}
            except (OSError, ValueError, RecursionError):
                continue
    return {}


def _started_in(run: Run) -> Path:
    """The folder that `dir` of the config is relative to, if the run still lies where it was made."""
    given, place = Path(str(run.config.get("dir", ""))), run.path.resolve()
    if given.is_absolute() or not given.parts or place.parts[-len(given.parts) :] != given.parts:
        return Path()
    return Path(*place.parts[: -len(given.parts)])


def _split(manifest: dict[str, Any], path: str) -> dict[str, Any]:
    splits = manifest.get("splits")
    splits = splits if isinstance(splits, dict) else {}
    found = splits.get(Path(path).name, splits.get("train"))
    return found if isinstance(found, dict) else {}


def _sources(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """What a folder was made of: {"input", "documents", "bytes"}."""
    told = manifest.get("sources")
    return [{"input": str(s.get("input", "")), **{key: number(s.get(key)) for key in ("documents", "bytes")}}
            for s in (told if isinstance(told, list) else [])[:200] if isinstance(s, dict)]  # fmt: skip
