"""Sweeps on this machine, from the command line: which points run, when, and what is made of how they end.

One test trains; in the others a process that only does as if takes the place of the one that trains.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from runs import TINY, config, rows, run

from megatron_scratch.cli import main
from megatron_scratch.launch.sweep import here

WORDS = ["train", "-m", *TINY, "name=s"]
SLURM = ["launcher=slurm", "launcher.gpus_per_node=1"]

# What a point does instead of training, by its optim.lr, which is also its validation loss.
ACTS = """
import json, os, pathlib, signal, sys, time
config, last = map(pathlib.Path, sys.argv[1:])
text = config.read_text()
value = lambda key: next(line.split(": ")[1] for line in text.splitlines() if line.strip().startswith(key + ": "))
home, lr = pathlib.Path(value("dir")), float(value("lr"))
def until(there):
    deadline = time.monotonic() + 30
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.01)
def finish():
    rows = [{"step": 1, "loss": 2 * lr}, {"step": 1, "val_loss": lr}]
    (home / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
    (home / "ledger.jsonl").write_text('{"event": "start"}\\n{"event": "finish"}\\n')
"""


@pytest.fixture
def acting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corpus: Path):
    """Work in a folder of its own; `acting(code)` says what points do."""
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "act.py"
    monkeypatch.setattr(here, "command", lambda config, last: [sys.executable, "-S", str(script), str(config), str(last)])
    monkeypatch.setattr(here, "POLL", 0.01)

    def act(code: str, *words: str) -> int:
        script.write_text(ACTS + code)
        return main([*WORDS, f"data.dir={corpus}", *words])

    return act


def points(folder: str = "runs/sweeps/s") -> list[dict]:
    return json.loads((Path(folder) / "sweep.json").read_text())["points"]


def states(folder: str = "runs/sweeps/s") -> list[str]:
    return [point["state"] for point in points(folder)]


def test_points_train_as_they_would_alone(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One point fails as it begins, the one after it finishes."""
    monkeypatch.chdir(tmp_path)
    words = ["train.steps=3", "checkpoint.every=3", "train.eval_every=3"]
    (tmp_path / "empty").mkdir()
    swept = ["checkpoint.resume=empty,auto"]
    assert main([*WORDS, f"data.dir={corpus}", *words, *swept]) == 1
    out, err = capfd.readouterr()
    assert states() == ["failed", "finished"], out
    assert err.splitlines()[-1].startswith("failed: 1 of 2 points failed, point 0: ") and "empty" in err.splitlines()[-1]
    assert run(config(corpus, tmp_path / "alone", *words)) == [0]
    home = Path("runs/sweeps/s")
    assert rows(home / "1") == rows(tmp_path / "alone")
    saved = yaml.safe_load((home / "1" / "config.yaml").read_text())
    assert (saved["name"], saved["dir"]) == ("s_1", "runs/sweeps/s/1")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alone", "empty", "runs"], "nothing of Hydra's"
    assert not list(home.rglob(".hydra")) and {p.name for p in home.iterdir()} == {"0", "1", "sweep.json"}


def test_illegal_points_are_dropped_before_any_starts(acting, capfd: pytest.CaptureFixture[str]) -> None:
    """A key that one of the engines does not have, which Hydra's multirun would refuse for both; a batch that does not fit."""
    code = """
written = json.loads((home.parent / "sweep.json").read_text())["points"]
assert [point["state"] for point in written] == ["started", "dropped", "dropped", "dropped"] and not (home.parent / "1").exists()
finish()
"""
    assert acting(code, "engine=fsdp,ddp", "train.micro_batch_size=2,3", "engine.reshard_after_forward=true") == 0
    err = capfd.readouterr().err.splitlines()
    assert len(err) == 3 and err[0].startswith("point 1 dropped: engine=fsdp train.micro_batch_size=3: train.global_batch_size=8")
    assert "engine.reshard_after_forward" in err[1] and points()[2]["reason"] in err[1]


def test_one_fails_and_the_rest_go_on(acting, capfd: pytest.CaptureFixture[str]) -> None:
    code = """
if lr == 1: last.write_text("it broke"); sys.exit(1)
if lr == 2: os.kill(os.getpid(), signal.SIGKILL)
finish()
"""
    assert acting(code, "optim.lr=1,2,4,3") == 1
    out, err = capfd.readouterr()
    assert states() == ["failed", "failed", "finished", "finished"]
    assert points()[0]["reason"] == "it broke" and "ended with -9" in points()[1]["reason"]
    table = [line.split() for line in out.splitlines() if "optim.lr=" in line and not line.startswith(("point", "all with"))]
    assert [line[0] for line in table] == ["3", "2", "0", "1"], "the best first"
    assert err.splitlines()[-1] == "failed: 2 of 4 points failed, point 0: it broke"


def test_one_after_the_other_or_side_by_side(acting, capfd: pytest.CaptureFixture[str]) -> None:
    here_ = "(home / 'here').touch(); there = lambda: len(list(home.parent.glob('*/here')))\n"
    alone = here_ + "assert there() == 1; finish(); (home / 'here').unlink()"
    assert acting(alone, "optim.lr=1,2") == 0
    together = here_ + "until(lambda: there() >= 2); time.sleep(0.05); assert there() == 2; finish(); (home / 'done').touch()\n"
    together += "until(lambda: len(list(home.parent.glob('*/done'))) % 2 == 0); (home / 'here').unlink()"
    assert acting(together, "optim.lr=1,2", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2") == 0
    assert states("runs/sweeps/s_2") == ["finished"] * 2, "and it got a folder of its own"
    assert Path("runs/sweeps/s_2/0/logs/console.log").exists()


def test_what_points_may_not_share(acting, capfd: pytest.CaptureFixture[str]) -> None:
    assert acting("finish()", "optim.lr=1,2", "checkpoint.remote=file:///tmp/x") == 2
    assert "'.../${name}'" in capfd.readouterr().err
    assert acting("assert 'file:///tmp/s_' in text; finish()", "optim.lr=1,2", "checkpoint.remote='file:///tmp/${name}'") == 0


def test_told_to_stop(acting, capfd: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C: the point that runs is told once and saves, no other starts, the table comes."""
    code = """
got = []
signal.signal(signal.SIGINT, lambda *args: got.append(1))
os.kill(os.getppid(), signal.SIGINT)
until(lambda: got)
last.write_text("stopped by SIGINT after step 1 of 2")
sys.exit(75)
"""
    assert acting(code, "optim.lr=1,2,3") == 75
    out, err = capfd.readouterr()
    assert states() == ["stopped", "not started", "not started"]
    assert "1 stopped, 2 not started" in out and err.endswith("stopped: SIGINT, 2 points were not started\n")


def test_a_sweep_that_is_only_shown_leaves_nothing(acting, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert acting("", "optim.lr=1,2", "--print") == acting("", "optim.lr=1,2", *SLURM, "launcher.print_only=true") == 0
    out = capfd.readouterr().out
    assert out.count("# point 1: optim.lr=2 as s_1, 1 processes, in runs/sweeps/s/1") == 2
    assert [line for line in out.splitlines() if "job-name" in line] == ["#SBATCH --job-name=s_0", "#SBATCH --job-name=s_1"]
    assert [p.name for p in tmp_path.iterdir()] == ["act.py"]


def test_a_sweep_of_nothing_but_illegal_points(acting, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert acting("", "model.num_heads=5,7") == 2
    err = capfd.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in err] == ["point 0 dropped", "point 1 dropped", "error"]
    assert acting("", "optim.lr=1,2", *SLURM, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2") == 2
    assert "as the cluster has room" in capfd.readouterr().err
    pods = ["launcher=kubernetes", "launcher.gpus_per_node=1", "launcher.image=x", "launcher.volume=x"]
    assert acting("", "optim.lr=1,2", *pods) == 2
    assert "has no sweeps" in capfd.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["act.py"]


OPTUNA = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=6", "hydra.sweeper.sampler.seed=1"]


def test_optuna_goes_on_after_points_that_come_to_nothing(acting, capfd: pytest.CaptureFixture[str]) -> None:
    """Of six trials one fails, one ends at nan, one is illegal: the best of the others wins, and it is what optuna has written."""
    pytest.importorskip("optuna")
    code = """
number = int(home.name)
if number == 0: last.write_text("it broke"); sys.exit(1)
finish()
if number == 1: (home / "metrics.jsonl").write_text('{"step": 1, "val_loss": NaN}')
"""
    assert acting(code, *OPTUNA, "optim.lr=tag(log,interval(1e-4,1e-1))", "model.num_heads=choice(4,5)") == 0
    out, err = capfd.readouterr()
    found = points()
    assert len(found) == 6 and {"dropped", "finished"} <= set(states()) and states()[0] in ("failed", "dropped")
    done = {p["number"]: float(p["overrides"][0].partition("=")[2]) for p in found if p["state"] == "finished"}
    best = min(done, key=done.__getitem__)
    assert f"best: point {best}, val_loss {done[best]:.6g}" in out.splitlines()[-1]
    written = yaml.safe_load(Path("runs/sweeps/s/optimization_results.yaml").read_text())
    assert written["best_value"] == done[best] and written["best_params"]["optim.lr"] == done[best]
    assert all("model.num_heads=5" in " ".join(p["overrides"]) for p in found if p["state"] == "dropped")
    assert any(p["state"] == "failed" and "nan" in p["reason"] for p in found) or found[1]["state"] == "dropped"
    assert "Traceback" not in err and "optuna" not in err


def test_another_metric_another_direction_and_a_study_that_is_kept(acting, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("optuna")
    words = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "sweep.metric=loss", "hydra.sweeper.direction=maximize",
             "hydra.sweeper.storage=sqlite:///study.db", "hydra.sweeper.study_name=x", "optim.lr=interval(1,2)"]  # fmt: skip
    assert acting("finish()", *words) == acting("finish()", *words) == 0
    lrs = [float(p["overrides"][0].partition("=")[2]) for folder in ("s", "s_2") for p in points(f"runs/sweeps/{folder}")]
    assert len(lrs) == 4
    written = yaml.safe_load(Path("runs/sweeps/s_2/optimization_results.yaml").read_text())
    assert written["best_value"] == 2 * max(lrs), "of both sweeps"


FAILS = [(["sweep.metric=zzz"], 1, "zzz is not in its metrics.jsonl"), (["model.num_heads=5"], 2, "all 2 points are illegal"),
         (["hydra.sweeper.max_failure_rate=0.0", "sweep.metric=zzz"], 1, "point 0 failed"),
         (["hydra.sweeper.n_trials=0"], 2, "at least 1"), (["hydra.sweeper.n_trials=x"], 2, "Integer"),
         (["hydra.sweeper.direction=up"], 2, "maximize"), (["hydra.sweeper.direction=[minimize,maximize]"], 2, "one metric"),
         (["hydra.sweeper.max_failure_rate=2"], 2, "[0, 1]"), (["hydra.sweeper.storage=redis://x"], 2, "pickled"),
         (["hydra.sweeper.storage=sqlite:////proc/x"], 2, "unable to open"), (["hydra.sweeper.storage=nonsense"], 2, "nonsense"),
         (["hydra/sweeper/sampler=zzz"], 2, "tpe"), (["hydra.sweeper.n_trial=2"], 2, "n_trial"),
         (["--print"], 2, "leave --print out"),
         ([*SLURM, "launcher.print_only=true"], 2, "print_only out")]  # fmt: skip


@pytest.mark.parametrize(("words", "code", "said"), FAILS, ids=[words[0] for words, _, _ in FAILS])
def test_a_study_that_comes_to_nothing(words: list[str], code: int, said: str, acting, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("optuna")
    assert acting("finish()", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "optim.lr=interval(1,2)", *words) == code
    last = capfd.readouterr().err.splitlines()[-1]
    assert said in last and last.startswith("error: " if code == 2 else "failed: ")
    assert Path("runs/sweeps/s").exists() == (code == 1)
