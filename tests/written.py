"""Checkpoints written by hand: any numbers, any cuts, without a run and without torch."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_scratch.checkpoint import manifest as manifests
from megatron_scratch.checkpoint.manifest import Chunk, Manifest, Saved
from megatron_scratch.checkpoint.shard import Slot, header, write_file

Cuts = Mapping[str, tuple[int, ...]]  # tensor -> into how many parts each dim is cut


def checkpoint(
    root: Path, step: int, tensors: Mapping[str, tuple[str, np.ndarray]], cuts: Cuts | None = None, files: int = 2, **extra: Any
) -> Path:
    """Commit tensors (torch's dtype, numbers as they are stored) as a checkpoint; their chunks are dealt out to `files` files."""
    folder = manifests.step_folder(root, step)
    folder.mkdir(parents=True)
    slots: dict[str, list[tuple[Slot, np.ndarray]]] = {}
    for name, (dtype, array) in tensors.items():
        for number, (offset, part) in enumerate(_parts(array, (cuts or {}).get(name, (1,) * array.ndim))):
            file = f"rank_{(number + len(name)) % files:05d}_000.safetensors"
            slots.setdefault(file, []).append((Slot(name, dtype, offset, part.shape), np.ascontiguousarray(part)))
    written, chunks = {}, {name: [] for name in tensors}
    for file, items in sorted(slots.items()):
        head, begins = header([slot for slot, _ in items])
        contents = [memoryview(head), *(memoryview(part.reshape(-1).view(np.uint8)) for _, part in items)]
        written[file] = write_file(folder / file, contents)
        for (slot, _), at in zip(items, begins, strict=True):
            chunks[slot.name].append(Chunk(slot.offset, slot.shape, file, at))
    saved = {name: Saved(dtype, array.shape, tuple(chunks[name])) for name, (dtype, array) in tensors.items()}
    manifests.write(folder, Manifest(step, extra, written, saved))
    return folder


def _parts(array: np.ndarray, cuts: tuple[int, ...]) -> list[tuple[tuple[int, ...], np.ndarray]]:
    edges = [np.linspace(0, size, n + 1).astype(int) for size, n in zip(array.shape, cuts, strict=True)]
    boxes = itertools.product(*(list(itertools.pairwise(edge.tolist())) for edge in edges))
    return [(tuple(a for a, _ in box), array[tuple(slice(a, b) for a, b in box)]) for box in boxes]


def flip(path: Path, at: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 16
    path.write_bytes(content)
