"""Sweeps without starting one: the words, the folder, and what the report makes of what lies in it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_scratch.cli import main
from megatron_scratch.launch.sweep import here, record, table
from megatron_scratch.launch.sweep.record import Point, Sweep
from megatron_scratch.launch.sweep.words import MOST, grid, read
from megatron_scratch.util.errors import UserError


def test_the_last_key_changes_fastest_and_what_is_not_swept_stays_as_it_was_written() -> None:
    words = read(["parallel.tp=1,2", "~checkpoint", "data.dir='a, b'", "train.betas=[1,2]", "+x.y=choice(a,b)"], [])
    assert words.fixed == ["~checkpoint", "data.dir='a, b'", "train.betas=[1,2]"]
    assert grid(words.swept) == [[f"parallel.tp={tp}", f"+x.y={y}"] for tp in (1, 2) for y in "ab"]
    later = read(["a=3", "b=1,2", "a=1,2", "b=3,4"], [])
    assert (later.fixed, grid(later.swept)) == ([], [["a=1", "b=3"], ["a=1", "b=4"], ["a=2", "b=3"], ["a=2", "b=4"]])
    assert grid(read(["a=range(0,6,2)"], []).swept) == [["a=0"], ["a=2"], ["a=4"]]
    assert grid(read(["a='x,y',[1,2],null"], []).swept) == [["a='x,y'"], ["a=[1,2]"], ["a=null"]]


def test_a_glob_has_our_groups_and_the_users_but_no_schemas(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "zero9.yaml").write_text("name: zero1")
    found = grid(read(["engine=glob(zero*,exclude=*2)"], [str(tmp_path)]).swept)
    assert found == [["engine=zero1"], ["engine=zero3"], ["engine=zero9"]]
    assert not any("schema" in word for words in grid(read(["engine=glob(*)"], []).swept) for word in words)


OPTUNA = ["a=1,2", "hydra/sweeper=optuna"]
REFUSED = [
    ([], "nothing to sweep"), (["optim.lr=1"], "nothing to sweep"), (["a=[1"], "no override"), (["a=interval(0,1)"], "optuna"),
    ([f"a=range(0,{MOST + 1})"], "more than"), (["a=range(0,1000000000)"], "more than"),
    (["a=range(0,32)", "b=range(0,32)"], "more than"),
    (["a=range(1,1)"], "no points"), (["a=1,2", "dir=x"], "hydra.sweep.dir"), (["dir=x,y"], "hydra.sweep.dir"),
    (["name=x,y"], "one name"), (["launcher=local,slurm"], "one launcher"), (["a=1,2", "a=3"], "nothing to sweep"),
    (["a=1,2", "hydra.run.dir=x"], "no effect"), (["a=1,2", "hydra.job.chdir=true"], "no effect"),
    (["a=1,2", "+hydra={x: 1}"], "no effect"), (["a=1,2", "hydra/sweeper=ax"], "basic, optuna"),
    (["a=1,2", "hydra/launcher=submitit_slurm"], "launcher=slurm"), (["a=1,2", "hydra/launcher=joblib"], "n_jobs=None"),
    (["a=1,2", "hydra/launcher=joblib", "hydra.launcher.n_jobs=-1"], "1 or more"),
    (["a=1,2", "hydra/launcher=joblib", "hydra.launcher.verbose=1"], "no effect"),
    (["a=1,2", "hydra.launcher.n_jobs=2"], "hydra/launcher=joblib"),
    (["a=1,2", "hydra.sweeper.n_trials=3"], "hydra/sweeper=optuna"),
    (["a=1,2", "sweep.metric=loss"], "hydra/sweeper=optuna"), (["a=1,2", "sweep.dir=x"], "sweep.metric"),
    ([*OPTUNA, "sweep.metric="], "empty"), ([*OPTUNA, "hydra.sweeper.n_trials=3,4"], "cannot be swept"),
    ([*OPTUNA, "hydra.sweeper._target_=os.system"], "names code"),
    ([*OPTUNA, "+hydra.sweeper.sampler={_target_: os.system}"], "names code"),
    ([*OPTUNA, "hydra.sweeper.custom_search_space=os.system"], "names code"), (["model=glob(zzz*)"], "matches nothing"),
    (["nogroup=glob(*)"], "no such group"), (["a=1,2", "hydra.sweep.dir='a b'"], "hydra.sweep.dir"),
    (["a=1,2", "hydra.sweep.dir='$(touch CANARY)'"], "hydra.sweep.dir"),
    (["a=1,2", "hydra.sweep.dir=runs/${name}"], "hydra.sweep.dir"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "said"), REFUSED, ids=[" ".join(words)[:60] for words, _ in REFUSED])
def test_what_a_sweep_cannot_follow_is_refused_in_one_line(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "-m", *words]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and said in err and not out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["../x", "..", ".x", "-x", "a/b", "'a b'", "'a;touch CANARY'", "'`touch CANARY`'", "é", "x" * 60])
def test_a_hostile_name_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "-m", "optim.lr=1,2", f"name={name}"]) == 2
    assert "name" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_where_a_sweep_may_not_be_started(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", "-m", "optim.lr=1,2"]) == 2
    assert "no other verb" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert main(["train", "--multirun", "optim.lr=1,2"]) == 2
    assert "torchrun" in capsys.readouterr().err


def test_of_two_sweeps_each_has_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = record.free("a", None)
    assert record.take(first) and not record.take(first), "the one that comes second is told"
    assert [str(first), str(record.free("a", None))] == ["runs/sweeps/a", "runs/sweeps/a_2"]
    with pytest.raises(UserError, match="new folder"):
        record.free("a", str(first))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made"):
        record.take(tmp_path / "file" / "x")


def test_side_by_side_each_point_has_gpus_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4,5,6,7")
    assert [here.gpus_of(slot, 2)["CUDA_VISIBLE_DEVICES"] for slot in (0, 1)] == ["3,4", "5,6"]
    here.check_gpus(2, 2)
    here.check_gpus(8, 1)
    with pytest.raises(UserError, match="launcher.processes"):
        here.check_gpus(3, 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert here.gpus_of(1, 2) == {}
    here.check_gpus(64, 2)


# What lies in a run directory, and what the report says. The first three: events, jobs, log of the last job.
START, STOP, FINISH, FAILED, JOB = (
    {"event": name, "reason": f"why {name}"} for name in ("start", "stop", "finish", "failed", "job")
)
OF_JOBS: list[tuple[list[dict], list[int], str, dict[int, str] | None, str, str]] = [
    ([], [7], "", {7: "PENDING"}, "pending", ""),
    ([JOB, START], [7], "", {7: "RUNNING"}, "running", ""),
    ([JOB, START, STOP], [7], "stopped: x\n", {7: "PENDING"}, "requeued", "why stop"),
    ([JOB, START], [7, 8], "", {7: "COMPLETING", 8: "PENDING"}, "running", ""),
    ([JOB], [7, 8], "", {8: "PENDING"}, "requeued", ""),
    ([JOB, START, FINISH], [7], "", {}, "finished", ""),
    ([JOB, START, FINISH], [7], "", {7: "COMPLETING"}, "running", ""),
    ([JOB, START, STOP], [7], "stopped: stopped by scancel\n", {}, "stopped", "stopped by scancel"),
    ([JOB], [7], "step 1\nfailed: 4 starts in a row\n", {}, "failed", "4 starts in a row"),
    ([JOB], [7], "error: dir=x is in use\n", {}, "failed", "dir=x is in use"),
    ([JOB, START], [7], "slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026 DUE TO TIME LIMIT ***\n", {}, "failed", "TIME LIMIT"),
    ([JOB, START], [7], "", {}, "failed", "without a word"),
    ([JOB, START, FAILED], [7], "", {}, "failed", "why failed"),
    ([], [7], "", None, "submitted", "Slurm cannot be asked"),
    ([JOB, START, FINISH], [7], "", None, "finished", "Slurm cannot be asked"),
]


@pytest.mark.parametrize(("events", "jobs", "log", "queue", "state", "reason"), OF_JOBS)
def test_the_state_of_a_job(
    events: list[dict], jobs: list[int], log: str, queue: dict[int, str] | None, state: str, reason: str, tmp_path: Path
) -> None:
    lay(tmp_path, events, jobs, log)
    said = table.job_state(tmp_path, table.jobs_of(tmp_path), queue)
    assert said[0] == state and reason in said[1] and bool(said[1]) == bool(reason)


ME, NOBODY = f"process {os.getpid()} on {socket.gethostname()}, since", "process 999999999 on elsewhere, since"
OF_PROCESSES = [
    ("dropped", [], "", False, "dropped", "why"), ("planned", [], "", True, "pending", ""),
    ("planned", [], "", False, "not started", "the sweep ended"), ("started", [], "", True, "running", ""),
    ("started", [], "", False, "failed", "without a word"), ("started", [START], ME, False, "running", ""),
    ("started", [START], NOBODY, False, "failed", "without a word"), ("started", [START, STOP], "", False, "stopped", "why stop"),
    ("started", [START, FAILED], "", False, "failed", "why failed"), ("finished", [START, FINISH], ME, False, "finished", ""),
    ("failed", [START, FAILED], "", False, "failed", "why"), ("failed", [START, FAILED, START, FINISH], "", False, "finished", ""),
    ("failed", [START, FAILED, START], ME, False, "running", ""), ("submitting", [], "", False, "unknown", "squeue --name=p_0"),
]  # fmt: skip


@pytest.mark.parametrize(("state", "events", "lock", "working", "said", "reason"), OF_PROCESSES, ids=range(len(OF_PROCESSES)))
def test_the_state_of_a_process(
    state: str, events: list[dict], lock: str, working: bool, said: str, reason: str, tmp_path: Path
) -> None:
    lay(tmp_path, events, [], "")
    if lock:
        (tmp_path / ".lock").write_text(lock + " 2026")
    kept = "why" if state in ("dropped", "failed") else ""
    found = table.process_state({"state": state, "reason": kept, "name": "p_0"}, tmp_path, working)
    assert found[0] == said and reason in found[1]


def lay(home: Path, events: list[dict], jobs: list[int], log: str) -> None:
    (home / "logs").mkdir(parents=True, exist_ok=True)
    (home / "ledger.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    if jobs:
        (home / "jobs" / "0001").mkdir(parents=True)
        (home / "jobs" / "0001" / "submitted.json").write_text(json.dumps({"ids": [str(job) for job in jobs]}))
        (home / "logs" / f"slurm_{jobs[-1]}.log").write_text(log)


def test_the_newest_numbers_also_from_far_back_and_beside_a_torn_line(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert table.newest(file, ("loss",)) == {"loss": None}
    rows: list[dict[str, Any]] = [{"step": 1, "val_loss": 9.0}, {"step": 2, "val_loss": 8.0}]
    rows += [{"step": step, "loss": 1 / step, "pad": "x" * 200} for step in range(3, 1000)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 1000, "lo')
    assert file.stat().st_size > 2 * table.TAIL
    assert table.newest(file, ("step", "loss", "val_loss", "mfu")) == {"step": 999, "loss": 1 / 999, "val_loss": 8.0, "mfu": None}


def made(path: Path, values: list[float | None]) -> Sweep:
    """A sweep whose points have ended with these validation losses."""
    path.mkdir()
    sweep = Sweep(path, "s", ["train.steps=2"])
    for number, value in enumerate(values):
        sweep.points.append(point := Point(number, [f"optim.lr={number}"], "started"))
        lay(sweep.home(point), [START, FINISH] if value is not None else [START, FAILED], [], "")
        if value is not None:
            row = {"step": 2, "loss": 1.5, "tokens_per_second": 12345.6, "mfu": 0.4, "memory_gib": 3.0}
            (sweep.home(point) / "metrics.jsonl").write_text(
                json.dumps(row) + "\n" + json.dumps({"step": 2, "val_loss": value}) + "\n"
            )
    sweep.points.append(dropped := Point(len(values), ["optim.lr=x"]))
    dropped.drop("optim.lr: got x")
    sweep.save()
    return sweep


def test_the_report_is_sorted_by_validation_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = made(tmp_path / "s", [3.0, None, float("nan"), 2.0])
    assert main(["report", "--sweep", str(sweep.path)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "3 finished, 1 failed, 1 dropped" in out[0] and "train.steps=2" in out[1]
    assert [line.split()[0] for line in out[3:]] == ["3", "0", "1", "2", "4"]
    assert out[3].split() == ["3", "optim.lr=3", "finished", "2", "1.5000", "2.0000", "12,346", "40.0%", "3.00"]
    assert out[5].endswith("why failed") and out[7].endswith("optim.lr: got x")
    assert main(["report", f"sweep={sweep.path}", "json=true"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["number"] for row in rows] == [3, 0, 1, 2, 4] and rows[0]["tokens_per_second"] == 12345.6
    assert rows[4] == {"number": 4, "overrides": ["optim.lr=x"], "state": "dropped", "reason": "optim.lr: got x", "jobs": [],
                       "dir": str(sweep.path / "4"), **dict.fromkeys(table.METRICS)}  # fmt: skip


@pytest.mark.parametrize(
    "words", [[], ["--sweep"], ["--sweep="], ["RUN"], ["--json"], ["sweep=a", "x"], ["--sweep", "no/such"], ["swep=x"]]
)
def test_a_report_of_nothing_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"points": 3}', '{"points": [3]}', '{"points": [{}]}', "\xff"])
def test_a_damaged_sweep_is_refused(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sweep.json").write_text(content)
    assert main(["report", "--sweep", str(tmp_path)]) == 2
    assert "not what a sweep writes" in capsys.readouterr().err


def test_sweeps_and_reports_need_no_torch(tmp_path: Path) -> None:
    path = made(tmp_path / "s", [1.0]).path
    code = (f"import sys; from megatron_scratch.cli import main; assert main(['report', '--sweep', {str(path)!r}]) == 0; "
            "assert not {'torch', 'optuna'} & set(sys.modules); import megatron_scratch.launch.sweep.run; "
            "assert main(['train', '-m', 'optim.lr=1,2', 'data.dir=no/such']) == 2; assert 'torch' not in sys.modules")  # fmt: skip
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path)
