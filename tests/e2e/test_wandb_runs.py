"""Weights & Biases on disk: one run there for a run here, with the values of its files, however it is laid out or killed."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from runs import config, kill_after, ledger, run
from wandb_runs import check_same, environment, once_followed, recorded, said, sync
from wandb_server import Server

OFFLINE = ["logging=wandb", "logging.wandb.mode=offline", "train.layers_every=2", "train.eval_every=3"]
LAYOUTS = {"dp": [], "tp": ["parallel.tp=2"], "pp": ["parallel.pp=2"]}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, tmp_path / "home")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_run_under_every_layout(layout: str, corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "r"
    words = [*OFFLINE, *LAYOUTS[layout], "train.steps=5", "logging.wandb.tags=[a,b]", "logging.wandb.group=g", "name=tiny",
             "logging.wandb.notes=why", "logging.wandb.job_type=pretrain", "checkpoint.every=4"]  # fmt: skip
    assert run(config(corpus, path, *words, world=2), 2) == [0, 0]
    (found,) = recorded(path)
    check_same(found.rows, path)
    assert [row["_step"] for row in found.rows] == [1, 2, 3, 4, 5], "W&B's steps are the run's"
    assert (found.name, found.group, found.job_type, found.notes, found.tags) == ("tiny", "g", "pretrain", "why", ["a", "b"])
    assert found.exit_code == 0
    assert found.config["model"]["hidden_size"] == 32 and found.config["optim"]["lr"] == 0.01
    start = ledger(path, "start")[0]
    assert found.config["start"] == {key: value for key, value in start.items() if key not in ("time", "event", "step")}
    assert found.metrics["*"]["step"] == "step" and found.metrics["train/loss"]["summary"] == ["last", "min"]
    assert [set(artifact["aliases"]) for artifact in found.artifacts] == [{"latest", "step_4"}, {"latest", "step_5"}]
    assert {"layers/0/grad_norm", "layers/1/activation_rms", "layers/embed/weight_norm"} <= set(found.rows[1])
    assert str(path / "wandb") in said(path), "where it is, and how to send it"
    assert not list((tmp_path / "home").rglob("*")), "nothing is left in the home of the user"


def test_a_killed_run_goes_on_as_the_same_run(corpus: Path, tmp_path: Path) -> None:
    """Killed twice, once after a checkpoint and once before the next: some steps are computed again, and W&B is shown that."""
    path = tmp_path / "r"
    cfg = config(corpus, path, *OFFLINE, "train.steps=10", "checkpoint.every=4")
    # 1 to 6, then 5 to 9, then 9 and 10
    update = "megatron_scratch.engine.ddp:DDPEngine.update"
    assert run(cfg, 1, once_followed(path, kill_after(update, 7))) == [-signal.SIGKILL]
    assert run(cfg, 1, once_followed(path, kill_after(update, 6))) == [-signal.SIGKILL]
    assert run(cfg) == [0]
    found = recorded(path)
    assert [part.exit_code for part in found] == [1, 1, 0]
    rows = [row for part in found for row in part.rows]
    check_same(rows, path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8, 9, 9, 10]
    assert [row["_step"] for row in rows] == [*range(1, 14)]

    with Server() as server:
        sync(path / "wandb", env=server.env)
        served = server.only()
        assert served.rows() == rows
        assert served.exit == 0 and served.config["start"]["value"]["attempt"] == 3
        sync(path / "wandb", env=server.env)
        assert served.rows() == rows, "what was sent is not sent again"
