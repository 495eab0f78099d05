"""Raw text to documents: the standard library, text files, JSON lines, folders and globs, always in the same order.

What cannot be read as text is dropped, counted by reason, and named (file, or file:line); nothing stops for one bad line.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import os
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from megatron_scratch.util.errors import UserError

STDLIB = "stdlib"  # the corpus that needs no file and no network
STDLIB_SKIP = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
SAMPLES = 5  # places named per reason
PROBE = 1 << 16  # bytes read at each end of a file to tell whether it changed


@dataclass(frozen=True)
class Document:
    """One text, where it came from, and at which byte of that file (uncompressed) it begins."""

    text: str
    source: str
    offset: int


@dataclass
class Dropped:
    """What was left out: a count per reason, and the first places."""

    counts: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, place: str) -> None:
        self.counts[reason] += 1
        if self.counts[reason] <= SAMPLES:
            self.places.setdefault(reason, []).append(place)

    def as_dict(self) -> dict[str, dict[str, object]]:
        return {reason: {"count": n, "samples": self.places[reason]} for reason, n in sorted(self.counts.items())}


@dataclass(frozen=True)
class SourceFile:
    """One file to read: the name it has in the manifest, where it is, and the input entry that found it."""

    name: str
    path: Path
    entry: str

    def probe(self) -> str:
        """sha256 of size, first and last 64 KiB: a changed file is noticed at bounded cost, wherever it lies, whatever its date."""
        size = self.path.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        with open(self.path, "rb") as f:
            digest.update(f.read(PROBE))
            f.seek(max(f.tell(), size - PROBE))
            digest.update(f.read())
        return digest.hexdigest()


def find_files(given: object, exclude: Path | None = None) -> list[SourceFile]:
    """The files of `corpus.input`, in the order given, sorted inside each entry; each file once.

    Args:
        given: one or a list of: a file, a folder (searched recursively, names that begin with a dot left out), a glob, `stdlib`.
        exclude: a folder that is never read (the output, which may lie inside an input).
    """
    entries = [given] if isinstance(given, (str, Path)) else list(given or [])
    if not entries or "" in entries:
        raise UserError(f"corpus.input={given!r} names nothing; give files, folders, globs or {STDLIB}")
    found: dict[Path, SourceFile] = {}
    for entry in map(str, entries):
        files = _stdlib() if entry == STDLIB else [SourceFile(str(p), p, entry) for p in _expand(entry)]
        for file in files:
            if exclude is None or exclude.resolve() not in file.path.resolve().parents:
                found.setdefault(file.path.resolve(), file)
    return list(found.values())


def _stdlib() -> list[SourceFile]:
    """Python's own sources without tests; `pydoc_data.topics` first, the language reference as 79 documents."""
    root = Path(sysconfig.get_path("stdlib"))
    names = [p.relative_to(root) for p in root.rglob("*.py")]
    kept = [n for n in names if not STDLIB_SKIP.intersection(n.parts) and not n.name.startswith("_sysconfigdata")]  # it names paths
    kept.sort(key=lambda n: (n.as_posix() != "pydoc_data/topics.py", n.as_posix()))
    return [SourceFile(f"{STDLIB}:{n.as_posix()}", root / n, STDLIB) for n in kept]


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
                        f"globs or {STDLIB}")  # fmt: skip
    return files


def _walk(folder: str | Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in names if not name.startswith("."))


def read_documents(files: list[SourceFile], text_key: str, dropped: Dropped) -> Iterator[tuple[SourceFile, Document]]:
    """All documents of the files in order; what cannot be read goes to `dropped`."""
    for file in files:
        for document in _reader(file)(file, text_key, dropped):
            yield file, document


Reader = Callable[[SourceFile, str, Dropped], Iterator[Document]]


def _reader(file: SourceFile) -> Reader:
    if file.name == f"{STDLIB}:pydoc_data/topics.py":
        return _topics
    return _lines if file.path.name.removesuffix(".gz").endswith(".jsonl") else _whole


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")


def _topics(file: SourceFile, text_key: str, dropped: Dropped) -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield Document(text, f"{file.name}#{name}", 0)


def _whole(file: SourceFile, text_key: str, dropped: Dropped) -> Iterator[Document]:
    """A file is one document, unless it holds a NUL byte or is not UTF-8."""
    try:
        with _open(file.path) as f:
            raw = f.read()
    except (OSError, EOFError) as error:
        return dropped.add(f"unreadable file ({type(error).__name__})", file.name)
    if b"\0" in raw:
        return dropped.add("binary file", file.name)
    try:
        yield Document(raw.decode("utf-8"), file.name, 0)
    except UnicodeDecodeError:
        dropped.add("not UTF-8", file.name)


def _lines(file: SourceFile, text_key: str, dropped: Dropped) -> Iterator[Document]:
    """JSON lines: one document a line, in the field `text_key`. Blank lines are no documents."""
    offset = number = 0
    try:
        with _open(file.path) as f:
            for number, raw in enumerate(f, 1):
                if raw.strip():
                    text = _field(raw, text_key)
                    if isinstance(text, _Bad):
                        dropped.add(text.reason, f"{file.name}:{number}")
                    else:
                        yield Document(text, file.name, offset)
                offset += len(raw)
    except (OSError, EOFError) as error:
        dropped.add(f"unreadable file ({type(error).__name__})", f"{file.name}:{number + 1}")


@dataclass(frozen=True)
class _Bad:
    reason: str


def _field(raw: bytes, text_key: str) -> str | _Bad:
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError:
        return _Bad("not UTF-8")
    except (ValueError, RecursionError):
        return _Bad("not JSON")
    if not isinstance(value, dict) or text_key not in value:
        return _Bad(f"no field {text_key!r}")
    text = value[text_key]
    if not isinstance(text, str):
        return _Bad(f"field {text_key!r} is not text")
    try:
        text.encode("utf-8")  # JSON can spell half of a surrogate pair
    except UnicodeEncodeError:
        return _Bad("not UTF-8")
    return text
