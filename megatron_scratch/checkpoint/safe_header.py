"""Reading a model folder that somebody else made: config.json, an index, safetensors headers. No torch, nothing is believed.

The format (https://github.com/huggingface/safetensors): a header's length as 8 bytes, the header as JSON, the tensors end to end.
A folder is read whole only if all of it is sound: plain files inside the folder, every byte of a file one tensor's, every
tensor in one file. What a file says is compared with what it is before memory is taken for it.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_scratch.checkpoint.manifest import DTYPES, Chunk, Saved, itemsize
from megatron_scratch.util.errors import UserError

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
CONFIG_BYTES = 1 << 20  # the largest published ones have some 10 KB
INDEX_BYTES = 64 << 20  # of 10^6 tensors
HEADER_BYTES = 100_000_000  # the library's own limit
DEPTH = 16  # of braces and brackets; published ones have 3
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
NAMES = {theirs: ours for ours, (theirs, _) in DTYPES.items()}  # BF16 -> bfloat16


@dataclass(frozen=True)
class Archive:
    """`tensors`: name -> where it lies, for `manifest.tensor(folder, saved)`."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Saved]


def read_archive(folder: Path) -> Archive:
    """Everything of a folder but the numbers.

    Raises:
        UserError: it is not a folder of config.json and safetensors, or anything in it is not what it says it is.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give one with config.json and *.safetensors")
    config = read_json(folder / CONFIG, CONFIG_BYTES)
    listed = _index(folder) if os.path.lexists(folder / INDEX) else None
    files = sorted(set(listed.values())) if listed is not None else [_only_file(folder)]
    tensors: dict[str, Saved] = {}
    for name in files:
        for key, saved in read_header(folder / name).items():
            if key in tensors:
                raise UserError(f"{folder}: the tensor {key!r} is in {tensors[key].chunks[0].file} and in {name}; allowed: once")
            if listed is not None and listed.get(key) != name:
                raise UserError(f"{folder / name} has a tensor {key!r} that {INDEX} does not place there; make the index anew")
            tensors[key] = saved
    for key, name in (listed or {}).items():
        if key not in tensors:
            raise UserError(f"{folder / INDEX} places the tensor {key!r} in {name}, which does not have it; get the folder anew")
    return Archive(folder, config, tensors)


def plain_file(path: Path) -> int:
    """The size of a file that is a file, not something that stands for one.

    Raises:
        UserError: it is absent, a link, a folder, a pipe or a device.
    """
    try:
        found = os.lstat(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a folder that has it") from error
    if stat.S_ISLNK(found.st_mode):
        raise UserError(f"{path} is a symbolic link, which may lead anywhere; copy the folder with `cp -rL` and give the copy")
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path} is not a plain file; allowed: plain files")
    return found.st_size


def read_json(path: Path, limit: int) -> dict[str, Any]:
    """A JSON object from a plain file of at most `limit` bytes.

    Raises:
        UserError: also for a key given twice, NaN and Infinity, and nesting deeper than `DEPTH`.
    """
    if (size := plain_file(path)) > limit:
        raise UserError(f"{path} has {size} bytes; allowed: at most {limit}")
    with _opened(path) as f:
        return parse(f.read(limit + 1), str(path))


def _opened(path: Path) -> Any:
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")


def parse(content: bytes, where: str) -> dict[str, Any]:
    """Strict JSON, an object."""
    if _depth(content) > DEPTH:
        raise UserError(f"{where} is nested deeper than {DEPTH}; allowed: at most {DEPTH}")
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_once, parse_constant=_refuse_constant)
    except ValueError as error:  # of bytes that are no UTF-8, too
        raise UserError(f"{where} is not sound JSON: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(value, dict):
        raise UserError(f"{where} holds {type(value).__name__}; allowed: an object")
    return value


def _depth(content: bytes) -> int:
    """Counted without a parser, which would recurse; in linear time, also where a string never ends."""
    depth = deepest = 0
    outside = re.sub(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', b"", content, flags=re.DOTALL)  # of strings
    for byte in outside.translate(None, bytes(set(range(256)) - set(b"[]{}"))):
        depth += 1 if byte in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} is there twice")
    return out


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is no number")


def _index(folder: Path) -> dict[str, str]:
    """Tensor -> file, as the index says; the files' names are names."""
    where = folder / INDEX
    listed = read_json(where, INDEX_BYTES).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise UserError(f"{where} has no weight_map of tensor names to file names; get the folder anew")
    for name in set(listed.values()):
        if Path(name).name != name or name in ("", ".", "..") or "\\" in name or "\0" in name:
            raise UserError(f"{where} names {name!r}; allowed: names of files beside it, without a path")
        if not name.endswith(".safetensors"):
            raise _pickled(folder, name) if name.endswith(PICKLED) else UserError(f"{where} names {name!r}; allowed: *.safetensors")
    return listed


