"""A folder on this machine or behind a URL, as commands on checkpoints and uploads see it: names, sizes, ranges of bytes. No torch.

One way for both, through fsspec (https://filesystem-spec.readthedocs.io). Nothing is cached: what was listed a moment ago may have
been deleted since, and what is read back after an upload must come from there.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from megatron_scratch.checkpoint import manifest as manifests
from megatron_scratch.checkpoint.manifest import MANIFEST, CorruptCheckpoint, File, Manifest, check_file
from megatron_scratch.config.remote import check_url, is_url
from megatron_scratch.util.errors import RunFailed, UserError

PIECE = 4 << 20  # bytes of one read: a request to S3 takes some 30 ms, whatever it is for
THREADS = 8  # files at a time; what they hold is this times PIECE


@dataclass(frozen=True)
class Place:
    """`path` is what `fs` calls it, `shown` what people do."""

    fs: Any
    path: str
    shown: str

    def __str__(self) -> str:
        return self.shown

    def __truediv__(self, name: str) -> Place:
        return Place(self.fs, f"{self.path}/{name}", f"{self.shown}/{name}")

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def is_local(self) -> bool:
        """A path, not a URL: what has its final name was renamed to it, and is whole."""
        return not is_url(self.shown)

    @property
    def on_disk(self) -> bool:
        """Whether it can be made durable: `file://` is a URL on this machine."""
        protocol = self.fs.protocol
        return "file" in ((protocol,) if isinstance(protocol, str) else protocol)

    def entries(self) -> dict[str, dict[str, Any]]:
        """Name -> what is known of it (`type`, `size`), sorted; of a folder that is not there: nothing."""
        self.fs.invalidate_cache()
        try:
            found = self.fs.ls(self.path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        names = {str(entry["name"]).rstrip("/").rpartition("/")[2]: entry for entry in found}
        return {name: names[name] for name in sorted(names) if name and str(names[name]["name"]).rstrip("/") != self.path}

    def read(self, name: str, at: int = 0, count: int | None = None) -> bytes:
        """`count` bytes of a file from byte `at`; None: all that follow."""
        return bytes(self.fs.cat_file(f"{self.path}/{name}", start=at, end=None if count is None else at + count))

    def steps(self) -> list[int]:
        """Steps that have a folder, oldest first."""
        found = (re.fullmatch(r"step_(\d{8})", name) for name, entry in self.entries().items() if entry["type"] == "directory")
        return [int(match.group(1)) for match in found if match]

    def step(self, step: int) -> Place:
        return self / f"step_{step:08d}"


def open_place(word: str, key: str = "") -> Place:
    """A path or a URL.

    Raises:
        UserError: of a URL, what `config.remote.check_url` refuses.
    """
    if not is_url(word):
        path = word.rstrip("/") or "/"
        return Place(fsspec.filesystem("file"), str(Path(path).absolute()), path)
    check_url(key, word)
    fs = fsspec.filesystem(word.partition("://")[0], use_listings_cache=False)
    return Place(fs, fs._strip_protocol(word).rstrip("/"), word.rstrip("/"))


@contextmanager
def reached(*words: object) -> Iterator[None]:
    """What a file system or a provider's package raises, as one line. These packages have no exception in common.

    Raises:
        RunFailed: it could not be read or written.
    """
    try:
        yield
    except (UserError, RunFailed, CorruptCheckpoint):
        raise
    except Exception as error:
        if not isinstance(error, OSError) and not any(is_url(str(word)) for word in words):
            raise  # no storage behind it: a bug of ours
        raise RunFailed(f"{' and '.join(map(str, words))}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """An exception in one line, with its name where that says more than the words."""
    words = " ".join(str(error).split())
    return words if isinstance(error, (UserError, RunFailed, CorruptCheckpoint)) else f"{type(error).__name__}: {words}"


def checkpoints(place: Place) -> list[Place]:
    """The checkpoints that a user means, oldest first: one itself, or all of a run directory, of a folder of checkpoints.

    Raises:
        UserError: it is none of these.
    """
    entries = place.entries()
    if MANIFEST in entries:
        return [place]
    for root in (place / "checkpoints", place) if "checkpoints" in entries else (place,):
        if steps := committed(root):
            return [root.step(step) for step in steps]
    raise UserError(f"{place} is neither a checkpoint (it has no {MANIFEST}) nor a run or folder with checkpoints")


def committed(root: Place) -> list[int]:
    """Steps with a checkpoint, oldest first. On this machine a rename makes one; elsewhere the manifest, which is put last."""
    return [step for step in root.steps() if root.is_local or MANIFEST in root.step(step).entries()]


def read_manifest(place: Place) -> Manifest:
    """The manifest of a checkpoint, if it is as it was written.

    Raises:
        CorruptCheckpoint: absent, changed, of another format, or at odds with itself.
    """
    try:
        content = place.read(MANIFEST)
    except FileNotFoundError as error:
        raise CorruptCheckpoint(f"{place}/{MANIFEST}: there is none") from error
    return parse_manifest(content, place)


def parse_manifest(content: bytes, place: Place) -> Manifest:
    """As `read_manifest`, of bytes that came from `place`."""
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp) / place.name
        folder.mkdir()
        (folder / MANIFEST).write_bytes(content)
        try:
            return manifests.read(folder)
        except CorruptCheckpoint as error:
            raise CorruptCheckpoint(str(error).replace(str(folder), str(place))) from error


def find_problems(place: Place, manifest: Manifest, progress: Callable[[int], None] = lambda n: None) -> dict[str, str]:
    """Read every file of a checkpoint. Returns file -> what is wrong with it; all that are.

    Args:
        progress: told the number of bytes read, from several threads.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda name: find_problem(place, name, manifest.files[name], progress), sorted(manifest.files))
        return {name: problem for name, problem in zip(sorted(manifest.files), found, strict=True) if problem}


def find_problem(place: Place, name: str, want: File, progress: Callable[[int], None] = lambda n: None) -> str:
    """What is wrong with one file, or an empty string. It is read to its end, a piece at a time.

    Raises:
        OSError, or what the provider's package raises: a remote storage does not answer; that says nothing of the file.
    """
    digest, path = hashlib.sha256(), place / name
    try:
        size = int(place.fs.size(path.path))
        for at in range(0, size if size == want.bytes else 0, PIECE):
            piece = place.read(name, at, min(PIECE, size - at))
            digest.update(piece)
            progress(len(piece))
        check_file(path, want, size, digest.hexdigest())  # type: ignore[arg-type]  # it is only named
    except FileNotFoundError:
        return f"{path}: there is none"
    except CorruptCheckpoint as error:
        return str(error)
    except OSError as error:
        if not place.is_local:
            raise
        return f"{path}: {error.strerror}"  # a disk that cannot be read is damage too
    return ""
