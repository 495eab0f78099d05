"""Shared by all tests: --full, one thread, the checkout's corpora for end-to-end runs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="the full matrices, not only the covering subset")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--full"):
        return
    for item in items:
        if item.get_closest_marker("full"):
            item.add_marker(pytest.mark.skip(reason="in the full matrix: run with --full"))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Bitwise tests need a fixed number of threads, and two cores are shared by several ranks."""
    import torch

    torch.set_num_threads(1)
    yield


@pytest.fixture(autouse=True)
def modules_go_with_their_test(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A plugin that one test wrote and imported is not what the next test finds under the same name."""
    folder = str(tmp_path_factory.getbasetemp())
    yield
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__dict__", {}).get("__file__")).startswith(folder):  # getattr of it would load a lazy module
            del sys.modules[name]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small prepared dataset of real text: bytes of the standard library's sources."""
    from megatron_scratch.config import CorpusConfig
    from megatron_scratch.corpus.pipeline import prepare

    output = tmp_path_factory.mktemp("corpus") / "bytes"
    prepare(CorpusConfig(input="stdlib", output=str(output), tokenizer="byte", max_bytes=200_000, valid_fraction=0.05))
    return output


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB; needs the right to mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
