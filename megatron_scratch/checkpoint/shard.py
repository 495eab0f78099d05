"""Writing one safetensors file: streamed, hashed on the way from memory, durable when this returns. No torch.

The format (https://github.com/huggingface/safetensors): a header's length as 8 bytes, the header as JSON, the tensors end to end.
The library's own writer takes whole tensors as bytes and joins them in memory first, which doubles what a save needs.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megatron_scratch.checkpoint.manifest import DTYPES, File, itemsize

ALIGN = 64  # bytes: chunks begin where any kernel may load them from a mapped file


@dataclass(frozen=True)
class Slot:
    """A place for one chunk of a tensor in a file."""

    name: str  # of the tensor
    dtype: str  # torch's name
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def key(self) -> str:
        """The chunk's name in the file."""
        return f"{self.name}@{','.join(map(str, self.offset))}"

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * itemsize(self.dtype)


def header(slots: Sequence[Slot]) -> tuple[bytes, list[int]]:
    """The bytes before the first tensor, and the byte at which each tensor begins: known before anything is written."""
    entries, at = {}, 0
    for slot in slots:
        entries[slot.key] = {"dtype": DTYPES[slot.dtype][0], "shape": slot.shape, "data_offsets": [at, at := at + slot.bytes]}
    text = json.dumps(entries).encode()
    text += b" " * (-(8 + len(text)) % ALIGN)
    first = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, [first + entry["data_offsets"][0] for entry in entries.values()]


def write_file(path: Path, contents: Iterable[memoryview]) -> File:
    """Write a new file of these bytes, durably. Returns its size and hash.

    The hash is of what was in memory, not of what came to lie on the disk. It is computed beside the writing, by another thread:
    at 1 to 2 GB/s it is faster than most file systems.
    """
    digest, size = hashlib.sha256(), 0
    with ThreadPoolExecutor(1) as beside, open(path, "xb", buffering=0) as f:
        for content in contents:
            hashed = beside.submit(digest.update, content)
            write_all(f.fileno(), content)
            hashed.result()
            size += content.nbytes
        os.fsync(f.fileno())
    return File(size, digest.hexdigest())


def write_all(fd: int, content: memoryview) -> None:
    """`os.write` takes at most 2 GiB, and may take less."""
    done = 0
    while done < content.nbytes:
        done += os.write(fd, content[done : done + (1 << 30)])
