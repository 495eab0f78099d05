"""A run goes on with another config: each field is fatal, said in the ledger, or free. The table below has all of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from runs import config, ledger, run

from megatron_scratch.config import Config, CorpusConfig
from megatron_scratch.config.precision import SETTINGS
from megatron_scratch.corpus.pipeline import prepare
from megatron_scratch.train.build import FREE_MODEL_FIELDS

BASE = ["train.steps=1", "model.dropout=0.1", "schedule=cosine", "train.eval_batches=1", "train.global_batch_size=4"]
BITWISE = "bitwise: the same layout"

# What is changed -> words of the one line that refuses it.
FATAL = {
    "seed=7": "seed is 7",
    "model.num_layers=3": "model.num_layers is 3",
    "model.ffn_size=96": "model.ffn_size is 96",
    "model.num_kv_heads=1": "model.num_kv_heads is 1",
    "model.vocab_size=300": "model.vocab_size is 300",
    "model.max_seq_len=64": "model.max_seq_len is 64",
    "model.rope.theta=500000": "model.rope is",
    "model.position=none": "model.position is 'none'",
    "model.norm=layernorm": "model.norm is 'layernorm'",
    "model.norm_eps=1e-6": "model.norm_eps is 1e-06",
    "model.mlp=geglu": "model.mlp is 'geglu'",
    "model.tie_embeddings=true": "model.tie_embeddings is True",
    "model.sliding_window=8": "model.sliding_window is 8",
    "train.seq_len=16": "seq_len is 16",
    "optim=lion": "optim is 'lion'",
    "data.order=contiguous": "order is 'contiguous'",
    "data.order=megatron data.megatron_samples=100 data.megatron_split='90,10'": "order is 'megatron'",
    "data.consumed=4": "data is",
    "data.mask_documents=true": "mask_documents is True",
    "data.mask_eod=false": "mask_eod is False",
    "data.dir={other}": "data is",
    "data.dir=null data.blend=[{corpus}:1,{other}:1]": "data is",
    "precision=fp64": "is torch.float32",
}

# What is changed -> what the ledger's `resume` says of it.
SAID = {
    "train.micro_batch_size=4": "as asked: micro_batch_size, and with it dropout masks, 2 -> 4",
    "train.global_batch_size=8": "as asked: train.global_batch_size 4 -> 8",
    "train.ramp.start=2 train.ramp.increment=2 train.ramp.samples=4": "as asked: train.ramp.start None -> 2",
    "train.steps=3": "as asked: schedule.steps 1 -> 3",
    "train.z_loss=1e-4": "as asked: train.z_loss 0.0 -> 0.0001",
    "train.canonical_reduction=true": "(fp32): canonical_reduction False -> True",
    "train.threads=2": "(fp32): threads 1 -> 2",
    "model.dropout=0": "as asked: model.dropout 0.1 -> 0.0",
    "model.attention=reference": "(fp32): attention auto -> reference",
    "model.norm_kernel=auto": "(fp32): norm_kernel torch -> auto",
    "optim.lr=1e-3": "as asked: optim.lr 0.01 -> 0.001",
    "optim.weight_decay=0": "as asked: optim.weight_decay 0.1 -> 0.0",
    "optim.betas=[0.8,0.9]": "as asked: optim.betas [0.9, 0.95] -> [0.8, 0.9]",
    "optim.clip_grad_norm=0.5": "as asked: optim.clip_grad_norm 1.0 -> 0.5",
    "schedule=constant": "as asked: schedule cosine -> constant",
    "schedule.min_lr_ratio=0.5": "as asked: schedule.min_lr_ratio 0.1 -> 0.5",
    "precision=bf16": "computed in another precision: losses to its rounding: precision fp32 -> bf16",
    "engine=fsdp": "(fp32): engine ddp -> fsdp",
    "engine.bucket_mb=1": "(fp32): engine.bucket_mb 25 -> 1",
    "launcher.processes=2": "(fp32): dp 1 -> 2",
    "parallel.tp=2": "(fp32): tp 1 -> 2, sequence_parallel False -> True",
    "parallel.pp=2": "(fp32): pp 1 -> 2, schedule None -> 1f1b",
}

FREE = [
    "name=another", "train.log_every=5", "train.eval_every=1", "train.eval_batches=2", "train.peak_tflops=2", "logging=console",
    "data.check_ids=false", "data.valid={other}", "data.dir=null data.train={corpus}/train", "checkpoint.every=3",
    "checkpoint.keep_last=0", "parallel.recompute=full",
    "train.profile.steps=[1,1] train.profile.ranks=null train.profile.memory=true", "train.layers_every=1",
    "data.valid_sets={{wiki:{other}}}",
    "train.samples.every=1 train.samples.prompts=[a] train.samples.tokens=4 train.samples.temperature=0.5 train.samples.top_k=3",
]  # fmt: skip

# Leaves of the sections that have no row above: why not.
ELSEWHERE = {
    **dict.fromkeys(("parallel.cp", "parallel.ep"), "not in this version"),
    **dict.fromkeys(("parallel.sequence_parallel", "parallel.schedule", "parallel.virtual_stages", "parallel.stages",
                     "train.compile"),
                    "said: tests/unit/test_guarantee.py"),
    **dict.fromkeys(("parallel.overlap", "parallel.recompute_every", "parallel.recompute_save", "parallel.recompute_budget",
                     "parallel.offload_activations"), "free: the same bits"),
    **{f"precision.{key}": "said, as all of the section" for settings in SETTINGS.values() for key in settings},
    "data.tokenizer": "fatal: its sha256 is the dataset's, or it is refused before",
}  # fmt: skip


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of other text with the same vocabulary."""
    output = tmp_path_factory.mktemp("other") / "bytes"
    prepare(CorpusConfig(input="stdlib", output=str(output), tokenizer="byte", max_bytes=50_000, valid_fraction=0.2, seed=3))
    return output


