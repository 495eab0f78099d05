"""Corpora for tests of `data prepare`, and what came out of them, byte for byte."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_scratch.util.files import sha256_file

WAIT = 60.0  # seconds; only a test that fails waits so long


def make_corpus(folder: Path, files: int, documents: int, words: int, seed: int = 1) -> Path:
    """`files` of JSON lines with exact copies, near copies and repeated lines across them, a bad line each, and an evaluation set.
    About 7 bytes a word."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    known = np.array(["".join(map(chr, rng.integers(97, 123, rng.integers(3, 10)))) for _ in range(5000)])
    texts: list[str] = []
    for _ in range(files * documents):
        drawn = rng.choice(known, words)
        if texts and rng.random() < 0.2:
            drawn = np.array(texts[rng.integers(len(texts))].split())
            drawn[: rng.integers(0, 3)] = "changed"
        texts.append("\n".join(" ".join(line) for line in np.array_split(drawn, max(1, words // 12))))
    (folder / "eval.json").write_text(json.dumps({"text": " ".join(texts[1].split()[:30])}) + "\n")
    for k in range(files):
        lines = [json.dumps({"text": text, "id": i}) for i, text in enumerate(texts[k::files])]
        (folder / f"part_{k:03d}.jsonl").write_text("\n".join([*lines[:2], "{oops", *lines[2:]]) + "\n")
    return folder


def content(folder: Path) -> dict[str, str]:
    """sha256 of every file, hidden ones too, but for the lock and the page of the report, which tells times."""
    paths = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in ("report.html", ".lock")]
    return {str(p.relative_to(folder)): sha256_file(p) for p in paths}


def command(output: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "megatron_scratch", "data", "prepare", f"corpus.output={output}", *words]


def prepare(output: Path, *words: str, **given: Any) -> subprocess.CompletedProcess[str]:
    """Run `data prepare` to its end."""
    return subprocess.run(command(output, *words), capture_output=True, text=True, timeout=WAIT, **given)


class Watched:
    """`data prepare` on a terminal of its own; `until(n)` returns when it has counted n things more."""

    def __init__(self, output: Path, *words: str):
        self.output, self.seen, self.buffer = output, [], ""  # type: ignore[var-annotated]
        self.terminal, theirs = os.openpty()
        self.process = subprocess.Popen(command(output, *words), stdin=subprocess.DEVNULL, stdout=theirs, stderr=subprocess.PIPE,
                                        env=os.environ | {"COLUMNS": "200"})  # fmt: skip
        os.close(theirs)

    def counts(self) -> Iterator[str]:
        """ "STAGE: K of N" as they come, until it ends."""
        while True:
            try:
                data = os.read(self.terminal, 1 << 16).decode("utf-8", "replace")
            except OSError:  # EIO: nobody has it open any more
                return
            if not data:
                return
            *whole, self.buffer = (self.buffer + data).replace("\r\n", "\n").replace("\r\x1b[K", "\n").split("\n")
            for line in [*whole, self.buffer]:
                word = line.split(",")[0].strip()
                if " of " in word and ": " in word and word not in self.seen:
                    self.seen.append(word)
                    yield word

    def until(self, n: int) -> bool:
        """False if it ended before."""
        return sum(1 for _ in zip(range(n), self.counts(), strict=False)) == n

    def workers(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in children if b"corpus.work" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def end(self) -> tuple[int, str]:
        """Wait for it: (exit code, what it said on stderr)."""
        for _ in self.counts():
            pass
        said = self.process.communicate(timeout=WAIT)[1].decode()
        os.close(self.terminal)
        return self.process.returncode, said


def all_end(fds: list[int]) -> bool:
    """Whether the processes behind some pidfds end, whoever their parent is by now."""
    poll = select.poll()
    left = set(fds)
    for fd in fds:
        poll.register(fd, select.POLLIN)
    while left and (ready := poll.poll(WAIT * 1000)):
        for fd, _ in ready:
            poll.unregister(fd)
            left.discard(fd)
    for fd in fds:
        os.close(fd)
    return not left
