"""What `corpus.input` names: the standard library, local files, folders and globs, URLs through fsspec, Hugging Face datasets.
Always in the same order, each file once."""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_scratch.config.remote import check_url, is_url
from megatron_scratch.util.errors import UserError

STDLIB = "stdlib"  # the corpus that needs no file and no network
STDLIB_SKIP = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
TOPICS = f"{STDLIB}:pydoc_data/topics.py"  # the language reference, 79 documents in one module
DATASETS = "datasets://"  # datasets://NAME?name=CONFIG&split=train, read by the package datasets as a stream
PROBE = 1 << 16  # bytes read at each end of a file to tell whether it changed


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
        """The bytes as they lie, compressed or not; can seek."""
        if self.local:
            return open(self.url, "rb")
        fs, path = filesystem(self.url)
        return fs.open(path, "rb")

    def size(self) -> int:
        """Bytes; 0 for a stream that has none."""
        if self.url.startswith(DATASETS):
            return 0
        if self.local:
            return os.stat(self.url).st_size
        fs, path = filesystem(self.url)
        return int(fs.size(path))

    def probe(self) -> str:
        """sha256 of size, first and last 64 KiB: a changed file is noticed at bounded cost, wherever it lies, whatever its date."""
        size = self.size()
        digest = hashlib.sha256(str(size).encode())
        if self.url.startswith(DATASETS):
            return digest.hexdigest()
        with self.open() as f:
            digest.update(f.read(PROBE))
            f.seek(max(f.tell(), size - PROBE))
            digest.update(f.read())
        return digest.hexdigest()


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
    outside = None if exclude is None else exclude.resolve()
    found: dict[str, SourceFile] = {}
    for entry in map(str, entries):
        for file in _files(entry):
            identity = str(Path(file.url).resolve()) if file.local else file.url
            if outside is None or not file.local or outside not in Path(identity).parents:
                found.setdefault(identity, file)
    return list(found.values())


def _files(entry: str) -> list[SourceFile]:
    if entry == STDLIB:
        return _stdlib()
    if entry.startswith(DATASETS):
        return [SourceFile(entry, entry, entry)]
    if is_url(entry):
        return [SourceFile(url, url, entry) for url in _remote(entry)]
    return [SourceFile(str(p), str(p), entry) for p in _expand(entry)]


def _stdlib() -> list[SourceFile]:
    """Python's own sources without tests; `pydoc_data.topics` first."""
    root = Path(sysconfig.get_path("stdlib"))
    names = [p.relative_to(root) for p in root.rglob("*.py")]
    kept = [n for n in names if not STDLIB_SKIP.intersection(n.parts) and not n.name.startswith("_sysconfigdata")]  # it names paths
    kept.sort(key=lambda n: (n.as_posix() != "pydoc_data/topics.py", n.as_posix()))
    return [SourceFile(f"{STDLIB}:{n.as_posix()}", str(root / n), STDLIB) for n in kept]


def _remote(entry: str) -> list[str]:
    """The files of a URL: one, a folder's, or a glob's; hidden ones are left out as in local folders."""
    check_url("corpus.input", entry)
    try:
        fs, path = filesystem(entry)
        names = fs.glob(path) if glob.has_magic(path) else [path]
        files = sorted({f for name in names for f in (fs.find(name) if fs.isdir(name) else [name] if fs.isfile(name) else [])})
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
    path = Path(entry)
    if path.is_dir():
        files = sorted(_walk(path))
    elif path.is_file():
        files = [path]
    else:
        names = glob.glob(entry, recursive=True)
        files = sorted({p for name in names for p in (_walk(name) if os.path.isdir(name) else [Path(name)])})
    if not files:
        raise UserError(f"corpus.input={entry} {'holds no file' if path.is_dir() else 'does not exist'}; give files, folders, "
                        f"globs, URLs or {STDLIB}")  # fmt: skip
    return files


def _walk(folder: str | Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in names if not name.startswith("."))
