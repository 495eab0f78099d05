"""What a user's words may do to a script, and what a script may tell others: nothing that was not meant."""

from __future__ import annotations

from pathlib import Path

import pytest
from cluster import Cluster, command, until
from jobs import Job
from runs import TINY, ledger

IN_THE_SHELL, IN_THE_FILE = "canary-of-the-shell-4f1d", "canary-of-the-file-9b7e"
HOSTILE = [
    "a;touch CANARY",
    "$(touch CANARY)",
    "`touch CANARY`",
    "a\n#SBATCH --wrap=touch",
    "a'b",
    'a"b',
    "--wrap=x",
    "../a",
    "a b",
    "",
]


@pytest.mark.parametrize("key", ["name", "dir", "launcher.partition", "launcher.account", "launcher.setup", "launcher.exclude"])
def test_hostile_words(key: str, cluster: Cluster, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused in one line, or harmless: what is rendered has the words as words. Nothing is submitted, nothing runs."""
    monkeypatch.chdir(tmp_path)
    before = cluster.login("squeue", "-h", "-t", "all", "-o", "%i")
    for number, word in enumerate(HOSTILE):
        quoted = word.replace("\\", "\\\\").replace('"', '\\"')
        run = [] if key == "dir" else [f"dir={tmp_path}/{number}"]
        value = f"{tmp_path}/{quoted}" if key in ("dir", "launcher.setup") else quoted
        said = cluster.train(*TINY, f"data.dir={corpus}", "train.steps=2", "launcher.print_only=true", *run, f'{key}="{value}"',
                             "launcher.gpus_per_node=1", check=False)  # fmt: skip
        refused = [line for line in said.splitlines() if line.startswith("error: ")]
        ordered = [line for line in said.splitlines() if line.startswith("#SBATCH --wrap")]
        assert len(refused) == 1 or "touch" not in said and not ordered, said
    assert not list(tmp_path.rglob("*CANARY*")) and cluster.login("squeue", "-h", "-t", "all", "-o", "%i") == before


def test_what_sbatch_refuses_is_said_at_once(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    said = cluster.train(*TINY, f"data.dir={corpus}", f"dir={tmp_path}", "launcher.partition=nowhere", "launcher.nodes=2",
                         "launcher.gpus_per_node=2", check=False)  # fmt: skip
    assert "error: sbatch refuses" in said and "nvalid partition" in said and "submitted" not in said


def test_the_script_can_be_seen_before_it_is_submitted(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    said = cluster.train(*TINY, f"data.dir={corpus}", f"dir={tmp_path}/run", "launcher.nodes=2", "launcher.gpus_per_node=2",
                         "launcher.time=1:00:00", "launcher.print_only=true")  # fmt: skip
    for line in ("#!/bin/bash", "#SBATCH --nodes=2", "#SBATCH --gpus-per-node=2", "#SBATCH --time=1:00:00",
                 "#SBATCH --signal=B:USR1@300", "#SBATCH --requeue", "#SBATCH --export=NIL"):  # fmt: skip
        assert line in said.splitlines(), said
    assert not (tmp_path / "run").exists()


def test_secrets(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    """One in the submitting shell, one in the file that launcher.secrets_file names: the ranks have the second one in their
    environment, and neither is in a file that is made, in a log, in Slurm's own files, or in a command line."""
    secrets = tmp_path / "secrets"
    secrets.write_text(f"# mine\nexport WANDB_API_KEY={IN_THE_FILE}\n")
    secrets.chmod(0o600)
    run = tmp_path / "run"
    run.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", IN_THE_SHELL)
        job = Job(cluster, corpus, run, f"launcher.secrets_file={secrets}", "launcher.preflight=true", "launcher.gpus=false",
                  "name=secrets", hold=2)  # fmt: skip
    job.reach()
    for number in (1, 2):
        assert len(ranks := cluster.ranks(number)) == 2
        for pid in ranks:
            environment = Path(f"/proc/{pid}/environ").read_bytes()
            assert IN_THE_FILE.encode() in environment and IN_THE_SHELL.encode() not in environment
    lines = [command(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    assert not any(canary.encode() in line for line in lines for canary in (IN_THE_SHELL, IN_THE_FILE))
    assert not found(run) and not found(cluster.folder)
    job.let_go()
    job.done()
    assert not found(run) and not found(cluster.folder) and ledger(run, "finish")


def found(folder: Path) -> list[Path]:
    """Files that hold a canary."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [path for path in files if any(canary.encode() in path.read_bytes() for canary in (IN_THE_SHELL, IN_THE_FILE))]


def test_a_secrets_file_that_others_can_read_is_refused(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    secrets = tmp_path / "secrets"
    secrets.write_text(f"A={IN_THE_FILE}\n")
    secrets.chmod(0o644)
    run = tmp_path / "run"
    run.mkdir()
    job = Job(cluster, corpus, run, f"launcher.secrets_file={secrets}", "name=open")
    job.done("FAILED")
    until(lambda: "chmod 600" in job.log(), 10, job.log)
    assert cluster.job(job.number)["ExitCode"] == "2:0" and not found(run)
