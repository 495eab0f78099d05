"""Two hosts for all tests of this folder, and the run that they are compared with."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import TINY, config, run

sys.path.insert(0, str(Path(__file__).parent))

from hosts import STEPS, Hosts, missing  # noqa: E402


@pytest.fixture(scope="session")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Named so that their order as strings is not their order: c10d sorts by name, and gives the second one the first ranks."""
    if reason := missing():
        pytest.skip(reason)
    tag = f"ms{os.getpid()}"
    try:
        made = Hosts(tmp_path_factory.mktemp("netns"), tag, ("host2", "host10"))
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this kernel gives no network namespaces: {error.stderr.decode().strip()}")
    yield made
    made.close()


@pytest.fixture(scope="session")
def oracle(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in four processes here, never killed."""
    path = tmp_path_factory.mktemp("oracle") / "run"
    words = [f"train.steps={STEPS}", f"checkpoint.every={STEPS // 3}"]
    assert run(config(corpus, path, *words, world=4), 4) == [0] * 4
    return path


@pytest.fixture
def words(corpus: Path, tmp_path: Path) -> list[str]:
    return [*TINY, f"data.dir={corpus}", f"dir={tmp_path / 'run'}", f"train.steps={STEPS}", f"checkpoint.every={STEPS // 3}"]
