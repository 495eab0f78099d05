"""The process that writes beside training: `python -m megatron_scratch.checkpoint.background FD`. No torch: it starts in 0.1 s.

It shares one piece of memory with its rank, FD, in which files lie as they shall be on disk. A job is a line of JSON on its
input, what came of it a line on its output. It dies with its rank. Only the ranks commit: a rank that dies leaves no checkpoint.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_scratch.checkpoint.manifest import CorruptCheckpoint, File, verify_files
from megatron_scratch.checkpoint.shard import write_file
from megatron_scratch.util.machine import outlive_signals, start_helper


def do(job: dict[str, Any], memory: mmap.mmap | None) -> dict[str, Any]:
    """
    {"write": folder, "files": name -> [begin, end) in the shared memory} -> {"files": name -> [bytes, sha256]}
    {"verify": folder, "files": name -> [bytes, sha256]} -> {}: they are so on disk

    and {"error": why not} in place of either.
    """
    try:
        if "verify" in job:
            verify_files(Path(job["verify"]), {name: File(*pair) for name, pair in job["files"].items()})
            return {}
        with memoryview(memory or b"") as view:  # a rank may have nothing that others do not write
            written = {name: write_file(Path(job["write"], name), [view[a:b]]) for name, (a, b) in job["files"].items()}
        return {"files": {name: [file.bytes, file.sha256] for name, file in written.items()}}
    except (OSError, CorruptCheckpoint) as error:
        return {"error": str(error)}


class Background:
    """The other end of it, in the rank: memory to put files into, one job at a time."""

    def __init__(self) -> None:
        # Memory by its file descriptor alone: nothing to name, nothing to clean up, whoever dies first. Not of /dev/shm's size.
        memfd = hasattr(os, "memfd_create")
        self.fd = os.memfd_create("megatron_scratch") if memfd else os.dup(tempfile.TemporaryFile().fileno())
        self.memory: mmap.mmap | None = None
        self.busy = False
        command = [sys.executable, "-m", __name__, str(self.fd)]
        self.process = start_helper(command, pass_fds=(self.fd,))

    def room(self, size: int) -> mmap.mmap:
        """At least `size` bytes; what they held is lost when it has to grow."""
        assert not self.busy
        if self.memory is None or len(self.memory) < size:
            if self.memory is not None:
                self.memory.close()
            os.ftruncate(self.fd, size)
            self.memory = mmap.mmap(self.fd, size)
        return self.memory

    def submit(self, job: dict[str, Any]) -> None:
        assert self.process.stdin is not None and not self.busy
        self.busy = True
        try:
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # `answer` says what has become of it

    def ready(self) -> bool:
        """Whether `answer` would not have to wait."""
        return bool(select.select([self.process.stdout], [], [], 0)[0])

    def answer(self) -> dict[str, Any]:
        """Wait for what comes of the job."""
        assert self.busy and self.process.stdout is not None
        line = self.process.stdout.readline()
        self.busy = False
        return json.loads(line) if line else {"error": f"the background process has ended with {self.process.wait()}"}

    def close(self) -> None:
        """End it; what it was doing is not done."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(BrokenPipeError):  # a job that it has never read
                if pipe is not None:
                    pipe.close()
        if self.memory is not None:
            self.memory.close()
        os.close(self.fd)


def main() -> None:
    outlive_signals()
    os.umask(0o027)
    fd = int(sys.argv[1])
    for line in sys.stdin:
        size = os.fstat(fd).st_size
        memory = mmap.mmap(fd, size, access=mmap.ACCESS_READ) if size else None
        print(json.dumps(do(json.loads(line), memory)), flush=True)
        if memory is not None:
            memory.close()


if __name__ == "__main__":
    main()
