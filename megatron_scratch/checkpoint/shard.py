"""Writing one safetensors file: streamed, hashed on the way from memory, durable when this returns. No torch.

The format (https://github.com/huggingface/safetensors): a header's length as 8 bytes, the header as JSON, the tensors end to end.
The library's own writer takes whole tensors as bytes and joins them in memory first, which doubles what a save needs.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megatron_scratch.checkpoint.manifest import DTYPES, File

ALIGN = 64  # bytes: chunks begin where any kernel may load them from a mapped file


@dataclass(frozen=True)
class Part:
    """One tensor to be in a file. `bytes` may be asked for once, when its turn comes: a chunk is on the host only while written."""

    key: str
    dtype: str  # torch's name
    shape: tuple[int, ...]
    size: int
    bytes: Callable[[], memoryview]


def header(parts: Sequence[Part]) -> tuple[bytes, list[int]]:
    """The bytes before the first tensor, and the byte at which each tensor begins."""
    entries, at = {}, 0
    for part in parts:
        entries[part.key] = {"dtype": DTYPES[part.dtype][0], "shape": list(part.shape), "data_offsets": [at, at + part.size]}
        at += part.size
    text = json.dumps(entries).encode()
    text += b" " * (-(8 + len(text)) % ALIGN)
    first = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, [first + entry["data_offsets"][0] for entry in entries.values()]


def write_shard(path: Path, parts: Sequence[Part]) -> tuple[File, list[int]]:
    """Write a new file. Returns its size and hash, and where each part begins.

    The hash is of what was in memory, not of what came to lie on the disk. It is computed beside the writing, by another thread:
    at 1 to 2 GB/s it is faster than most file systems.
    """
    head, begins = header(parts)
    digest, size = hashlib.sha256(), 0
    with ThreadPoolExecutor(1) as beside, open(path, "xb", buffering=0) as f:
        for view in (lambda: memoryview(head), *(part.bytes for part in parts)):
            content = view()
            hashed = beside.submit(digest.update, content)
            write_all(f.fileno(), content)
            hashed.result()
            size += content.nbytes
        os.fsync(f.fileno())
    return File(size, digest.hexdigest()), begins


def write_all(fd: int, content: memoryview) -> None:
    """`os.write` takes at most 2 GiB, and may take less."""
    done = 0
    while done < content.nbytes:
        done += os.write(fd, content[done : done + (1 << 30)])
