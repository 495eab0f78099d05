"""`data prepare` on a disk that is full or cannot be written to: one line says so; with room again it goes on to the same bytes."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import prepared
import pytest
from hog import fill
from prepared import content, make_corpus

from megatron_scratch.corpus.stages import Outputs
from megatron_scratch.corpus.write import listing
from megatron_scratch.data.sidecar import ORIGIN, SidecarWriter

WORDS = ["corpus.tokenizer=byte", "corpus.spans=line", "corpus.span_chars=10", "corpus.valid_fraction=0.2"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, str]]:
    root = tmp_path_factory.mktemp("whole")
    source = make_corpus(root / "in", files=3, documents=60, words=60)
    done = prepared.prepare(root / "out", f"corpus.input={source}", "corpus.workers=1", *WORDS)
    assert done.returncode == 0, done.stderr
    return f"corpus.input={source}", content(root / "out")


@pytest.mark.parametrize("workers", [1, 2])
def test_full_at_every_stage(workers: int, small_disk: Path, whole: tuple[str, dict[str, str]]) -> None:
    """Each try has a little more room than the one before, and dies a little later."""
    given, wanted = whole
    subprocess.run(["mount", "-o", "remount,size=4M", str(small_disk)], check=True)
    output, failed = small_disk / "out", 0
    for room in (*range(8 << 10, 200 << 10, 32 << 10), *range(256 << 10, 3 << 20, 128 << 10)):
        used = sum(p.stat().st_blocks * 512 for p in output.rglob("*")) if output.exists() else 0
        hog = fill(small_disk, max(0, room - used))
        done = prepared.prepare(output, given, f"corpus.workers={workers}", *WORDS)
        hog.unlink()
        if done.returncode == 0:
            break
        failed += 1
        assert done.returncode in (1, 2), (done.returncode, done.stderr)
        assert done.stderr.count("\n") == 1 and os.strerror(errno.ENOSPC) in done.stderr, done.stderr
    assert done.returncode == 0 and failed >= 5, (failed, done.stderr)
    assert content(output) == wanted


def test_no_names_left(small_disk: Path, whole: tuple[str, dict[str, str]]) -> None:
    """Room enough, and no inode."""
    given, wanted = whole
    for inodes in range(10, 60, 10):
        subprocess.run(["mount", "-o", f"remount,size=16M,nr_inodes={inodes}", str(small_disk)], check=True)
        done = prepared.prepare(small_disk / "out", given, "corpus.workers=1", *WORDS)
        assert done.returncode in (1, 2) and done.stderr.count("\n") == 1 and "No space left on device" in done.stderr, done.stderr
    subprocess.run(["mount", "-o", "remount,nr_inodes=10000", str(small_disk)], check=True)
    assert prepared.prepare(small_disk / "out", given, "corpus.workers=1", *WORDS).returncode == 0
    assert content(small_disk / "out") == wanted


def test_a_disk_that_cannot_be_written_to(small_disk: Path, whole: tuple[str, dict[str, str]]) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    done = prepared.prepare(small_disk / "out", whole[0], *WORDS)
    assert done.returncode == 2
    assert done.stderr == f"error: corpus.output={small_disk}/out cannot be written: Read-only file system; choose another folder\n"


def test_an_output_that_is_a_file(tmp_path: Path, whole: tuple[str, dict[str, str]]) -> None:
    (tmp_path / "out").write_text("precious")
    done = prepared.prepare(tmp_path / "out", whole[0], *WORDS)
    assert done.returncode == 2 and "cannot be written: File exists; choose another folder" in done.stderr
    assert (tmp_path / "out").read_text() == "precious"


def test_no_file_may_grow(tmp_path: Path, whole: tuple[str, dict[str, str]]) -> None:
    """A limit of the system, which workers have, too."""
    given, wanted = whole
    for workers in (1, 2):
        limited = ["prlimit", "--fsize=20000", *prepared.command(tmp_path / "out", given, f"corpus.workers={workers}", *WORDS)]
        done = subprocess.run(limited, capture_output=True, text=True, timeout=prepared.WAIT)
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and "File too large" in done.stderr, done.stderr
        assert done.returncode != -signal.SIGXFSZ
    assert prepared.prepare(tmp_path / "out", given, *WORDS).returncode == 0
    assert content(tmp_path / "out") == wanted


def sidecar(prefix: Path) -> None:
    writer = SidecarWriter(prefix, 100_000)
    writer.add(np.ones(100_000, ORIGIN))


def copies(prefix: Path) -> None:
    listing.copies(Outputs(prefix.parent, 0), [], 1_000_000)


@pytest.mark.parametrize("work", [sidecar, copies])
def test_a_mapped_file_on_a_full_disk(work: Callable[[Path], None], small_disk: Path) -> None:
    """The kernel kills who writes to a page that has no room; it is to be had before."""

    def attempt() -> None:
        try:
            work(small_disk / "train")
        except OSError as error:
            os._exit(error.errno or 0)

    process = multiprocessing.get_context("fork").Process(target=attempt)
    process.start()
    process.join(prepared.WAIT)
    assert process.exitcode == errno.ENOSPC, "-7 is SIGBUS"
