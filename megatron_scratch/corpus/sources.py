"""What `corpus.input` names: the standard library, local files, folders and globs, URLs through fsspec, Hugging Face datasets.
Always in the same order, each file once."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import stat
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import IO, Any

from megatron_scratch.config.remote import check_url, is_url
from megatron_scratch.util.errors import RunFailed, UserError

STDLIB = "stdlib"  # the corpus that needs no file and no network
STDLIB_SKIP = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
TOPICS = f"{STDLIB}:pydoc_data/topics.py"  # the language reference, 79 documents in one module
DATASETS = "datasets://"  # datasets://NAME?name=CONFIG&split=train, read by the package datasets as a stream
PROBE = 1 << 16  # bytes read at each end of a file to tell whether it changed


class NotAFile(OSError):
    """A folder, a pipe, a socket, a device."""


@dataclass(frozen=True)
class SourceFile:
    """One file to read. name: in the manifest; url: a local path or what fsspec opens; entry: the item of corpus.input it is of."""

    name: str
    url: str
    entry: str

    @property
    def local(self) -> bool:
        return not is_url(self.url)

    def open(self) -> IO[bytes]:
        """The bytes as they lie, compressed or not; can seek. A pipe is not opened: it would wait for ever."""
        if self.local:
            _check_regular(self.url)
            return open(self.url, "rb", 1 << 18)  # a line is often longer than the 8 KiB that are usual
        with _told(self.url):
            fs, path = filesystem(self.url)
            return BufferedReader(_Remote(self.url, fs.open(path, "rb")), 1 << 17)

    def size(self) -> int:
        """Bytes; 0 for a stream that has none, and for what is not there."""
        if self.url.startswith(DATASETS):
            return 0
        if self.local:
            return os.stat(self.url).st_size if os.path.isfile(self.url) else 0
        with _told(self.url):
            fs, path = filesystem(self.url)
            size = fs.size(path)
        if size is None:
            raise UserError(f"corpus.input={self.url}: its server does not tell its size; fetch it first")
        return int(size)

    def probe(self) -> str:
        """sha256 of size, first and last 64 KiB: a changed file is noticed at bounded cost, wherever it lies, whatever its date.
        The error's name, where a local file may not be opened: reading it says so."""
        size = self.size()
        digest = hashlib.sha256(str(size).encode())
        if self.url.startswith(DATASETS):
            return digest.hexdigest()
        try:
            with self.open() as f:
                digest.update(f.read(PROBE))
                f.seek(max(f.tell(), size - PROBE))
                digest.update(f.read(PROBE))
        except OSError as error:
            if not self.local:
                raise
            return type(error).__name__
        return digest.hexdigest()

    def stamp(self) -> str:
        """The probe, and when a local file was last written to: what is to stay while tasks read it."""
        if not self.local:
            return self.probe()
        try:
            return f"{os.stat(self.url).st_mtime_ns} {self.probe()}"
        except OSError as error:
            return type(error).__name__

    def check(self, stamp: str) -> None:
        """Errors: `RunFailed` if it is not any more what it was: two states of a file must not be mixed."""
        if self.stamp() != stamp:
            raise RunFailed(f"{self.name} changed while it was read; when it is at rest, run the same command again")


def _check_regular(path: str) -> None:
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        os.listdir(path)  # one that may not be listed says so
    if not stat.S_ISREG(mode):
        raise NotAFile(f"{path} is not a regular file")


@contextmanager
def _told(url: str) -> Iterator[None]:
    """What a remote file system raises, in one line: each has its own kinds, and none says whether it lasts."""
    try:
        yield
    except Exception as error:
        raise RunFailed(f"{url} cannot be read: {type(error).__name__}: {' '.join(str(error).split())[:200]}") from error


class _Remote(RawIOBase):
    """A remote file whose failures are not taken for damage of what it holds: that would be left out, and a network comes back."""

    def __init__(self, url: str, file: Any):
        self.url, self.file = url, file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        with _told(self.url):
            return int(self.file.seek(offset, whence))

    def readinto(self, buffer: Any) -> int:
        with _told(self.url):
            data = self.file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self.file.close()
        super().close()


def filesystem(url: str) -> tuple[Any, str]:
    """(fsspec's filesystem, the path in it) of a URL."""
    import fsspec

    return fsspec.core.url_to_fs(url)


