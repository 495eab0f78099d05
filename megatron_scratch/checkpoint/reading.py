"""Reading files once, into the memory that wants them, hashed on the way: what is loaded is what was written, or is not kept.

A file is read from its first byte to its last, as its hash is of all of it. A chunk that a box wants as it lies goes straight
into the box; one that is cut otherwise goes through a buffer of its own size; one that nobody here wants is only hashed.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict, deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from megatron_scratch.checkpoint.manifest import Chunk, CorruptCheckpoint, File, Manifest, check_file, itemsize
from megatron_scratch.checkpoint.plan import Offset, State, as_bytes, boxes

PIECE = 8 << 20  # bytes per read
BEHIND = 8  # pieces that may wait to be hashed
AT_ONCE = 2  # files: one thread's sha256 is slower than what the system has in its cache, or a parallel file system

Target = tuple[tuple[slice, ...], torch.Tensor]  # a part of a chunk -> live memory


def fill(folder: Path, manifest: Manifest, state: State) -> None:
    """Every box of `state`, from the files that hold something of it.

    Raises:
        CorruptCheckpoint: naming the file; what has been filled by then is of no use.
    """
    wanted: dict[str, dict[int, tuple[str, Chunk, list[Target]]]] = defaultdict(dict)
    for name, tensor in state.items():
        for offset, view in boxes(tensor):
            for chunk in manifest.tensors[name].chunks:
                if overlap := _overlap(chunk, offset, tuple(view.shape)):
                    inside, place = overlap
                    targets = wanted[chunk.file].setdefault(chunk.at, (manifest.tensors[name].dtype, chunk, []))[2]
                    targets.append((inside, view[place]))

    def read(name: str) -> None:
        with ThreadPoolExecutor(1) as beside:
            _File(folder / name, manifest.files[name], beside).read([wanted[name][at] for at in sorted(wanted[name])])

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for done in [pool.submit(read, name) for name in sorted(wanted)]:
            done.result()


def _overlap(chunk: Chunk, offset: Offset, shape: Offset) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """What a chunk and a box have in common, as slices of the chunk and of the box."""
    inside, place = [], []
    for begin, size, start, length in zip(chunk.offset, chunk.shape, offset, shape, strict=True):
        low, high = max(begin, start), min(begin + size, start + length)
        if low >= high:
            return None
        inside.append(slice(low - begin, high - begin))
        place.append(slice(low - start, high - start))
    return tuple(inside), tuple(place)


class _File:
    """One pass over a file. Its hash is computed by another thread, while the next piece is read."""

    def __init__(self, path: Path, want: File, beside: ThreadPoolExecutor) -> None:
        self.path, self.want, self.beside = path, want, beside
        self.digest, self.at = hashlib.sha256(), 0
        self.waiting: deque[Future[None]] = deque()

    def read(self, parts: list[tuple[str, Chunk, list[Target]]]) -> None:
        try:
            with open(self.path, "rb", buffering=0) as f:
                for dtype, chunk, targets in parts:
                    self._pass_over(f, chunk.at)
                    self._chunk(f, dtype, chunk, targets)
                self._pass_over(f, self.want.bytes + 1)  # a byte too many is one that was not written
        except OSError as error:
            raise CorruptCheckpoint(f"{self.path}: {error.strerror}") from error
        while self.waiting:
            self.waiting.popleft().result()
        check_file(self.path, self.want, self.at, self.digest.hexdigest())

    def _chunk(self, f: Any, dtype: str, chunk: Chunk, targets: list[Target]) -> None:
        kind = getattr(torch, dtype)
        inside, target = targets[0]
        direct = len(targets) == 1 and tuple(target.shape) == chunk.shape and target.is_contiguous() and target.device.type == "cpu"
        whole = target if direct else torch.empty(chunk.shape, dtype=kind)
        content = memoryview(as_bytes(whole).numpy())
        assert content.nbytes == itemsize(dtype) * whole.numel()
        for begin in range(0, content.nbytes, PIECE):
            piece = content[begin : begin + PIECE]
            self._hash(piece[: self._into(f, piece)])
        if not direct:
            for inside, target in targets:
                target.copy_(whole[inside])

    def _into(self, f: Any, piece: memoryview) -> int:
        done = 0
        while done < piece.nbytes and (got := f.readinto(piece[done:])):
            done += got
        return done

    def _pass_over(self, f: Any, until: int) -> None:
        while self.at < until and (piece := f.read(min(PIECE, until - self.at))):
            self._hash(memoryview(piece))

    def _hash(self, piece: memoryview) -> None:
        self.at += piece.nbytes
        self.waiting.append(self.beside.submit(self.digest.update, piece))
        if len(self.waiting) > BEHIND:
            self.waiting.popleft().result()
