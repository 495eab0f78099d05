"""`PREFIX.meta/`: what an indexed dataset cannot say itself. Megatron passes over it; without it the data opens, unverified.

meta.json       format; bytes and sha256 of .bin, .idx and the columns; the names of the source files; lineage; its own checksum
blocks.npy      (B, 32) u8: sha256 of each 4 MiB of .bin
source.npy      (D,) i64: the file of the input that document i comes from, its place in meta.json's list
place.npy       (D,) i64: its first byte in that file as decompressed, or its row of a table
document.npy    (D,) i64: its number in the input, before anything was removed
id.npy          (D,) i64: hash of its corpus.id_key field; 0 where it has none
copies.npy      (D,) i64: documents that deduplication removed in its favour
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_scratch.data.indexed import paths
from megatron_scratch.data.writer import BLOCK, Checksums, IndexedWriter
from megatron_scratch.util.errors import UserError
from megatron_scratch.util.files import fsync_dir, reserve, sha256_file
from megatron_scratch.util.sealed import changed, write_sealed

FORMAT = 1
COLUMNS = ("source", "place", "document", "id", "copies")
ORIGIN = np.dtype([(name, "<i8") for name in COLUMNS])


def folder_of(prefix: str | Path) -> Path:
    return Path(f"{prefix}.meta")


class SidecarWriter:
    """Append origins of documents as the dataset is written; `commit` after the dataset is there."""

    def __init__(self, prefix: str | Path, documents: int):
        self.prefix, self.documents, self.at = Path(prefix), documents, 0
        self.tmp = self.prefix.with_name(f".{self.prefix.name}.meta.tmp")
        shutil.rmtree(self.tmp, ignore_errors=True)
        self.tmp.mkdir(parents=True)
        self.columns = {name: np.lib.format.open_memmap(self.tmp / f"{name}.npy", "w+", np.dtype("<i8"), (documents,))
                        for name in COLUMNS} if documents else {}  # fmt: skip
        for name in self.columns:
            reserve(self.tmp / f"{name}.npy")

    def add(self, origins: np.ndarray) -> None:
        """(n,) of ORIGIN."""
        for name, column in self.columns.items():
            column[self.at : self.at + len(origins)] = origins[name]
        self.at += len(origins)

    def commit(self, written: IndexedWriter, sources: list[str], lineage: dict[str, Any]) -> None:
        assert self.at == self.documents == written.documents, (self.at, self.documents, written.documents)
        for column in self.columns.values():
            column.flush()
        self.columns = {}
        np.save(self.tmp / "blocks.npy", written.bin_sums.blocks())
        columns = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in sorted(self.tmp.iterdir())}
        write_sealed(self.tmp / "meta.json", {
            "format": FORMAT, "documents": self.documents, "sources": sources, "lineage": lineage,
            "columns": columns, "files": {path.name: {"bytes": sums.size, "sha256": sums.whole.hexdigest()}
                      for path, sums in zip(paths(self.prefix), (written.bin_sums, written.idx_sums), strict=True)}})  # fmt: skip
        final = folder_of(self.prefix)
        shutil.rmtree(final, ignore_errors=True)
        self.tmp.rename(final)
        fsync_dir(final.parent)


class Sidecar:
    """The sidecar of a dataset, mapped. Errors: `UserError` if it is damaged. `Sidecar.of` gives None where there is none."""

    def __init__(self, prefix: str | Path):
        self.prefix, self.folder = Path(prefix), folder_of(prefix)
        try:
            self.meta = json.loads((self.folder / "meta.json").read_text("utf-8"))
            read = [np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in COLUMNS if self.meta["documents"]]
            self.columns = dict(zip(COLUMNS, read or [np.empty(0, "<i8")] * len(COLUMNS), strict=True))
            self.blocks = np.load(self.folder / "blocks.npy", mmap_mode="r")
            whole = all(len(column) == self.meta["documents"] for column in self.columns.values())
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.folder} is damaged ({type(error).__name__}: {error}); copy it again, or delete it: the data "
                            "then opens without checksums and origins") from error  # fmt: skip
        if not whole:
            raise UserError(f"{self.folder} is damaged: its columns have not {self.meta['documents']} rows; copy it again")

    @classmethod
    def of(cls, prefix: str | Path) -> Sidecar | None:
        return cls(prefix) if folder_of(prefix).is_dir() else None

    def origin(self, document: int) -> tuple[str, int, int]:
        """(source file, place in it, copies that went in its favour) of a document."""
        row = {name: int(column[document]) for name, column in self.columns.items()}
        return self.meta["sources"][row["source"]], row["place"], row["copies"]

    def verify(self, say: Callable[[str], Any] = lambda line: None) -> list[str]:
        """Read dataset and sidecar whole; what differs from the checksums, a line each: files, blocks of .bin by their bytes."""
        wrong = []
        if why := changed(self.folder / "meta.json"):
            wrong.append(f"{self.folder / 'meta.json'}: {why}")
        for name, told in self.meta["columns"].items():
            path = self.folder / name
            if not path.is_file() or (path.stat().st_size, sha256_file(path)) != (told["bytes"], told["sha256"]):
                wrong.append(f"{path}: not the {told['bytes']} bytes that were written")
        for path in paths(self.prefix):
            say(str(path))
            wrong += self._verify(path, self.meta["files"][path.name])
        return wrong

    def _verify(self, path: Path, told: dict[str, Any]) -> list[str]:
        sums = Checksums()
        with open(path, "rb") as f:
            while data := f.read(BLOCK):
                sums.update(data)
        if (sums.size, sums.whole.hexdigest()) == (told["bytes"], told["sha256"]):
            return []
        wrong = [f"{path}: {sums.size} bytes with another sha256 than the {told['bytes']} that were written"]
        if path.suffix == ".bin":
            wrong += [f"{path}: bytes {i * BLOCK} to {min(i * BLOCK + BLOCK, sums.size) - 1} changed" for i, (a, b) in
                      enumerate(zip(sums.blocks(), self.blocks, strict=False)) if not np.array_equal(a, b)]  # fmt: skip
        return wrong


def id_hash(value: Any) -> int:
    """What `id.npy` has for a document's own id."""
    return int.from_bytes(hashlib.blake2b(str(value).encode("utf-8", "replace"), digest_size=8).digest(), "little", signed=True)
