"""Dockerfiles and shell scripts: linted, pinned, without secrets; what an image is made of; the CPU image, built (--full)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILES = sorted((ROOT / "docker").iterdir())
SCRIPTS = [ROOT / name for name in ("launch/torchrun.sh", "tools/build_image.sh", "tests/slurm/cluster.sh", ".ci/run")]
BIN = Path(sys.executable).parent
SECRET = re.compile(r"(key|token|secret|passw|credential)\w*\s*=(?!secret)", re.IGNORECASE)


def lint(tool: str, *words: str) -> None:
    """A linter of the [dev] extra, which lies beside Python."""
    found = shutil.which(tool, path=f"{BIN}:{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{tool} is not installed: pip install -c constraints.txt -e '.[dev]'")
    done = subprocess.run([found, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles_are_clean(path: Path) -> None:
    lint("hadolint", "--no-color", "--failure-threshold", "info", str(path))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_are_clean(path: Path) -> None:
    lint("shellcheck", "--severity=warning", str(path))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_images_are_pinned_run_as_a_user_and_hold_no_secret(path: Path) -> None:
    """The base has a version; the last USER is a number that is not 0, as Kubernetes' runAsNonRoot wants it; what pip needs to know
    of indices and passwords is mounted while it runs, where no layer keeps it."""
    text = path.read_text()
    base = re.search(r"^ARG BASE=\S+?:(\S+)$", text, re.MULTILINE)
    assert base is not None and base[1] != "latest"
    assert re.findall(r"^USER (\S+)$", text, re.MULTILINE) == ["1000:1000"]
    assert not SECRET.search(text) and "--index-url" not in text.replace("# ", "")
    runs = [run for run in re.split(r"^(?=RUN)", text, flags=re.MULTILINE)[1:] if "pip install" in run]
    assert runs and all(run.startswith("RUN --mount=type=secret,id=pip,target=/etc/pip.conf") for run in runs)


def test_the_base_of_ngc_keeps_its_torch() -> None:
    """constraints.txt pins another one: it must not be given there, and a torch that was replaced must fail the build."""
    text = (ROOT / "docker" / "Dockerfile").read_text()
    run = text[text.index("RUN") :]
    assert "constraints.txt" not in run and 'test "$(version)" = "$before"' in run
    for name in ("Dockerfile.scratch", "Dockerfile.cpu"):
        for line in re.findall(r".*pip install.*", (ROOT / "docker" / name).read_text()):
            assert "-c /src/constraints.txt" in line, line


def test_an_image_is_made_of_what_is_named() -> None:
    """.dockerignore lets in what the package is installed from, and nothing else: no runs, data, .git, nor files with secrets."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    let_in = {line[1:] for line in lines if line.startswith("!")}
    assert let_in == {"README.md", "configs", "constraints.txt", "launch", "megatron_scratch", "pyproject.toml", "setup.py"}
    assert all((ROOT / name).exists() for name in let_in)


@pytest.mark.full
def test_the_cpu_image_is_built_and_trains(tmp_path: Path) -> None:
    """By buildah, from a base of mmdebstrap: no daemon, no registry. Then `doctor` and two steps of training, not as root."""
    for tool in ("buildah", "mmdebstrap"):
        if shutil.which(tool) is None or os.geteuid() != 0:
            pytest.skip(f"needs root and {tool}: apt-get install --no-install-recommends buildah mmdebstrap")
    done = subprocess.run([str(ROOT / "tools" / "build_image.sh"), str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "finished 2 steps" in done.stdout and "built and tried" in done.stdout
    assert not list(tmp_path.iterdir())
