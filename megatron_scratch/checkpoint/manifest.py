"""What a checkpoint is made of, and whether it still is: one JSON file that protects itself and every other file. No torch.

    step_00000100/
        manifest.json                format, step, tensors -> chunks -> file, files -> bytes + sha256, what else the run remembers
        rank_00000_000.safetensors   chunks that rank 0 wrote

The manifest's last key is the sha256 of all bytes before it: a flipped bit in it is seen, whatever it would have meant.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_scratch.util.files import CHUNK, atomic_write

FORMAT = "megatron_scratch.checkpoint/2"
MANIFEST = "manifest.json"

# torch's name -> (the name in a safetensors header, what numpy reads it as: numpy has no bfloat16 and no 8-bit floats)
DTYPES = {
    "float64": ("F64", "<f8"), "float32": ("F32", "<f4"), "float16": ("F16", "<f2"), "bfloat16": ("BF16", "<u2"),
    "float8_e4m3fn": ("F8_E4M3", "u1"), "float8_e5m2": ("F8_E5M2", "u1"), "int64": ("I64", "<i8"), "int32": ("I32", "<i4"),
    "int16": ("I16", "<i2"), "int8": ("I8", "i1"), "uint8": ("U8", "u1"), "bool": ("BOOL", "?"),
}  # fmt: skip


class CorruptCheckpoint(Exception):
    """A file of a checkpoint is missing, has another size, or other bytes than the manifest says."""


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor: `shape` numbers from `offset`, which lie in `file` from byte `at`, contiguous."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    at: int


@dataclass(frozen=True)
class Saved:
    """One global tensor: its chunks do not overlap and leave nothing out."""

    dtype: str  # torch's name without "torch."
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * itemsize(self.dtype)


@dataclass(frozen=True)
class File:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """`extra`: what else the run remembers (data position, scaler, what it is a run of), as JSON."""

    step: int
    extra: Mapping[str, Any]
    files: Mapping[str, File]
    tensors: Mapping[str, Saved]


def itemsize(dtype: str) -> int:
    return np.dtype(DTYPES[dtype][1]).itemsize


def step_folder(root: Path, step: int) -> Path:
    return root / f"step_{step:08d}"


def committed(root: Path) -> list[int]:
    """Steps with a committed checkpoint, oldest first."""
    found = (re.fullmatch(r"step_(\d{8})", p.name) for p in root.iterdir()) if root.is_dir() else ()
    return sorted(int(m.group(1)) for m in found if m)


def write(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json`, durably."""
    tensors = {name: asdict(saved) for name, saved in sorted(manifest.tensors.items())}
    files = {name: asdict(file) for name, file in sorted(manifest.files.items())}
    value = {"format": FORMAT, "step": manifest.step, **manifest.extra, "files": files, "tensors": tensors}
    # One tensor a line: a page for people, half the size of full indentation.
    lines = [f' "{key}": {_json(item) if key not in ("files", "tensors") else _table(item)}' for key, item in value.items()]
    body = ("{\n" + ",\n".join(lines)).encode()
    with atomic_write(folder / MANIFEST) as f:
        f.write(body + _seal(body))


def _json(value: Any) -> str:
    return json.dumps(value, allow_nan=False)


def _table(rows: Mapping[str, Any]) -> str:
    return "{" + ",".join(f"\n  {_json(name)}: {_json(row)}" for name, row in rows.items()) + "\n }"


def _seal(body: bytes) -> bytes:
    return f',\n "sha256": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()


SEAL_BYTES = len(_seal(b""))


def read(folder: Path) -> Manifest:
    """The manifest of a committed checkpoint, if it is as it was written and belongs to this folder.

    Raises:
        CorruptCheckpoint: absent, changed, of another format, or at odds with itself.
    """
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CorruptCheckpoint(f"{path}: {error.strerror}") from error
    body = content[:-SEAL_BYTES]
    if content[-SEAL_BYTES:] != _seal(body):
        found = re.match(rb'\{\s*"format": "([\w./]{1,80})"', content)
        old = found is not None and found.group(1).decode() != FORMAT
        raise CorruptCheckpoint(f"{path}: " + (f"of format {found.group(1).decode()}, not {FORMAT}" if found and old else
                                "its sha256 is not its own: it has changed since it was written"))  # fmt: skip
    try:
        return _parse(json.loads(content), path)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptCheckpoint(f"{path}: not a manifest ({type(error).__name__}: {error})") from error


