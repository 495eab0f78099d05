"""torch.distributed.checkpoint on files that hold no code: tensors in safetensors, everything else in one JSON manifest.

DCP's planners decide who writes which part and which parts a new layout has to read. Its own file format is a pickled
`.metadata`, which runs code when read; these two classes replace it. Every file is hashed in memory while it is written, and
hashed again from the very bytes that are loaded.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,  # fmt: skip
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from megatron_scratch.checkpoint import manifest as manifests
from megatron_scratch.checkpoint.manifest import Chunk, CorruptCheckpoint, File, Manifest, Saved, check_file
from megatron_scratch.checkpoint.shard import Part, write_shard
from megatron_scratch.util.files import fsync_dir

FILE_BYTES = 512 << 20  # a reader has to hash a whole file to use a part of it


def _chunk_key(index: MetadataIndex) -> str:
    """Name of a chunk in its file: the tensor's name and where the chunk starts in it."""
    return f"{index.fqn}@{','.join(map(str, index.offset or ()))}"


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


def raw(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, on the host."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


class Writer(StorageWriter):
    """Writes this rank's chunks; the coordinator's `finish` writes the manifest. Renaming the folder is the caller's."""

    def __init__(self, folder: Path, rank: int, step: int, extra: dict[str, Any]) -> None:
        self.folder, self.rank, self.step, self.extra = folder, rank, step, extra

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        pending: list[WriteItem] = []
        parts: list[Part] = []
        number = 0
        for item in sorted(plan.items, key=lambda item: _chunk_key(item.index)):  # the same state gives the same files
            part = self._part(item, planner)
            if parts and sum(p.size for p in parts) + part.size > FILE_BYTES:
                results += self._write_file(number, pending, parts)
                pending, parts, number = [], [], number + 1
            pending.append(item)
            parts.append(part)
        if parts:
            results += self._write_file(number, pending, parts)
        return _done(results)

    def _part(self, item: WriteItem, planner: SavePlanner) -> Part:
        assert item.tensor_data is not None, f"{item.index.fqn}: only tensors are saved here, the rest is JSON"
        dtype = str(item.tensor_data.properties.dtype).removeprefix("torch.")
        shape = tuple(item.tensor_data.chunk.sizes)
        return Part(_chunk_key(item.index), dtype, shape, math.prod(shape) * manifests.itemsize(dtype),
                    lambda: raw(planner.resolve_data(item)))  # fmt: skip

    def _write_file(self, number: int, items: list[WriteItem], parts: list[Part]) -> list[WriteResult]:
        name = f"rank_{self.rank:05d}_{number:03d}.safetensors"
        file, begins = write_shard(self.folder / name, parts)
        return [
            WriteResult(item.index, part.size, (file, Chunk(tuple(item.index.offset or ()), part.shape, name, at)))
            for item, part, at in zip(items, parts, begins, strict=True)
        ]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        chunks: dict[str, list[Chunk]] = defaultdict(list)
        files: dict[str, File] = {}
        for result in (r for rank in results for r in rank):
            file, chunk = result.storage_data
            chunks[result.index.fqn].append(chunk)
            files[chunk.file] = file
        tensors = {}
        for name, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata), name
            tensors[name] = Saved(str(entry.properties.dtype).removeprefix("torch."), tuple(entry.size), tuple(chunks[name]))
        manifests.write(self.folder, Manifest(self.step, self.extra, files, tensors))
        fsync_dir(self.folder)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


class Reader(StorageReader):
    """Reads chunks by global offset for whatever layout asks; each file is verified from the bytes that are used."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        tensors, where = {}, {}
        for name, saved in self.manifest.tensors.items():
            boxes = []
            for chunk in saved.chunks:
                offset = torch.Size(chunk.offset)
                boxes.append(ChunkStorageMetadata(offset, torch.Size(chunk.shape)))
                where[MetadataIndex(name, offset)] = chunk
            tensors[name] = TensorStorageMetadata(TensorProperties(getattr(torch, saved.dtype)), torch.Size(saved.shape), boxes)
        return Metadata(tensors, storage_data=where, storage_meta=StorageMeta())

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.where: dict[MetadataIndex, Chunk] = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file = defaultdict(list)
        for item in plan.items:
            by_file[self.where[item.storage_index].file].append(item)
        for name, items in by_file.items():
            content = read_verified(self.folder / name, self.manifest.files[name])
            for item in items:
                chunk, saved = self.where[item.storage_index], self.manifest.tensors[item.storage_index.fqn]
                part = torch.frombuffer(content, dtype=getattr(torch, saved.dtype), count=math.prod(chunk.shape), offset=chunk.at)
                part = part.view(chunk.shape)
                for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                    part = part.narrow(dim, start, length)
                target = planner.resolve_tensor(item).detach()
                target.copy_(part)
                planner.commit_tensor(item, target)
        return _done(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def read_verified(path: Path, want: File) -> bytearray:
    """A file's bytes, if they are the bytes that were written."""
    content = bytearray(want.bytes)
    try:
        with open(path, "rb", buffering=0) as f:
            size = _fill(f, memoryview(content)) + len(f.read(1))
    except OSError as error:
        raise CorruptCheckpoint(f"{path}: {error.strerror}") from error
    check_file(path, want, size, hashlib.sha256(content).hexdigest())
    return content


def _fill(f: Any, view: memoryview) -> int:
    done = 0
    while done < len(view) and (got := f.readinto(view[done:])):
        done += got
    return done
