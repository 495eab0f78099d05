"""torch.distributed.checkpoint on files that hold no code: tensors in safetensors, everything else in one JSON manifest.

DCP's planners decide who writes which part and which parts a new layout has to read. Its own file format is a pickled
`.metadata`, which runs code when read; these two classes replace it. Every file is hashed in memory before it is written,
and hashed again from the very bytes that are loaded.

    step_00000100/
        manifest.json             format, step, tensors -> chunks -> file, files -> bytes + sha256, trainer state
        rank_00000_000.safetensors   chunks that rank 0 wrote, at most FILE_BYTES each
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as dump_safetensors
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,  # fmt: skip
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from megatron_scratch.util.files import fsync_dir, write_json

FORMAT = "megatron_scratch.checkpoint/1"
MANIFEST = "manifest.json"
FILE_BYTES = 2 << 30  # a file is built in memory before it is written: bounds what a save adds to a rank's memory


class CorruptCheckpoint(Exception):
    """A file of a checkpoint is missing, has another size, or other bytes than the manifest says."""


def _chunk_key(index: MetadataIndex) -> str:
    """Name of a chunk in its file: the tensor's name and where the chunk starts in it."""
    return f"{index.fqn}@{','.join(map(str, index.offset or ()))}"


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


class Writer(StorageWriter):
    """Writes this rank's chunks; the coordinator's `finish` writes the manifest. Renaming the folder is the caller's."""

    def __init__(self, folder: Path, rank: int, extra: dict[str, Any]) -> None:
        self.folder, self.rank, self.extra = folder, rank, extra

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results, pending, size, count = [], {}, 0, 0
        for item in plan.items:
            data = planner.resolve_data(item)
            assert isinstance(data, torch.Tensor), f"{item.index.fqn}: only tensors are saved here, the rest is JSON"
            if pending and size + data.nbytes > FILE_BYTES:
                results += self._write_file(count, pending)
                pending, size, count = {}, 0, count + 1
            pending[item.index] = data.detach().cpu().contiguous()
            size += data.nbytes
        if pending:
            results += self._write_file(count, pending)
        return _done(results)

    def _write_file(self, count: int, chunks: dict[MetadataIndex, torch.Tensor]) -> list[WriteResult]:
        name = f"rank_{self.rank:05d}_{count:03d}.safetensors"
        content = dump_safetensors({_chunk_key(index): chunk for index, chunk in chunks.items()})
        entry = {"file": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        with open(self.folder / name, "xb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        return [WriteResult(index, chunk.nbytes, {**entry, "shape": list(chunk.shape)}) for index, chunk in chunks.items()]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        tensors: dict[str, Any] = {}
        for name, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata), name
            dtype = str(entry.properties.dtype).removeprefix("torch.")
            tensors[name] = {"dtype": dtype, "shape": list(entry.size), "chunks": []}
        files = {}
        for result in (r for rank in results for r in rank):
            data = result.storage_data
            chunk = {"offset": list(result.index.offset or ()), "shape": data["shape"], "file": data["file"]}
            tensors[result.index.fqn]["chunks"].append(chunk)
            files[data["file"]] = {"bytes": data["bytes"], "sha256": data["sha256"]}
        manifest = {"format": FORMAT, **self.extra, "files": dict(sorted(files.items())), "tensors": dict(sorted(tensors.items()))}
        write_json(self.folder / MANIFEST, manifest)
        fsync_dir(self.folder)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


class Reader(StorageReader):
    """Reads chunks by global offset for whatever layout asks; each file is verified from the bytes that are used."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        tensors, where = {}, {}
        for name, entry in self.manifest["tensors"].items():
            chunks = []
            for chunk in entry["chunks"]:
                offset = torch.Size(chunk["offset"])
                chunks.append(ChunkStorageMetadata(offset, torch.Size(chunk["shape"])))
                where[MetadataIndex(name, offset)] = chunk["file"]
            properties = TensorProperties(dtype=getattr(torch, entry["dtype"]))
            tensors[name] = TensorStorageMetadata(properties, torch.Size(entry["shape"]), chunks)
        return Metadata(tensors, storage_data=where, storage_meta=StorageMeta())

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.where = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file = defaultdict(list)
        for item in plan.items:
            by_file[self.where[item.storage_index]].append(item)
        for name, items in by_file.items():
            chunks = load_safetensors(read_verified(self.folder, name, self.manifest["files"]))
            for item in items:
                part = chunks[_chunk_key(item.storage_index)]
                for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                    part = part.narrow(dim, start, length)
                target = planner.resolve_tensor(item).detach()
                target.copy_(part)
                planner.commit_tensor(item, target)
        return _done(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a committed checkpoint.

    Raises:
        CorruptCheckpoint: absent, unreadable, of another format, or naming files outside its folder.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorruptCheckpoint(f"{folder / MANIFEST}: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CorruptCheckpoint(f"{folder / MANIFEST}: not of format {FORMAT}")
    for name in manifest["files"]:
        if Path(name).name != name:
            raise CorruptCheckpoint(f"{folder / MANIFEST}: names a file outside its folder: {name!r}")
    return manifest


def read_verified(folder: Path, name: str, files: dict[str, Any]) -> bytes:
    """A file's bytes, if they are the bytes that were written."""
    try:
        content = (folder / name).read_bytes()
    except OSError as error:
        raise CorruptCheckpoint(f"{folder / name}: {error.strerror}") from error
    want = files[name]
    if len(content) != want["bytes"]:
        raise CorruptCheckpoint(f"{folder / name}: {len(content)} bytes, the manifest says {want['bytes']}")
    if hashlib.sha256(content).hexdigest() != want["sha256"]:
        raise CorruptCheckpoint(f"{folder / name}: its sha256 is not the manifest's: the file has changed since it was written")
    return content
