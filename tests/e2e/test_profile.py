"""`train.profile`: a trace and a table of some steps of a real run, under several layouts, and numbers that stay the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from runs import config, kill_after, rows, run

from megatron_scratch.report.trace import read
from megatron_scratch.train import profile
from megatron_scratch.train.step import StepResult, TrainStep
from megatron_scratch.util.errors import RunFailed

# Matrices that are seen beside what is around them.
WIDE = ["model.hidden_size=128", "model.ffn_size=512"]


def told(folder: Path, rank: int = 0) -> dict[str, Any]:
    return json.loads((folder / f"rank_{rank:05d}.json").read_text())  # type: ignore[no-any-return]


def during(events: list[dict[str, Any]], name: str, moment: float) -> bool:
    (mark,) = [e for e in events if e["name"] == name]
    return bool(mark["ts"] <= moment < mark["ts"] + mark["dur"])


def log(run_dir: Path, rank: int = 0) -> str:
    return (run_dir / "logs" / f"rank_{rank:05d}.log").read_text()


@pytest.fixture(scope="module")
def plain(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[float, float]]:
    """step -> (loss, gradient norm) of a run that is not profiled."""
    path = tmp_path_factory.mktemp("plain")
    assert run(config(corpus, path, *WIDE, "train.steps=6")) == [0]
    return rows(path)


@pytest.mark.parametrize("layout", ["", "precision=bf16", "parallel.recompute=full"])
def test_one_process(layout: str, corpus: Path, plain: dict[int, tuple[float, float]], tmp_path: Path) -> None:
    words = [*WIDE, "train.steps=6", *layout.split(), "train.eval_every=3"]
    assert run(config(corpus, tmp_path / "p", *words, "train.profile.steps=[2,4]", "train.profile.memory=true")) == [0]
    if layout != "precision=bf16":
        assert rows(tmp_path / "p") == plain, "to the last bit"
    folder = tmp_path / "p" / "profile" / "steps_2_4"
    found = told(folder)
    assert [s["step"] for s in found["steps"]] == [2, 3, 4]
    for row in (*found["steps"], found):
        assert sum(row["parts"].values()) == pytest.approx(row["seconds"], rel=1e-9)
    parts = found["parts"]
    assert min(parts[part] for part in ("gemm", "norm", "loss", "attention", "optimizer")) > 0 and parts["communication"] == 0
    events = read(folder / "rank_00000.trace.json.gz")["traceEvents"]
    names = {e["name"] for e in events}
    assert {"step 2", "step 3", "step 4", "phase: data", "phase: update", "part: norm", "part: attention", "part: loss"} <= names
    assert not {"step 1", "step 5"} & names
    assert min(s["parts"]["between steps"] for s in found["steps"]) > 0
    (evaluation,) = [e["ts"] for e in events if e["name"] == "phase: evaluate"]
    assert during(events, "step 3", evaluation) and not during(events, "step 4", evaluation), "what follows a step is told with it"
    assert found["top"] and "gemm" in (folder / "rank_00000.txt").read_text()
    held = json.loads((folder / "rank_00000.memory.json").read_text())
    assert held["peak_bytes"] == max(total for _, total in held["ms_bytes"]) > 2 * 32 * 128 * 4, "one activation is more than that"
    assert (folder / "rank_00000.memory.png").read_bytes()[:4] == b"\x89PNG"
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]
    assert "profile of 3 steps in" in log(tmp_path / "p")


@pytest.mark.parametrize("layout", ["engine=ddp", "engine=fsdp", "parallel.tp=2", "parallel.pp=2"])
def test_two_ranks(layout: str, corpus: Path, tmp_path: Path) -> None:
    """Both are profiled, and both say what waiting for each other cost; the numbers are those of the same run without a profile."""
    words = [*WIDE, "train.steps=4", layout]
    assert run(config(corpus, tmp_path / "plain", *words, world=2), 2) == [0, 0]
    assert run(config(corpus, tmp_path / "p", *words, "train.profile.steps=[2,3]", "train.profile.ranks=null", world=2), 2) == [
        0,
        0,
    ]
    assert rows(tmp_path / "p") == rows(tmp_path / "plain")
    for rank in (0, 1):
        found = told(tmp_path / "p" / "profile" / "steps_2_3", rank)
        assert sum(found["parts"].values()) == pytest.approx(found["seconds"], rel=1e-9) and found["rank"] == rank
        assert found["parts"]["communication"] > 0
        assert found["parts"]["gemm"] > 0 and found["parts"]["norm"] > 0


def test_only_the_ranks_that_were_asked_for(corpus: Path, tmp_path: Path) -> None:
    cfg = config(corpus, tmp_path, "train.steps=3", "train.profile.steps=[1,2]", "train.profile.ranks=[1]", world=2)
    assert run(cfg, 2) == [0, 0]
    assert {p.name.partition(".")[0] for p in (tmp_path / "profile" / "steps_1_2").iterdir()} == {"rank_00001"}


def test_a_run_that_goes_on_inside_of_the_window_profiles_what_is_left(corpus: Path, tmp_path: Path) -> None:
    words = ["train.steps=6", "checkpoint.every=2", "train.profile.steps=[2,4]"]
    cfg = config(corpus, tmp_path, *words)
    fault = kill_after("megatron_scratch.train.step:TrainStep.__call__", 3)  # steps 1 and 2 are done, and a checkpoint is there
    assert run(cfg, fault=fault)[0] < 0
    assert not (tmp_path / "profile").exists()
    assert run(cfg) == [0]
    assert [p.name for p in (tmp_path / "profile").iterdir()] == ["steps_3_4"]
    assert [s["step"] for s in told(tmp_path / "profile" / "steps_3_4")["steps"]] == [3, 4]
    assert run(config(corpus, tmp_path, *words, "train.steps=8")) == [0]
    assert "nothing left to profile" in log(tmp_path)


def test_a_profile_that_cannot_be_written_costs_no_run(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("a file where a folder should be")
    assert run(config(corpus, tmp_path, "train.steps=3", "train.profile.steps=[1,2]")) == [0]
    line = next(line for line in log(tmp_path).splitlines() if "could not be written" in line)
    assert "steps 1 to 2" in line and "profile/steps_1_2" in line
    assert set(rows(tmp_path)) == {1, 2, 3}


def fail_in_the_third_step() -> None:
    whole, calls = TrainStep.__call__, []

    def step(self: TrainStep, number: int) -> StepResult:
        calls.append(number)
        if len(calls) == 3:
            raise RunFailed("in the third step")
        return whole(self, number)

    TrainStep.__call__ = step  # type: ignore[method-assign]


def test_a_run_that_fails_inside_of_the_window(corpus: Path, tmp_path: Path) -> None:
    cfg = config(corpus, tmp_path, "train.steps=6", "train.profile.steps=[2,5]")
    assert run(cfg, fault=fail_in_the_third_step) == [1]
    text = log(tmp_path)
    assert "ended inside of them, nothing is written" in text and "RunFailed: in the third step" in text
    assert not (tmp_path / "profile").exists()


def test_a_profiler_that_does_not_start_costs_no_run(corpus: Path, tmp_path: Path) -> None:
    def broken() -> None:
        profile.prepare_profiler = lambda: 1 / 0  # type: ignore[assignment]

    assert run(config(corpus, tmp_path, "train.steps=3", "train.profile.steps=[1,2]"), fault=broken) == [0]
    assert "does not start: ZeroDivisionError" in log(tmp_path) and set(rows(tmp_path)) == {1, 2, 3}


def test_torch_says_nothing_of_its_own(corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(config(corpus, tmp_path, "train.steps=2", "train.profile.steps=[2,2]")) == [0]
    assert capfd.readouterr().err == ""
