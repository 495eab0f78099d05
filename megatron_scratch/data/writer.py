"""Writing an indexed dataset (`indexed.py` has its layout), and the sidecar that says what it holds (`sidecar.py`)."""

from __future__ import annotations

import hashlib
import os
import tempfile
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_scratch.data.indexed import CODES, HEADER, MAGIC, VERSION, paths
from megatron_scratch.util.errors import UserError
from megatron_scratch.util.files import atomic_write

BLOCK = 1 << 22  # bytes of .bin under one checksum
SPOOL = 1 << 20  # lengths held in memory before they go to the spool: memory does not grow with the number of documents
LONGEST = 2**31 - 1  # tokens of a document, by the format


class Checksums:
    """sha256 of a stream, of the whole and of each block of BLOCK bytes."""

    def __init__(self) -> None:
        self.whole, self.block, self.filled, self.size = hashlib.sha256(), hashlib.sha256(), 0, 0
        self.done: list[bytes] = []

    def update(self, data: bytes | memoryview) -> None:
        self.whole.update(data)
        self.size += len(data)
        view = memoryview(data)
        while len(view):
            part = view[: BLOCK - self.filled]
            self.block.update(part)
            self.filled += len(part)
            view = view[len(part) :]
            if self.filled == BLOCK:
                self._close()

    def _close(self) -> None:
        self.done.append(self.block.digest())
        self.block, self.filled = hashlib.sha256(), 0

    def blocks(self) -> np.ndarray:
        """(blocks, 32) u8; call it once, at the end."""
        if self.filled:
            self._close()
        return np.frombuffer(b"".join(self.done), np.uint8).reshape(-1, 32)


class IndexedWriter:
    """Write `PREFIX.bin` and `PREFIX.idx`; both appear whole when the `with` block ends, neither if it raises.

    Attributes: tokens; documents (their numbers); bin_sums, idx_sums (`Checksums`, complete after the block).
    """

    def __init__(self, prefix: str | Path, dtype: Any):
        self.prefix, self.dtype = Path(prefix), np.dtype(dtype).newbyteorder("<")
        if self.dtype not in CODES:
            raise UserError(f"dtype={dtype} cannot hold tokens; allowed: {', '.join(str(d) for d in CODES)}")
        self.lengths = array("i")
        self.tokens = self.sequences = self.documents = 0
        self.bin_sums, self.idx_sums = Checksums(), Checksums()

    def __enter__(self) -> IndexedWriter:
        self.bin_path, self.idx_path = paths(self.prefix)
        self.bin_path.parent.mkdir(parents=True, exist_ok=True)
        self._stack = ExitStack()
        self._idx: IO[Any] = self._stack.enter_context(atomic_write(self.idx_path))  # entered first, renamed last: it commits both
        self._bin: IO[Any] = self._stack.enter_context(atomic_write(self.bin_path))
        self._spool: IO[Any] = self._stack.enter_context(tempfile.TemporaryFile(dir=self.bin_path.parent))
        return self

    def add_document(self, ids: Any) -> None:
        """Append one document of token ids (n,), EOD included by the caller. An empty one is an entry without a sequence."""
        ids = np.asarray(ids)
        if ids.size:
            limit = np.iinfo(self.dtype)
            if ids.ndim != 1 or ids.dtype.kind not in "iu":
                raise UserError(f"{self.prefix}: a document must be a list of whole numbers, got shape {ids.shape} of {ids.dtype}")
            if int(ids.min()) < limit.min or int(ids.max()) > limit.max:
                raise UserError(f"{self.prefix}: token ids {int(ids.min())} to {int(ids.max())} do not fit {self.dtype}; "
                                "write with the type that best_dtype(vocab_size) gives")  # fmt: skip
            if ids.size > LONGEST:
                raise UserError(f"{self.prefix}: a document of {ids.size} tokens; the format allows {LONGEST}; cut it")
        self.add_documents(ids.astype(self.dtype), np.array([ids.size], np.int32))

    def add_documents(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents whose tokens (n,), of the writer's type, lie back to back."""
        assert tokens.dtype == self.dtype and len(tokens) == int(lengths.sum(dtype=np.int64))
        if len(tokens):
            data = memoryview(np.ascontiguousarray(tokens)).cast("B")
            self._bin.write(data)
            self.bin_sums.update(data)
        self.lengths.frombytes(np.ascontiguousarray(lengths, dtype=np.int32).tobytes())
        self.tokens += len(tokens)
        self.documents += len(lengths)
        self.sequences += int(np.count_nonzero(lengths))
        if len(self.lengths) >= SPOOL:
            self._spill()

    def _spill(self) -> None:
        self._spool.write(self.lengths.tobytes())
        self.lengths = array("i")

    def _spooled(self) -> Iterator[np.ndarray]:
        """The lengths of all documents, a block at a time."""
        self._spool.seek(0)
        while data := self._spool.read(4 * SPOOL):
            yield np.frombuffer(data, np.int32)

    def _write_index(self) -> None:
        self._spill()
        self._put(HEADER.pack(MAGIC, VERSION, CODES[self.dtype], self.sequences, self.documents + 1))
        for lengths in self._spooled():
            self._put(lengths[lengths > 0].astype("<i4").tobytes())
        begin = 0
        for lengths in self._spooled():
            ends = begin + np.cumsum(lengths[lengths > 0], dtype=np.int64)
            starts = np.concatenate([np.array([begin], np.int64), ends])[:-1]
            self._put((starts * self.dtype.itemsize).astype("<i8").tobytes())
            begin = int(ends[-1]) if len(ends) else begin
        before = 0
        self._put(np.zeros(1, "<i8").tobytes())
        for lengths in self._spooled():
            counts = before + np.cumsum(lengths > 0, dtype=np.int64)
            self._put(counts.astype("<i8").tobytes())
            before = int(counts[-1])
        self._idx.flush()
        os.fsync(self._idx.fileno())  # a full disk must show before .bin gets its name

    def _put(self, data: bytes) -> None:
        self._idx.write(data)
        self.idx_sums.update(data)

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        if kind is not None:
            self._stack.__exit__(kind, value, trace)  # removes both temporary files
            return
        with self._stack:
            self._write_index()
            self.idx_path.unlink(missing_ok=True)  # an old index must not meet the new .bin
