"""Megatron's indexed dataset, byte for byte: tokens back to back in `PREFIX.bin`, lengths and places in `PREFIX.idx`.

`.idx` is little endian and unaligned (megatron/core/datasets/indexed_dataset.py; N sequences, D = documents + 1):

    0      9 B     MMIDIDX\\0\\0        34       i32[N]  tokens of each sequence
    9      u64     version = 1         34+4N    i64[N]  byte offset of each sequence in .bin
    17     u8      dtype code          34+12N   i64[D]  sequences before each document; 0 first, N last
    18     u64     N                   34+12N+8D  i8[N] mode, in multimodal files only
    26     u64     D

A GPT dataset has one sequence per document, ended by EOD. An empty document is an entry of D and no sequence.
The index is mapped, so opening costs the same for any size. Tokens are read with pread: as fast as a mapping
(5 us a sample), and a file that shrinks under a run gives an error where a mapping gives SIGBUS.
"""

from __future__ import annotations

import hashlib
import os
import struct
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_scratch.util.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # 34 bytes
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # Megatron's codes; 6 and 7 are floats: no tokens
CODES = {np.dtype(name): code for code, name in DTYPES.items()}
U16_VOCAB = 65_500  # Megatron's limit; between it and 65,536 its tools disagree, so we never write u16 there
PROBE_BYTES = 1 << 26  # fingerprint() hashes an index up to this size whole, a larger one at both ends


def best_dtype(vocab_size: int) -> np.dtype:
    """u16 where every id of the vocabulary fits by Megatron's rule (below 65,500), else i32."""
    return np.dtype("<u2") if vocab_size < U16_VOCAB else np.dtype("<i4")


def check_token_ids(ids: np.ndarray, vocab_size: int, where: str) -> None:
    """Raise `UserError` naming dataset (`where`), id and vocabulary if an id is outside [0, vocab_size)."""
    if ids.size == 0 or (0 <= int(ids.min()) and int(ids.max()) < vocab_size):
        return
    bad = ids[(ids < 0) | (ids >= vocab_size)].flat[0]
    raise UserError(f"{where} has token id {int(bad)}, the vocabulary has {vocab_size} ids (0 to {vocab_size - 1}); "
                    "use the tokenizer the data was made with, or raise model.vocab_size")  # fmt: skip


