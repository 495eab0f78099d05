"""Whole runs over a pipeline: logged once, evaluated as one process is, stopped under one layout and gone on under another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs import config, rows, run

from megatron_scratch.cli import main

MODEL = ["model.num_layers=5", "model.tie_embeddings=true", "schedule=constant", "optim=sgd", "optim.lr=0.1", "optim.momentum=0.9",
         "train.micro_batch_size=1", "train.eval_every=3"]  # fmt: skip

# processes, overrides
LAYOUTS = {
    "one": (1, []),
    "pp": (2, ["parallel.pp=2"]),
    "pp_fsdp": (4, ["parallel.pp=2", "engine=fsdp", "parallel.schedule=gpipe", "parallel.recompute=full"]),
    "zbv_tp": (4, ["parallel.pp=2", "parallel.tp=2", "parallel.schedule=zbv_zero_bubble"]),
    "interleaved": (2, ["parallel.pp=2", "parallel.schedule=interleaved_1f1b", "parallel.stages=[2,1,1,1]"]),
    "dualpipev_fsdp": (4, ["parallel.pp=2", "parallel.schedule=dualpipev", "engine=fsdp"]),
    "fsdp_tp": (4, ["engine=fsdp", "parallel.tp=2"]),
}
# By default those that tests/faults/test_reshard.py has not.
SWITCHES = [("zbv_tp", "fsdp_tp"), ("fsdp_tp", "dualpipev_fsdp"), ("dualpipev_fsdp", "interleaved"), ("interleaved", "pp_fsdp"),
            *(pytest.param(*pair, marks=pytest.mark.full)
              for pair in [("one", "pp"), ("pp", "zbv_tp"), ("pp_fsdp", "one")])]  # fmt: skip


def _go(corpus: Path, path: Path, layout: str, *more: str) -> None:
    world, overrides = LAYOUTS[layout]
    assert run(config(corpus, path, *MODEL, *overrides, *more, world=world), world) == [0] * world


def _evaluations(run_dir: Path) -> dict[int, float]:
    logged = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    found = [(row["step"], row["val_loss"]) for row in logged if "val_loss" in row]
    assert len(found) == len(dict(found)), "each evaluation is logged once"
    return dict(found)


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps in one process, never stopped."""
    path = tmp_path_factory.mktemp("whole")
    _go(corpus, path, "one", "train.steps=6")
    return path


@pytest.mark.parametrize(("before", "after"), SWITCHES)
def test_stop_under_one_layout_go_on_under_another(before: str, after: str, corpus: Path, tmp_path: Path, whole: Path) -> None:
    _go(corpus, tmp_path, before, "train.steps=3")
    _go(corpus, tmp_path, after, "train.steps=6")
    found = rows(tmp_path)
    assert list(found) == list(rows(whole))
    for step, (loss, norm) in rows(whole).items():  # fp32 sums over 256 tokens in another order, six steps
        assert found[step] == (pytest.approx(loss, rel=1e-5), pytest.approx(norm, rel=1e-5)), step
    assert _evaluations(tmp_path) == pytest.approx(_evaluations(whole), rel=1e-5)


def test_a_batch_that_grows_changes_the_number_of_microbatches(corpus: Path, tmp_path: Path) -> None:
    ramp = ["train.steps=5", "train.ramp.start=2", "train.ramp.increment=3", "train.ramp.samples=8", "train.eval_every=0"]
    for layout in ("one", "pp"):
        _go(corpus, tmp_path / layout, layout, *ramp)
    one, pipeline = rows(tmp_path / "one"), rows(tmp_path / "pp")
    for step, (loss, norm) in one.items():
        assert pipeline[step] == (pytest.approx(loss, rel=1e-5), pytest.approx(norm, rel=1e-5)), step


def test_a_model_trained_over_stages_is_evaluated_and_writes_in_one_process(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _go(corpus, tmp_path, "zbv_tp", "train.steps=3")
    assert main(["eval", str(tmp_path), "batches=2", "micro_batch_size=8"]) == 0
    assert f"loss {_evaluations(tmp_path)[3]:.4f}" in capfd.readouterr().out
    assert main(["generate", str(tmp_path), "prompt=import", "max_new_tokens=4", "stop_at_eod=false"]) == 0


def test_an_id_outside_of_the_vocabulary_ends_every_stage_alike(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    world, overrides = LAYOUTS["interleaved"]
    cfg = config(corpus, tmp_path, *MODEL, *overrides, "data.check_ids=false", world=world)
    cfg.model.vocab_size = 100  # the corpus is bytes: ids up to 256
    assert run(cfg, world) == [2] * world
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == world and all("allowed: 0 to 99 (model.vocab_size=100)" in line for line in lines)


@pytest.mark.full
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("layout", ["interleaved", "pp_fsdp"])
def test_compiled_blocks_compute_the_same(layout: str, corpus: Path, tmp_path: Path) -> None:
    for name, compiled in (("one", False), (layout, True)):
        _go(corpus, tmp_path / name, name, "train.steps=3", "model.dropout=0.1", f"train.compile={compiled}", "train.eval_every=0")
    one, other = rows(tmp_path / "one"), rows(tmp_path / layout)
    for step, (loss, norm) in one.items():
        assert other[step] == (pytest.approx(loss, rel=1e-5), pytest.approx(norm, rel=1e-5)), step