def find_files(given: object, exclude: Path | None = None) -> list[SourceFile]:
    """The files of `corpus.input`, in the order given, sorted inside each entry; each file once.

    Args:
        given: an entry or a list of them.
        exclude: a folder whose files are not input (the output may lie inside an input).
    """
    entries = [given] if isinstance(given, (str, Path)) else list(given or [])  # type: ignore[call-overload]
    if not entries or "" in entries:
        raise UserError(f"corpus.input={given!r} names nothing; give files, folders, globs, URLs or {STDLIB}")
    outside = "" if exclude is None else os.path.realpath(exclude)
    found: dict[str, SourceFile] = {}
    for entry in map(str, entries):
        for file in _files(entry):
            identity = os.path.realpath(file.url) if file.local else file.url
            if not outside or not file.local or not identity.startswith(outside + os.sep):
                found.setdefault(identity, file)
    if not found:
        raise UserError(f"corpus.input={given} holds no file that is not in the output {exclude}; give another folder")
    return list(found.values())


def _files(entry: str) -> list[SourceFile]:
    if entry == STDLIB:
        return _stdlib()
    if entry.startswith(DATASETS):
        return [SourceFile(entry, entry, entry)]
    if entry.startswith("file://"):
        check_url("corpus.input", entry)
        return [SourceFile(_shown(p), str(p), entry) for p in _expand(entry.removeprefix("file://"))]
    if is_url(entry):
        return [SourceFile(url, url, entry) for url in _remote(entry)]
    return [SourceFile(_shown(p), str(p), entry) for p in _expand(entry)]


def _shown(path: Path) -> str:
    """A name that can be printed and written as UTF-8, whatever bytes it is of."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _stdlib() -> list[SourceFile]:
    """Python's own sources without tests; `pydoc_data.topics` first."""
    root = Path(sysconfig.get_path("stdlib"))
    names = [p.relative_to(root) for p in root.rglob("*.py")]
    kept = [n for n in names if not STDLIB_SKIP.intersection(n.parts) and not n.name.startswith("_sysconfigdata")]  # it names paths
    kept.sort(key=lambda n: (n.as_posix() != "pydoc_data/topics.py", n.as_posix()))
    return [SourceFile(f"{STDLIB}:{n.as_posix()}", str(root / n), STDLIB) for n in kept]


def _remote(entry: str) -> list[str]:
    """The files of a URL: one, a folder's, or a glob's; hidden ones are left out as in local folders."""
    check_url("corpus.input", re.sub("@[^/]*", "", entry) if entry.startswith("hf://") else entry)  # @ is a revision there
    try:
        fs, path = filesystem(entry)
        names = fs.glob(path) if glob.has_magic(path) and not fs.exists(path) else [path]
        files = sorted({f for name in names for f in ([name] if fs.isfile(name) else fs.find(name) if fs.isdir(name) else [])})
    except Exception as error:  # each filesystem has its own: no such bucket, no credentials, no network
        raise UserError(
            f"corpus.input={entry} cannot be listed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from error
    root = str(path).rstrip("/")
    files = [f for f in files if not any(part.startswith(".") for part in f.removeprefix(root).split("/"))]
    if not files:
        raise UserError(f"corpus.input={entry} holds no file; give files, folders or globs")
    return [fs.unstrip_protocol(f) for f in files]


def _expand(entry: str) -> list[Path]:
    """The files of a path or glob, sorted. What is no file and no folder is refused where it is named itself."""
    folder = os.path.isdir(entry)
    if not folder and os.path.lexists(entry) and os.path.exists(entry) and not os.path.isfile(entry):
        raise UserError(f"corpus.input={entry} is a pipe, a socket or a device; write its content to a file, and give that")
    names = [entry] if folder or os.path.isfile(entry) else glob.glob(entry, recursive=True)
    files = sorted({p for name in names for p in (_walk(name) if os.path.isdir(name) else [Path(name)])})
    if not files:
        raise UserError(f"corpus.input={entry} {'holds no file' if folder else 'does not exist'}; give files, folders, "
                        f"globs, URLs or {STDLIB}")  # fmt: skip
    return files


def _walk(folder: str | Path) -> Iterator[Path]:
    """The files below a folder, without hidden ones; links are followed, each real folder once, so that they may make a circle.
    A folder that may not be listed comes out itself: it counts as a file that cannot be read, and on_bad says what then."""
    closed: list[OSError] = []
    seen = {os.path.realpath(folder)}
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=closed.append):
        folders[:] = [name for name in sorted(folders) if not name.startswith(".") and _new(os.path.join(parent, name), seen)]
        yield from (Path(parent, name) for name in names if not name.startswith("."))
    yield from (Path(error.filename) for error in closed)


def _new(folder: str, seen: set[str]) -> bool:
    """Whether a folder was not seen, under whatever name; from now on it was."""
    real = os.path.realpath(folder)
    fresh = real not in seen
    seen.add(real)
    return fresh
