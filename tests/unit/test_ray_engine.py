"""`corpus.engine=ray` on a real Ray of this machine: the bytes of the local engine, with a worker killed; nothing is left."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_scratch.config.corpus import CorpusConfig
from megatron_scratch.config.launcher import LauncherConfig
from megatron_scratch.corpus.engines.ray import Ray
from megatron_scratch.util.errors import UserError
from megatron_scratch.util.files import sha256_file

TESTS = Path(__file__).resolve().parents[1]
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed: pip install '.[ray]'")


def words(*more: str) -> list[str]:
    """Paths are relative: workers find them all the same."""
    return [sys.executable, "-W", "error", "-m", "megatron_scratch", "data", "prepare", "plugins=[corpus_gate]", "corpus.input=in",
            "corpus.dedup=exact", "corpus.tokenizer=byte", "corpus.valid_fraction=0.1", "corpus.clean=[newlines,length,gate]",
            "corpus.shard_mb=1", *more]  # fmt: skip


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """A short one: the paths of Ray's sockets may have 107 characters."""
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


def environment(ray_folder: Path, gate: Path) -> dict[str, str]:
    env = {**os.environ, "GATE": str(gate), "PYTHONPATH": str(TESTS), "RAY_TMPDIR": str(ray_folder)}
    env.pop("RAY_ADDRESS", None)
    return env


def write_texts(folder: Path) -> None:
    rng = random.Random(3)
    vocabulary = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 9))) for _ in range(3000)]
    folder.mkdir()
    for k in range(3):
        texts = [f"@{k} the first document of this file", *(" ".join(rng.choices(vocabulary, k=60)) for _ in range(1800))]
        (folder / f"{k}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def until(reached: Callable[[], object], what: Callable[[], str], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, what()
        time.sleep(0.1)


def processes(folder: Path) -> list[bytes]:
    """The command lines of Ray's processes that write to this folder, and of its workers."""
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                if str(folder).encode() in (path / "environ").read_bytes() + (path / "cmdline").read_bytes():
                    found.append((path / "cmdline").read_bytes())
            except OSError:
                continue
    return [line.rstrip(b"\0") for line in found if line]


def content(folder: Path) -> dict[str, str]:
    """All files but those that say how long it took."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in (".lock", "report.html")]
    return {str(p.relative_to(folder)): sha256_file(p) for p in files}


@needs_ray
def test_the_bytes_of_the_local_engine_with_a_worker_killed(ray_folder: Path, tmp_path: Path) -> None:
    write_texts(tmp_path / "in")
    env = environment(ray_folder, tmp_path)
    subprocess.run(words("corpus.output=local", "corpus.workers=1"), env=env, cwd=tmp_path, check=True, capture_output=True)
    for k in range(2):
        (tmp_path / f"hold{k}").touch()
    log = tmp_path / "said"
    line = words("corpus.output=ray", "corpus.engine=ray", "corpus.workers=2")
    with open(log, "wb") as f, subprocess.Popen(line, env=env, cwd=tmp_path, stdout=f, stderr=subprocess.STDOUT) as process:
        try:
            held = [tmp_path / f"held{k}" for k in range(2)]
            until(lambda: process.poll() is not None or all(path.exists() for path in held), log.read_text)
            assert process.poll() is None, log.read_text()
            os.kill(int(held[0].read_text()), signal.SIGKILL)
            for path in held:
                path.unlink()
            assert process.wait(120) == 0, log.read_text()
        finally:
            process.kill()
    assert content(tmp_path / "ray") == content(tmp_path / "local") and len(content(tmp_path / "ray")) >= 7
    until(lambda: not processes(ray_folder), lambda: str(processes(ray_folder)), 20)


@needs_ray
def test_what_fails_in_a_worker_is_said_here_and_ray_ends(ray_folder: Path, tmp_path: Path) -> None:
    """Bad input is exit code 2 with file and line."""
    write_texts(tmp_path / "in")
    with open(tmp_path / "in" / "1.jsonl", "a") as f:
        f.write("{oops\n")
    line = words("corpus.output=ray", "corpus.engine=ray", "corpus.on_bad=stop", "corpus.workers=2")
    done = subprocess.run(line, env=environment(ray_folder, tmp_path), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith("error: in/1.jsonl:1802: not JSON"), done.stderr
    until(lambda: not processes(ray_folder), lambda: str(processes(ray_folder)), 20)


@needs_ray
def test_a_command_that_is_told_to_end_takes_its_ray_along(ray_folder: Path, tmp_path: Path) -> None:
    """SIGTERM, while a task runs. (After SIGKILL two of Ray's processes take a minute to notice.)"""
    write_texts(tmp_path / "in")
    (tmp_path / "hold0").touch()
    log, line = tmp_path / "said", words("corpus.output=ray", "corpus.engine=ray", "corpus.workers=2")
    env = environment(ray_folder, tmp_path)
    with open(log, "wb") as f, subprocess.Popen(line, env=env, cwd=tmp_path, stdout=f, stderr=subprocess.STDOUT) as process:
        try:
            until(lambda: process.poll() is not None or (tmp_path / "held0").exists(), log.read_text)
            process.terminate()
            assert process.wait(60) == 75, log.read_text()
        finally:
            process.kill()
    until(lambda: not processes(ray_folder), lambda: str(processes(ray_folder)), 20)


@needs_ray
def test_an_address_where_nobody_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # taken, and nobody listens
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free.getsockname()[1]}")
        monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        with pytest.raises(UserError, match="does not answer"):
            Ray(CorpusConfig(), tmp_path, print, LauncherConfig()).__enter__()


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"megatron-scratch\[ray\]"):
        Ray(CorpusConfig(), tmp_path, print, LauncherConfig())
