"""One cluster of three nodes for all tests of this folder."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from cluster import CORE, Cluster  # noqa: E402
from jobs import STEPS  # noqa: E402
from runs import config, run  # noqa: E402


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    missing = [name for name in CORE if shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin") is None]
    if missing:
        pytest.skip(f"{missing[0]} is not installed: apt-get install --no-install-recommends slurm-wlm munge iproute2")
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw")
    made = Cluster(tmp_path_factory.mktemp("slurm"), f"t{worker}n")
    made.sh("start")
    try:
        yield made
    finally:
        made.sh("stop")


@pytest.fixture(scope="session")
def oracle(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in four processes here, never stopped."""
    path = tmp_path_factory.mktemp("oracle") / "run"
    assert run(config(corpus, path, f"train.steps={STEPS}", "checkpoint.every=4", world=4), 4) == [0] * 4
    return path
