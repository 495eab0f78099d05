"""The script of a job array: what it asks for, that bash reads it, what an element becomes. tests/slurm runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_scratch.config import compose
from megatron_scratch.config.corpus import CorpusConfig
from megatron_scratch.launch import corpus_array
from megatron_scratch.launch.array import Array, last_words
from megatron_scratch.launch.corpus_array import SlurmArray, element
from megatron_scratch.util.errors import UserError


@pytest.fixture(autouse=True)
def sbatch_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_array, "need", lambda command: None)


def array(work: Path, *words: str, workers: int | None = None) -> SlurmArray:
    launcher = compose.load(["launcher=slurm", *words]).launcher
    return SlurmArray(CorpusConfig(workers=workers), work, print, launcher)


def test_what_it_asks_for(tmp_path: Path) -> None:
    made = array(tmp_path / ".prepare", "launcher.partition=cpu", "launcher.time=1:00:00", "launcher.mem_per_node=8G",
                 "launcher.sbatch.cpus-per-task=2", "launcher.exclude=node7", workers=5)  # fmt: skip
    assert made.options("read", 12) == [
        "--job-name=prepare-read", "--array=0-11%5", "--nodes=1", "--ntasks=1", "--time=1:00:00", "--partition=cpu", "--mem=8G",
        f"--output={tmp_path}/.prepare/logs/read_%A_%a.log", "--open-mode=append", "--export=NIL", "--cpus-per-task=2",
        "--requeue"]  # fmt: skip
    made.logs.mkdir(parents=True)
    (made.logs / "bad_nodes").write_text("node9\nnode8\nnode9\n")
    assert made._excluded() == ["--exclude=node7,node8,node9"]


def test_bash_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINE", "a b $(touch x)")
    monkeypatch.setenv("OTHER", "not asked for")
    made = array(tmp_path / ".prepare", "launcher.setup=launch/modules.sh", "launcher.env=[MINE]")
    script = tmp_path / "job.sbatch"
    script.write_text(said := made.render("read", tmp_path / "plan.json", 3))
    check = [Path(sys.executable).with_name("shellcheck"), "--severity=warning", "--exclude=SC1091", script]
    found = subprocess.run(check, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    assert "export MINE='a b $(touch x)'\n" in said and "OTHER" not in said and "source launch/modules.sh\n" in said
    assert "$" not in "".join(line for line in said.splitlines() if line.startswith("#SBATCH"))


@pytest.mark.parametrize(("more", "command"), [
    ([], [sys.executable]),
    (["launcher.container=apptainer", "launcher.image=a.sif"], ["apptainer", "exec"]),
    (["launcher.container=pyxis", "launcher.image=a.sqsh"], ["srun", "--ntasks=1", "--export=ALL", "--container-image=a.sqsh"]),
])  # fmt: skip
def test_what_an_element_becomes(more: list[str], command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every third task of the list, with the secrets of the file in its environment, and the output mounted."""
    secrets = tmp_path / "secrets"
    secrets.write_text("AWS_SECRET_ACCESS_KEY=abc\n")
    secrets.chmod(0o600)
    made = array(tmp_path / ".prepare", f"launcher.secrets_file={secrets}", *more)
    made.logs.mkdir(parents=True)
    monkeypatch.setattr(corpus_array, "largest_array", lambda: 3)
    run: list[Any] = []
    monkeypatch.setattr(
        subprocess, "run", lambda words, **how: run.append(words) or subprocess.CompletedProcess(words, 0, "17;c\n")
    )
    submitted = made._submit(tmp_path / ".prepare" / "read", [0, 2, 4, 6, 8, 9, 11])
    assert (submitted.number, submitted.elements, [submitted.element(i) for i in (0, 2, 4, 6, 11)]) == (17, 3, [0, 1, 2, 0, 0])
    became: list[Any] = []
    monkeypatch.setattr(corpus_array.os, "execvpe", lambda *words: became.append(words))
    element(made.logs / "read.json", 1)
    ((program, words, environment),) = became
    assert program == words[0] and words[: len(command)] == command and environment["AWS_SECRET_ACCESS_KEY"] == "abc"
    assert words[-5:] == ["-m", "megatron_scratch.corpus.work", f"{tmp_path}/.prepare/read", "2", "8"]
    assert not more or f"{tmp_path}:{tmp_path}" in " ".join(words)
    assert "abc" not in (made.logs / "read.sbatch").read_text() and "abc" not in (made.logs / "read.json").read_text()


def test_what_is_for_ranks_is_refused(tmp_path: Path) -> None:
    for word in (
        "launcher.nodes=2",
        "launcher.chain=3",
        "launcher.gpus_per_node=4",
        "launcher.mode=srun",
        "launcher.print_only=true",
    ):
        with pytest.raises(UserError, match="ranks of `train`"):
            array(tmp_path, word)
    array(tmp_path, "launcher.gpus=false", "launcher.exclusive=false", "launcher.signal_seconds=0", "launcher.time=5:00")
    with pytest.raises(UserError, match="add launcher=slurm"):
        SlurmArray(CorpusConfig(), tmp_path, print, compose.load([]).launcher)
    with pytest.raises(UserError, match="corpus.output="):
        array(tmp_path / "a b" / ".prepare")


def test_what_the_queue_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elements that it does not list have ended; one that waits for a person is told once; one that a node threw back is ended."""
    lines = ["0|RUNNING|None\n1|PENDING|JobHeldUser\n2|PENDING|JobArrayTaskLimit\n3|TIMEOUT|TimeLimit\n"
             "4|PENDING|launch failed requeued held", "0|COMPLETING|None\n1|PENDING|JobHeldUser", ""]  # fmt: skip
    cancelled: list[Any] = []
    monkeypatch.setattr("megatron_scratch.launch.array.query", lambda *words: lines.pop(0))
    monkeypatch.setattr("megatron_scratch.launch.array.subprocess.run", lambda words, **how: cancelled.append(words))
    told: list[str] = []
    x = Array(7, 6, list(range(6)))
    x.look(told.append)
    assert x.alive and x.over == {3, 5} and x.states[3] == "TIMEOUT" and cancelled == [["scancel", "7_4"]]
    assert len(told) == 2 and "JobHeldUser" in told[0] and "launch failed" in told[1]
    x.look(told.append)
    assert x.alive and x.over == {2, 3, 4, 5} and len(told) == 2
    x.look(told.append)
    assert not x.alive and x.over == set(range(6))


def test_the_last_words_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    assert last_words(log) == ""
    log.write_text("a\nerror: b\n\n")
    assert last_words(log) == "error: b"