def paths(prefix: str | Path) -> tuple[Path, Path]:
    """(`PREFIX.bin`, `PREFIX.idx`)."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


class IndexedDataset:
    """A pair of files, open for reading. Safe to fork and to pickle. Every array it returns is a copy.

    Attributes: sizes (N,) i32 tokens; offsets (N,) i64 bytes; document_indices (D,) i64; dtype; num_sequences = N;
    num_documents = D - 1; bin_bytes. Errors: `UserError` if a file is missing, damaged, truncated or not this format.
    """

    def __init__(self, prefix: str | Path):
        self.prefix = str(prefix)
        self.bin_path, self.idx_path = paths(prefix)
        for path in (self.bin_path, self.idx_path):
            if not path.is_file():
                raise UserError(f"{path} does not exist; give the path without .bin/.idx, or run: megatron-scratch data prepare")
        self._map_index()
        self._fd = os.open(self.bin_path, os.O_RDONLY)
        self.bin_bytes = os.fstat(self._fd).st_size
        self._check_bin()

    def _map_index(self) -> None:
        size = self.idx_path.stat().st_size
        with open(self.idx_path, "rb") as f:
            head = f.read(HEADER.size)
        if len(head) < HEADER.size or head[:9] != MAGIC:
            raise UserError(f"{self.idx_path} is not a Megatron index: it starts with {head[:9]!r}, expected {MAGIC!r}; "
                            "give the prefix of a dataset made by data prepare or by Megatron's preprocess_data.py")  # fmt: skip
        _, version, code, n, d = HEADER.unpack(head)
        if version != VERSION:
            raise UserError(f"{self.idx_path} has version {version}; allowed: {VERSION}; write it again")
        if code not in DTYPES:
            raise UserError(f"{self.idx_path} has dtype code {code}; allowed: {sorted(DTYPES)} (integers); the file is damaged")
        whole = HEADER.size + 12 * n + 8 * d
        if size not in (whole, whole + n) or d < 1:
            raise UserError(f"{self.idx_path} is truncated or damaged: {size} bytes, {n} sequences and {d} document entries need "
                            f"{whole} (or {whole + n} with modes); copy or prepare it again")  # fmt: skip
        raw = np.memmap(self.idx_path, dtype=np.uint8, mode="r")
        self.dtype, self.num_sequences, self.num_documents, self.idx_bytes = np.dtype(DTYPES[code]), n, d - 1, size
        self.sizes = np.frombuffer(raw, "<i4", n, HEADER.size)
        self.offsets = np.frombuffer(raw, "<i8", n, HEADER.size + 4 * n)
        self.document_indices = np.frombuffer(raw, "<i8", d, HEADER.size + 12 * n)
        if self.document_indices[0] != 0 or self.document_indices[-1] != n:
            raise UserError(f"{self.idx_path} is damaged: documents run from sequence {self.document_indices[0]} to "
                            f"{self.document_indices[-1]}, expected 0 to {n}; copy or prepare it again")  # fmt: skip

    def _check_bin(self) -> None:
        """The size of .bin against the index: the last sequence ends the file. In O(1), unless sequences are out of order."""
        item, expected = self.dtype.itemsize, 0
        if self.num_sequences:
            expected = int(self.offsets[-1]) + int(self.sizes[-1]) * item
            if self.bin_bytes > expected:
                expected = int((self.offsets + self.sizes.astype(np.int64) * item).max())
        if self.bin_bytes != expected:
            wrong = "truncated" if self.bin_bytes < expected else "too long"
            raise UserError(f"{self.bin_path} is {wrong}: {self.bin_bytes} bytes, its index expects {expected}; "
                            "copy both files again, or prepare the data again")  # fmt: skip

    def check_size(self) -> None:
        """Raise `UserError` if either file has another size than when it was opened."""
        for path, size in ((self.bin_path, self.bin_bytes), (self.idx_path, self.idx_bytes)):
            now = path.stat().st_size if path.exists() else 0
            if now != size:
                raise UserError(f"{path} changed while in use: {now} bytes, {size} when opened; restore it and resume the run")

    @cached_property
    def sequence_starts(self) -> np.ndarray:
        """(N + 1,) i64: tokens before each sequence, then all. Reads the sizes once: 8 N bytes of memory."""
        if self.num_sequences and int(self.sizes.min()) < 0:
            raise UserError(f"{self.idx_path} is damaged: a sequence of {int(self.sizes.min())} tokens; copy or prepare it again")
        starts = np.zeros(self.num_sequences + 1, dtype=np.int64)
        np.cumsum(self.sizes, dtype=np.int64, out=starts[1:])
        return starts

    @cached_property
    def document_starts(self) -> np.ndarray:
        """(documents + 1,) i64: tokens before each document, then all."""
        if self.num_documents and int(np.diff(self.document_indices).min()) < 0:
            raise UserError(f"{self.idx_path} is damaged: document indices go down; copy or prepare it again")
        return self.sequence_starts[self.document_indices]

    @cached_property
    def contiguous(self) -> bool:
        """True if the sequences lie in .bin in their order, without gaps (what every writer we know does)."""
        return np.array_equal(self.offsets, self.sequence_starts[:-1] * self.dtype.itemsize)

    @property
    def num_tokens(self) -> int:
        return int(self.sequence_starts[-1])

    def _pread(self, offset: int, count: int) -> np.ndarray:
        """`count` tokens from byte `offset` of .bin."""
        want, pieces = count * self.dtype.itemsize, []
        if offset < 0 or count < 0 or offset + want > self.bin_bytes:
            raise UserError(f"{self.bin_path}: {count} tokens at byte {offset} are outside its {self.bin_bytes} bytes; the index "
                            "is damaged; copy or prepare it again")  # fmt: skip
        while want:  # one pread gives at most 2 GiB
            piece = os.pread(self._fd, want, offset)
            if not piece:
                raise UserError(f"{self.bin_path} is truncated: {offset} bytes, {self.bin_bytes} when opened; restore it")
            pieces.append(piece)
            offset, want = offset + len(piece), want - len(piece)
        return np.frombuffer(b"".join(pieces), self.dtype).copy()

    def read(self, token_start: int, count: int) -> np.ndarray:
        """`count` tokens from token `token_start` of .bin as it lies, whatever the documents: (count,) dtype."""
        return self._pread(token_start * self.dtype.itemsize, count)

    def sequence(self, i: int, start: int = 0, count: int | None = None) -> np.ndarray:
        """Tokens [start, start + count) of sequence i."""
        count = int(self.sizes[i]) - start if count is None else count
        return self._pread(int(self.offsets[i]) + start * self.dtype.itemsize, count)

    def document(self, i: int) -> np.ndarray:
        """All tokens of document i, (n,) dtype; its sequences joined."""
        if not 0 <= i < self.num_documents:
            raise UserError(f"{self.prefix} has no document {i}; allowed: 0 to {self.num_documents - 1}")
        first, end = int(self.document_indices[i]), int(self.document_indices[i + 1])
        if not 0 <= first <= end <= self.num_sequences:
            raise UserError(f"{self.idx_path} is damaged: document {i} is sequences {first} to {end} of {self.num_sequences}")
        return np.concatenate([np.empty(0, self.dtype), *(self.sequence(s) for s in range(first, end))])

    def fingerprint(self) -> str:
        """sha256 that tells datasets apart at bounded cost: the index (a large one at both ends), .bin's size, 64 blocks of it."""
        digest = hashlib.sha256(f"{self.idx_bytes} {self.bin_bytes}".encode())
        with open(self.idx_path, "rb") as f:
            digest.update(f.read(PROBE_BYTES // 2))
            f.seek(max(f.tell(), self.idx_bytes - PROBE_BYTES // 2))
            digest.update(f.read())
        for k in range(64):
            digest.update(os.pread(self._fd, 4096, self.bin_bytes * k // 64))
        return digest.hexdigest()

    def __len__(self) -> int:
        return self.num_documents

    def __reduce__(self) -> tuple[Any, ...]:
        return IndexedDataset, (self.prefix,)

    def __del__(self) -> None:
        if getattr(self, "_fd", None) is not None:
            os.close(self._fd)
            self._fd = None
