"""Statistics by layer, written samples, named validation sets in whole runs: each has its rows, and none changes the training."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from runs import config, rows, run, weights


@pytest.mark.parametrize("words", [[], ["engine=fsdp", "parallel.tp=2"]], ids=["one", "fsdp-tp2"])
def test_whole_runs_write_and_train_alike(words: list[str], corpus: Path, tmp_path: Path) -> None:
    """Through the worker: rows at their steps and at the end, and the checkpoint of a run that writes nothing, hash for hash."""
    world, found = 2 if words else 1, {}
    for name, samples in (("silent", []), ("writes", ["train.samples.every=2", "train.samples.prompts=['','def ']",
                                                      "train.samples.tokens=8"])):  # fmt: skip
        path = tmp_path / name
        cfg = config(corpus, path, "train.steps=3", *words, *samples, world=world)
        assert run(cfg, world) == [0] * world
        found[name] = rows(path), weights(path, 3)
    assert found["silent"] == found["writes"]
    lines = [json.loads(line) for line in (tmp_path / "writes" / "samples.jsonl").read_text().splitlines()]
    assert [(line["step"], line["prompt"]) for line in lines] == [(2, ""), (2, "def "), (3, ""), (3, "def ")]
    assert not (tmp_path / "silent" / "samples.jsonl").exists()


def test_statistics_by_layer(corpus: Path, tmp_path: Path) -> None:
    """Of the steps that are due, and the training is the same, hash for hash; the squares of gradients are those of the whole."""
    found = {}
    for every in (0, 2):
        path = tmp_path / str(every)
        assert run(config(corpus, path, "train.steps=5", f"train.layers_every={every}", "model.dropout=0.1")) == [0]
        found[every] = rows(path), weights(path, 5)
    assert found[0] == found[2]
    assert not (tmp_path / "0" / "layers.jsonl").exists()
    lines = [json.loads(line) for line in (tmp_path / "2" / "layers.jsonl").read_text().splitlines()]
    assert [(line["step"], line["tokens"]) for line in lines] == [(2, 2 * 8 * 32), (4, 4 * 8 * 32)]
    for line in lines:
        assert list(line["layers"]) == ["embed", "layers.0", "layers.1", "norm", "head"]
        norm = math.hypot(*(layer["grad_norm"] for layer in line["layers"].values()))
        assert norm == pytest.approx(found[2][0][line["step"]][1], rel=1e-6)


def test_named_validation_sets(corpus: Path, tmp_path: Path) -> None:
    """Their loss is that of the run's own set, where they are the same; the training knows nothing of them."""
    sets = [f"data.valid_sets.again={corpus}", f"data.valid_sets.seen={corpus / 'train'}"]
    found = {}
    for name, words in (("plain", []), ("named", sets)):
        assert run(config(corpus, tmp_path / name, "train.steps=2", "train.eval_every=1", *words)) == [0]
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        found[name] = [line for line in lines if "val_loss" in line], rows(tmp_path / name), weights(tmp_path / name, 2)
    assert found["plain"][1:] == found["named"][1:]
    for plain, row in zip(found["plain"][0], found["named"][0], strict=True):
        for key in ("val_loss", "val_perplexity", "val_bits_per_byte"):
            assert plain[key] == row[key] == row[f"{key}/again"] != row[f"{key}/seen"]


def test_named_validation_losses_are_the_same_under_every_layout(corpus: Path, tmp_path: Path) -> None:
    """SGD, whose update is linear in the gradient: three steps in fp32 stay within 1e-5, as in test_train's comparison."""
    found = []
    for number, words in enumerate(([], ["engine=ddp"], ["engine=fsdp"], ["parallel.tp=2"], ["parallel.pp=2"])):
        path, world = tmp_path / str(number), 2 if words else 1
        run_words = ["optim=sgd", "optim.lr=0.3", "train.steps=3", f"data.valid_sets.seen={corpus / 'train'}", *words]
        cfg = config(corpus, path, *run_words, world=world)
        assert run(cfg, world) == [0] * world
        lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        found.append(next(line for line in lines if "val_loss" in line))
    for other in found[1:]:
        assert other["val_tokens/seen"] == found[0]["val_tokens/seen"]
        for key in ("val_loss", "val_loss/seen", "val_bits_per_byte/seen"):
            assert other[key] == pytest.approx(found[0][key], rel=1e-5), key