def _only_file(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir())
    found = [name for name in names if name.endswith(".safetensors")]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{folder} has {len(found)} safetensors files and no {INDEX} that says what is where; get the folder anew")
    if pickled := [name for name in names if name.endswith(PICKLED)]:
        raise _pickled(folder, pickled[0])
    raise UserError(f"{folder} has no *.safetensors; give a folder with config.json and *.safetensors")


def _pickled(folder: Path, name: str) -> UserError:
    return UserError(f"{folder / name} is pickled: opening it could run anything, so it is never opened; convert it where that "
                     "does not matter (transformers: save_pretrained), and give the folder of the result")  # fmt: skip


def read_header(path: Path) -> dict[str, Saved]:
    """What a safetensors file holds, name -> where. Its size and its header account for every byte.

    Raises:
        UserError: anything else.
    """
    size = plain_file(path)
    with _opened(path) as f:
        first = f.read(8)
        length = int.from_bytes(first, "little")
        if len(first) < 8 or length > size - 8:
            raise UserError(f"{path} says that its header has {length} bytes, and has {size} altogether; get it anew")
        if length > HEADER_BYTES:
            raise UserError(f"{path} says that its header has {length} bytes; allowed: at most {HEADER_BYTES}")
        entries = parse(f.read(length), f"the header of {path}")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UserError(f"the header of {path} has a __metadata__ that is not text; get it anew")
    data = size - 8 - length
    spans = {name: _span(name, entry, data, path) for name, entry in entries.items()}
    at = 0
    for name, (_, _, begin, end) in sorted(spans.items(), key=lambda item: item[1][2:]):
        if begin != at:
            raise UserError(f"{path}: the tensor {name!r} begins at byte {begin}, and what comes before ends at {at}; "
                            "allowed: end to end, without overlaps and holes")  # fmt: skip
        at = end
    if at != data:
        raise UserError(f"{path} has {data} bytes of tensors, and its header accounts for {at}; get it anew")
    return {name: Saved(dtype, shape, (Chunk((0,) * len(shape), shape, path.name, 8 + length + begin),))
            for name, (dtype, shape, begin, _) in spans.items()}  # fmt: skip


def _span(name: str, entry: Any, data: int, path: Path) -> tuple[str, tuple[int, ...], int, int]:
    """(dtype, shape, begin, end) of one tensor among `data` bytes of them."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"{path}: the tensor {name!r} has other facts than dtype, shape and data_offsets; get it anew")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in NAMES:
        raise UserError(f"{path}: the tensor {name!r} is of dtype {entry['dtype']!r}; allowed: {', '.join(NAMES)}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not all(isinstance(part, list) and all(type(n) is int and n >= 0 for n in part) for part in (shape, offsets)):
        raise UserError(f"{path}: the tensor {name!r} has a shape or offsets that are not lists of whole numbers; get it anew")
    if len(offsets) != 2 or not offsets[0] <= offsets[1] <= data:
        raise UserError(f"{path}: the tensor {name!r} lies at {offsets} of {data} bytes; allowed: inside, begin before end")
    dtype = NAMES[entry["dtype"]]
    if math.prod(shape) * itemsize(dtype) != offsets[1] - offsets[0]:
        raise UserError(f"{path}: the tensor {name!r} of shape {shape} in {entry['dtype']} has {offsets[1] - offsets[0]} bytes; "
                        f"allowed: {math.prod(shape) * itemsize(dtype)}")  # fmt: skip
    return dtype, tuple(shape), offsets[0], offsets[1]