@pytest.fixture(scope="module")
def first(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One step, and its checkpoint."""
    path = tmp_path_factory.mktemp("first") / "r"
    assert run(config(corpus, path, *BASE)) == [0]
    return path


def go_on(change: str, corpus: Path, path: Path, first: Path, other: Path) -> int:
    """Load the checkpoint under a changed config; nothing more is to be done then. The exit code."""
    overrides = change.format(other=other, corpus=corpus).split()
    world = 2 if "=2" in change and overrides[0].partition("=")[0] in ("launcher.processes", "parallel.tp", "parallel.pp") else 1
    codes = run(config(corpus, path, *BASE, f"checkpoint.resume={first}", *overrides, world=world), world)
    assert len(set(codes)) == 1
    return codes[0]


@pytest.mark.parametrize("change", FATAL)
def test_fatal(change: str, corpus: Path, tmp_path: Path, first: Path, other: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert go_on(change, corpus, tmp_path, first, other) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and FATAL[change] in lines[0]


@pytest.mark.parametrize("change", SAID)
def test_said(change: str, corpus: Path, tmp_path: Path, first: Path, other: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert go_on(change, corpus, tmp_path, first, other) == 0
    (event,) = ledger(tmp_path, "resume")
    assert event["guarantee"].startswith("state bitwise; ") and SAID[change] in event["guarantee"]
    assert event["guarantee"] in capfd.readouterr().out, "the screen says it too"


@pytest.mark.parametrize("change", FREE)
def test_free(change: str, corpus: Path, tmp_path: Path, first: Path, other: Path) -> None:
    assert go_on(change, corpus, tmp_path, first, other) == 0
    assert ledger(tmp_path, "resume")[0]["guarantee"].startswith(BITWISE)


def leaves(section: Any, prefix: str) -> Iterator[str]:
    for field in fields(section):
        value = getattr(section, field.name)
        yield from leaves(value, f"{prefix}.{field.name}") if is_dataclass(value) else [f"{prefix}.{field.name}"]


def test_no_field_is_forgotten() -> None:
    """A new field of these sections needs a row: what becomes of a run in which it changes?"""
    rows = {part.partition("=")[0] for change in [*FATAL, *SAID, *FREE] for part in change.split()}
    for name in ("train", "data", "parallel", "precision"):
        there = set(leaves(getattr(Config(), name), name)) - {f"{name}.name"}
        assert there - rows - set(ELSEWHERE) == set()
        assert {key for key in ELSEWHERE if key.startswith(f"{name}.")} <= there, "rows of fields that are gone"
    # All of the model is fatal but these: a checkpoint remembers the section, less what `SAID` has.
    assert {f"model.{field}" for field in FREE_MODEL_FIELDS} <= {change.partition("=")[0] for change in SAID}
