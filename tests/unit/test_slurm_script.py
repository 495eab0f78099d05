"""The sbatch script: what it asks for, and that bash reads it as it was meant. tests/slurm runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_scratch.config import Config, compose
from megatron_scratch.config.launcher import check_launcher
from megatron_scratch.launch.slurm import check_names, make_job, options, own_code, render
from megatron_scratch.util.errors import UserError


def config(*words: str) -> Config:
    cfg = compose.load(["launcher=slurm", "name=big", *words])
    check_launcher(cfg.launcher)
    return cfg


def test_what_it_asks_for() -> None:
    cfg = config("launcher.nodes=4", "launcher.spare_nodes=1", "launcher.time=24:00:00", "launcher.partition=gpu",
                 "launcher.cpus_per_gpu=12", "launcher.mem_per_node='0'", "launcher.sbatch.nice=100",
                 "launcher.requeue=false")  # fmt: skip
    assert options(cfg, Path("/runs/big")) == [
        "--job-name=big", "--nodes=5", "--ntasks-per-node=1", "--gpus-per-node=8", "--cpus-per-gpu=12", "--mem=0",
        "--time=24:00:00", "--partition=gpu", "--signal=B:USR1@300", "--output=/runs/big/logs/slurm_%j.log", "--open-mode=append",
        "--export=NIL", "--nice=100", "--exclusive", "--no-requeue"]  # fmt: skip


@pytest.mark.parametrize("more", [[], ["launcher.setup=launch/nccl.sh", "launcher.exclude='node[1-3]'", "launcher.chain=3"]])
def test_bash_reads_it(more: list[str], tmp_path: Path) -> None:
    script = tmp_path / "job.sbatch"
    script.write_text(render(config("launcher.nodes=2", *more), tmp_path, tmp_path / "jobs" / "0001"))
    ignored = "--exclude=SC1091,SC2050"  # a file that is not here, [ 1 = 1 ]
    check = [Path(sys.executable).with_name("shellcheck"), "--severity=warning", ignored, script]
    found = subprocess.run(check, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    assert "$" not in "".join(line for line in script.read_text().splitlines() if line.startswith("#SBATCH"))


def test_variables_go_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NCCL_IB_HCA", "mlx5 $(touch x)")
    monkeypatch.setenv("OTHER", "not asked for")
    said = render(config("launcher.env=[NCCL_IB_HCA]"), tmp_path, tmp_path)
    assert "export NCCL_IB_HCA='mlx5 $(touch x)'\n" in said and "OTHER" not in said
    with pytest.raises(UserError, match="NOT_SET"):
        render(config("launcher.env=[NOT_SET]"), tmp_path, tmp_path)


@pytest.mark.parametrize("folder", ["/runs/a b", "/runs/a:b", "/runs/a%j", "/runs/$HOME", "/runs/a\nb"])
def test_a_run_directory_that_a_script_could_misread(folder: str) -> None:
    with pytest.raises(UserError, match="dir="):
        check_names(config(), Path(folder))


def test_a_job_folder_has_all_that_the_job_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The config, the code, plugins that are not installed; two submissions have two folders."""
    (tmp_path / "my_parts").mkdir()
    (tmp_path / "my_parts" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    cfg = config("plugins=[my_parts,pytest]")
    assert own_code(cfg.plugins) == [tmp_path / "my_parts"]
    jobs = [make_job(cfg, tmp_path / "run") for _ in range(2)]
    assert [job.name for job in jobs] == ["0001", "0002"]
    assert {path.name for path in jobs[1].iterdir()} == {"config.yaml", "job.sbatch", "code", "version.json"}
    assert {path.name for path in (jobs[1] / "code").iterdir()} == {"megatron_scratch", "my_parts"}
    assert compose.load_file(jobs[1] / "config.yaml").dir == str(tmp_path / "run")


def test_a_stop_file_keeps_a_job_from_being_submitted(tmp_path: Path) -> None:
    make_job(config(), tmp_path)
    (tmp_path / "stop").touch()
    with pytest.raises(UserError, match="stop is there"):
        make_job(config(), tmp_path)
