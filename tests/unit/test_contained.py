"""The words for a container, as pyxis (github.com/NVIDIA/pyxis/wiki/Usage) and apptainer (apptainer-exec(1)) document them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_scratch.config.launcher import SlurmConfig
from megatron_scratch.launch.step import contained
from megatron_scratch.util.errors import UserError

JOB = Path("/fast/runs/llama/jobs/0001")
# [USER@][REGISTRY#]IMAGE[:TAG]|PATH, and SRC:DST[:FLAGS] with FLAGS such as ro+rprivate
PYXIS = {"--container-image": r"/\S+|([\w-]+@)?([\w.:-]+#)?[\w./-]+(:[\w.-]+)?",
         "--container-mounts": r"/[^:,]+:/[^:,]+(:[a-z+]+)?(,/[^:,]+:/[^:,]+(:[a-z+]+)?)*",
         "--container-workdir": r"/\S+"}  # fmt: skip


@pytest.mark.parametrize("image", ["nvcr.io#nvidia/pytorch:26.05-py3", "/images/ms.sqsh", "ubuntu:24.04"])
def test_pyxis(image: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Options of srun, before the command; the run and the current folder are inside at the same paths."""
    monkeypatch.chdir(tmp_path)
    words = contained(SlurmConfig(container="pyxis", image=image, mounts=["/data:/data:ro"]), JOB)
    options = dict(word.split("=", 1) for word in words[:-1])
    assert options.keys() == PYXIS.keys() and words[-1] == "python3"
    for name, value in options.items():
        assert re.fullmatch(PYXIS[name], value), (name, value)
    mounts = options["--container-mounts"].split(",")
    assert mounts == ["/data:/data:ro", "/fast/runs/llama:/fast/runs/llama", f"{tmp_path}:{tmp_path}"]
    assert options["--container-workdir"] == str(tmp_path)


@pytest.mark.parametrize("gpus", [True, False])
def test_apptainer(gpus: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`apptainer exec [options] IMAGE COMMAND`: --nv for GPUs, --bind takes src[:dest[:opts]], --pwd is the folder inside."""
    monkeypatch.chdir(tmp_path)
    words = contained(SlurmConfig(container="apptainer", image="/images/ms.sif", gpus=gpus, python="/opt/venv/bin/python"), JOB)
    assert words[:2] == ["apptainer", "exec"] and words[-2:] == ["/images/ms.sif", "/opt/venv/bin/python"]
    assert ("--nv" in words) == gpus
    binds = [words[n + 1] for n, word in enumerate(words) if word == "--bind"]
    assert binds == ["/fast/runs/llama:/fast/runs/llama", f"{tmp_path}:{tmp_path}"]
    assert words[words.index("--pwd") + 1] == str(tmp_path)


def test_without_a_container_it_is_this_python() -> None:
    assert contained(SlurmConfig(python="/opt/venv/bin/python"), JOB) == ["/opt/venv/bin/python"]


@pytest.mark.parametrize("mount", ["/data", "data:/data", "/a:b:/c", "/a,b:/c", "/a:/b:ro:x"])
@pytest.mark.parametrize("container", ["pyxis", "apptainer"])
def test_a_mount_that_would_be_taken_apart_is_refused(container: str, mount: str) -> None:
    with pytest.raises(UserError, match="cannot be mounted"):
        contained(SlurmConfig(container=container, image="ms", mounts=[mount]), JOB)


def test_so_is_a_folder_that_could_not_be_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a,b").mkdir()
    monkeypatch.chdir(tmp_path / "a,b")
    with pytest.raises(UserError, match="submitted from"):
        contained(SlurmConfig(container="pyxis", image="ms"), JOB)
    assert contained(SlurmConfig(python="py"), JOB) == ["py"]