def _parse(value: dict[str, Any], path: Path) -> Manifest:
    if value["format"] != FORMAT:
        raise CorruptCheckpoint(f"{path}: of format {value['format']!r}, not {FORMAT}")
    files = {name: File(int(f["bytes"]), str(f["sha256"])) for name, f in value["files"].items()}
    tensors = {name: Saved(t["dtype"], tuple(t["shape"]), tuple(Chunk(tuple(c["offset"]), tuple(c["shape"]), c["file"], c["at"])
               for c in t["chunks"])) for name, t in value["tensors"].items()}  # fmt: skip
    extra = {k: v for k, v in value.items() if k not in ("format", "step", "files", "tensors", "sha256")}
    manifest = Manifest(int(value["step"]), extra, files, tensors)
    for problem in _problems(manifest, path.parent):
        raise CorruptCheckpoint(f"{path}: {problem}")
    return manifest


def _problems(manifest: Manifest, folder: Path) -> Iterator[str]:
    """What a manifest says that cannot be. A seal keeps accidents out, not a manifest that somebody made up."""
    if re.fullmatch(r"step_\d{8}", folder.name) and folder.name != f"step_{manifest.step:08d}":
        yield f"is of step {manifest.step}, and lies in a folder of another"
    for name in manifest.files:
        if Path(name).name != name or name in ("", ".", "..", MANIFEST) or "\\" in name:
            yield f"names a file outside its folder: {name!r}"
    for name, saved in manifest.tensors.items():
        if saved.dtype not in DTYPES:
            yield f"{name}: dtype {saved.dtype!r}"
            continue
        for chunk in saved.chunks:
            if chunk.file not in manifest.files:
                yield f"{name}: in {chunk.file!r}, which is not in the list of files"
            elif chunk.at < 0 or chunk.at + math.prod(chunk.shape) * itemsize(saved.dtype) > manifest.files[chunk.file].bytes:
                yield f"{name}: lies outside of {chunk.file}"
            box = list(zip(chunk.offset, chunk.shape, saved.shape, strict=True))
            if any(o < 0 or n < 0 or o + n > size for o, n, size in box):
                yield f"{name}: a chunk of {list(chunk.shape)} from {list(chunk.offset)} in {list(saved.shape)}"
        if sum(math.prod(chunk.shape) for chunk in saved.chunks) != math.prod(saved.shape):
            yield f"{name}: its chunks are not the whole tensor"


def verify(folder: Path, part: int = 0, parts: int = 1) -> Manifest:
    """Check every `parts`-th file from `part` against the manifest, 1 MiB at a time, and return the manifest.

    Raises:
        CorruptCheckpoint: naming the file.
    """
    manifest = read(folder)
    verify_files(folder, {name: manifest.files[name] for name in sorted(manifest.files)[part::parts]})
    return manifest


def verify_files(folder: Path, files: Mapping[str, File]) -> None:
    """Read files, and compare them with what they should be."""
    for name, want in files.items():
        digest, size = hashlib.sha256(), 0
        try:
            with open(folder / name, "rb", buffering=0) as f:
                while piece := f.read(CHUNK):
                    digest.update(piece)
                    size += len(piece)
        except OSError as error:
            raise CorruptCheckpoint(f"{folder / name}: {error.strerror}") from error
        check_file(folder / name, want, size, digest.hexdigest())


def check_file(path: Path, want: File, size: int, sha256: str) -> None:
    """
    Raises:
        CorruptCheckpoint: size or hash are not what the manifest says.
    """
    if size != want.bytes:
        raise CorruptCheckpoint(f"{path}: {size} bytes, the manifest says {want.bytes}")
    if sha256 != want.sha256:
        raise CorruptCheckpoint(f"{path}: its sha256 is not the manifest's: the file has changed since it was written")


def tensor(folder: Path, saved: Saved) -> np.ndarray:
    """A whole tensor, put together from its chunks; bfloat16 and 8-bit floats as unsigned integers of their bits.

    Only what was asked for is read. It is not verified again: call `verify` first.
    """
    dtype = np.dtype(DTYPES[saved.dtype][1])
    out = np.empty(saved.shape, dtype)
    for chunk in saved.chunks:
        place = tuple(slice(o, o + n) for o, n in zip(chunk.offset, chunk.shape, strict=True))
        count = math.prod(chunk.shape)
        out[place] = np.fromfile(folder / chunk.file, dtype, count, offset=chunk.at).reshape(chunk.shape)
    return out


def newest_valid(root: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest committed checkpoint whose every file is as written, and {newer folder: what is wrong with it}."""
    problems: dict[Path, str] = {}
    for step in reversed(committed(root)):
        folder = step_folder(root, step)
        try:
            verify(folder)
            return folder, problems
        except CorruptCheckpoint as error:
            problems[folder] = str(error)
    return None, problems
