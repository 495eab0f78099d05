"""Writing one safetensors file: streamed, hashed on the way from memory, durable when this returns. No torch.

The format (https://github.com/huggingface/safetensors): a header's length as 8 bytes, the header as JSON, the tensors end to end.
The library's own writer takes whole tensors as bytes and joins them in memory first, which doubles what a save needs.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megatron_scratch.checkpoint.manifest import DTYPES, File, itemsize

ALIGN = 64  # bytes: chunks begin where any kernel may load them from a mapped file


WRITEBACK = 64 << 20  # bytes that are in the cache before the disk is asked to begin


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

    The hash is of what was in memory, not of what came to lie on the disk. Three things go on at once: a thread hashes (at 1 to 2
    GB/s), this one writes into the system's cache, and a third has the disk begin with what is there, which it else would do at the
    end, while nobody computes.
    """
    digest, size, begun = hashlib.sha256(), 0, 0
    with ThreadPoolExecutor(1) as hasher, ThreadPoolExecutor(1) as disk, open(path, "xb", buffering=0) as f:
        hashed, synced = deque[Future[None]](), disk.submit(int)
        for content in contents:
            hashed.append(hasher.submit(digest.update, content))
            write_all(f.fileno(), content)
            size += content.nbytes
            if len(hashed) > 1:  # a chunk of a device stays on the host until it is hashed
                hashed.popleft().result()
            if size - begun > WRITEBACK and synced.done():
                synced.result()
                begun, synced = size, disk.submit(os.fdatasync, f.fileno())
        synced.result()
        os.fsync(f.fileno())
        for last in hashed:
            last.result()
    return File(size, digest.hexdigest())


def write_all(fd: int, content: memoryview) -> None:
    """`os.write` takes at most 2 GiB, and may take less."""
    done = 0
    while done < content.nbytes:
        done += os.write(fd, content[done : done + (1 << 30)])
