"""Files as decompressed: .gz, .zst, .bz2, .xz. A stream that is cut or damaged is an error, never an early end."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import IO, Any

from megatron_scratch.corpus.sources import SourceFile
from megatron_scratch.util.errors import UserError

COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
CHUNK = 1 << 10  # bytes of .zst decompressed at once: the most that a hostile one makes of them is 32 MiB, held twice


def stem_of(file: SourceFile) -> str:
    """Its name in lower case, without the suffix of a compression."""
    name = file.url.lower()
    return next((name.removesuffix(suffix) for suffix in COMPRESSED if name.endswith(suffix)), name)


@contextmanager
def open_text(file: SourceFile) -> Iterator[IO[bytes]]:
    """The bytes as decompressed."""
    with ExitStack() as stack:
        raw = stack.enter_context(file.open())
        yield stack.enter_context(_decompressed(file, raw))


def _decompressed(file: SourceFile, raw: IO[bytes]) -> Any:
    name = file.url.lower()
    if name.endswith(".gz"):
        return gzip.open(raw, "rb")
    if name.endswith(".bz2"):
        return bz2.open(raw, "rb")
    if name.endswith(".xz"):
        return lzma.open(raw, "rb")
    return io.BufferedReader(_Zstandard(raw, zstandard(file)), 1 << 16) if name.endswith(".zst") else raw


def zstandard(file: SourceFile) -> Any:
    try:
        import zstandard
    except ModuleNotFoundError as error:
        raise UserError(f"{file.name} needs the package zstandard; run: pip install 'megatron-scratch[corpus]'") from error
    return zstandard


class _Zstandard(io.RawIOBase):
    """Frames back to back. zstandard's own `stream_reader` ends without a word where a frame is cut; this raises EOFError."""

    def __init__(self, raw: IO[bytes], module: Any):
        self.raw, self.module = raw, module
        self.frame: Any = None  # the one that has begun
        self.ahead = b""  # of the next
        self.ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.ready:
            data = self.ahead or self.raw.read(CHUNK)
            if not data:
                if self.frame is not None:
                    raise EOFError("the file ends inside a frame")
                return 0
            self._feed(data)
        count = min(len(buffer), len(self.ready))
        buffer[:count], self.ready = self.ready[:count], self.ready[count:]
        return count

    def _feed(self, data: bytes) -> None:
        frame = self.frame or self.module.ZstdDecompressor().decompressobj()
        try:
            self.ready = memoryview(frame.decompress(data))
        except self.module.ZstdError as error:
            raise OSError(f"zstandard: {error}") from error
        self.ahead = frame.unused_data
        self.frame = None if frame.eof else frame
