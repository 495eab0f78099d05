"""Layouts that cannot be are refused in one line before a process is started: what, got, allowed, what to do."""

from __future__ import annotations

import pytest
from refused import refused_in_one_line

from megatron_scratch.cli import main
from megatron_scratch.config import check, compose
from megatron_scratch.config.engine import replicas
from megatron_scratch.config.shrink import shrink, small_world, vet
from megatron_scratch.util.env import Rank, read_rank
from megatron_scratch.util.errors import UserError

TP4 = ["parallel.tp=4", "model.fused_qkv=false"]

# (processes, overrides, what the message must contain); the model is llama_tiny: 4 heads, 2 key/value heads, ffn 352
REFUSED = [
    (3, ["parallel.tp=2"], ["world of 3", "parallel.tp x pp x cp = 2", "launcher.processes=4"]),
    (3, ["parallel.tp=3"], ["parallel.tp=3", "128", "1, 2, 4, 8, 16, 32, 64, 128"]),
    (1, ["parallel.tp=0"], ["parallel.tp=0", "at least 1"]),
    (2, ["parallel.tp=2", "model.num_heads=3", "model.num_kv_heads=3", "model.head_dim=8"], ["num_heads=3", "tp=2", "2, 4"]),
    (2, ["parallel.tp=2", "model.ffn_size=99"], ["ffn_size=99", "parallel.tp=2", "98, 100"]),
    (4, ["parallel.tp=4"], ["parallel.tp=4", "num_kv_heads=2", "model.fused_qkv=false"]),
    (4, ["parallel.tp=4", "model.num_heads=12", "model.num_kv_heads=6", "model.head_dim=8"], ["num_kv_heads=6", "parallel.tp=4"]),
    (2, ["parallel.tp=2", "train.seq_len=7", "train.micro_batch_size=1"], ["7 tokens", "parallel.tp=2", "sequence_parallel=false"]),
    (1, ["parallel.sequence_parallel=true"], ["parallel.sequence_parallel=true has no effect", "parallel.tp=1"]),
    (1, ["parallel.overlap=true"], ["parallel.overlap=true has no effect", "parallel.tp=1"]),
    (1, ["parallel.ep=2"], ["parallel.ep=2", "not in this version"]),
    (2, ["parallel.cp=2"], ["parallel.cp=2", "not in this version"]),
    (4, ["engine=hsdp", "train.micro_batch_size=4"], ["engine=hsdp", "one copy per node = 1", "engine.replicas=N", "engine=fsdp"]),
    (4, ["engine=hsdp", "engine.replicas=3", "train.micro_batch_size=4"], ["engine.replicas=3", "size 4", "[2, 4]"]),
    (1, ["engine=fsdp", "engine.bucket_mb=10"], ["engine.bucket_mb"]),
    (1, ["engine=fsdp", "engine.reduce_every_microbatch=true"], ["reduce_every_microbatch=true has no effect", "on one data"]),
    (1, ["engine=ddp", "engine.bucket_mb=0"], ["engine.bucket_mb=0", "at least 1"]),
    (1, ["engine=zero1", "engine.offload_param=true"], ["engine.offload_param"]),
    (1, ["engine=zero3", "engine.persist=-1"], ["engine.persist=-1", "negative"]),
    (1, ["engine=zero2", "precision=fp64"], ["precision=fp64", "engine=zero2", "fsdp"]),
    (1, ["engine=zero3", "train.compile=true"], ["train.compile=true", "engine=zero3"]),
    (2, ["engine=fsdp", "optim=muon", "train.micro_batch_size=8"], ["optim=muon", "engine=fsdp", "optim=adamw"]),
    (2, ["parallel.tp=2", "optim=muon"], ["optim=muon", "parallel.tp=2"]),
    (1, ["engine=zero"], ["engine=zero", "zero1, zero2, zero3"]),
    (1, ["parallel.tq=2"], ["parallel.tq", "parallel.tp"]),
]  # fmt: skip


@pytest.mark.parametrize(("world", "overrides", "words"), REFUSED, ids=[" ".join(r[1]) for r in REFUSED])
def test_refused_in_one_line(world: int, overrides: list[str], words: list[str]) -> None:
    refused_in_one_line(world, overrides, words)


@pytest.mark.parametrize("overrides", [["parallel.tp=4"], ["engine=zero1", "precision=fp64"],
                                       ["engine=hsdp", "engine.replicas=3", "launcher.processes=4", "train.micro_batch_size=4"],
                                       ["launcher.processes=3", "parallel.tp=2"], ["parallel.sequence_parallel=true"]])  # fmt: skip
@pytest.mark.parametrize("verb", ["train", "parity"])
def test_exit_code_2_before_anything_starts(verb: str, overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, *overrides]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1


@pytest.mark.parametrize("verb", ["train", "parity"])
def test_degrees_that_are_none(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    for tp in (0, -2):
        assert main([verb, f"parallel.tp={tp}", "launcher.processes=2"]) == 2
        assert f"parallel.tp={tp} must be at least 1" in capsys.readouterr().err


def test_parity_of_no_steps_or_too_many_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", "parity.steps=0"]) == 2
    assert "parity.steps=0 must be at least 1" in capsys.readouterr().err
    assert main(["parity", "parity.steps=11"]) == 2
    assert "allowed: up to 10, or any with precision=fp64" in capsys.readouterr().err


def test_parity_of_one_process_with_itself_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", "launcher.processes=1"]) == 2
    assert "launcher.processes=1: one process would be compared with itself" in capsys.readouterr().err


def test_deepspeed_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_scratch.config.engine.find_spec", lambda name: None)
    with pytest.raises(UserError, match="engine=zero2 needs DeepSpeed, which is not installed; pip install .*, or use engine=fsdp"):
        check(compose.load(["engine=zero2"]), 1)
    check(compose.load(["engine=fsdp"]), 1)


def test_hybrid_sharding_makes_a_copy_per_node() -> None:
    env = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    slurm = {
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
    }
    assert read_rank(env) == read_rank(slurm) == Rank(5, 8, 1, True, nodes=2)
    cfg = compose.load(["engine=hsdp", "train.micro_batch_size=2"])
    check(cfg, 8, nodes=2)
    assert replicas(cfg.engine, 8, nodes=2) == 2
    with pytest.raises(UserError, match="one copy per node = 3: does not divide the data-parallel size 8"):
        check(cfg, 8, nodes=3)


PRESETS = ["model=gpt2_1558m parallel.tp=1", "model=llama3_8b parallel.tp=8", "model=qwen3_0_6b parallel.tp=4", "model=llama2_7b",
           "model=llama3_405b parallel.tp=16 model.fused_qkv=false", "model=scratch parallel.tp=2 engine=hsdp engine.replicas=2",
           "model=gpt3_175b parallel.tp=32", "model=llama_tiny model.sliding_window=9 train.seq_len=8"]  # fmt: skip


@pytest.mark.parametrize("words", PRESETS)
def test_a_shrunk_config_is_small_legal_and_of_the_same_structure(words: str) -> None:
    cfg = compose.load(words.split())
    world = small_world(cfg)
    vet(cfg, world)
    small = shrink(cfg, world)
    check(small, world)
    old, new, tp = cfg.model, small.model, cfg.parallel.tp
    assert new.hidden_size <= 1024 and new.num_layers == 2 and world <= 4 * tp
    assert (old.kv_heads == old.num_heads) == (new.kv_heads == new.num_heads) and (old.kv_heads < tp) == (new.kv_heads < tp)
    same = ("position", "norm", "norm_place", "mlp", "bias", "qkv_bias", "fused_qkv", "qk_norm", "tie_embeddings", "dropout")
    assert all(getattr(old, key) == getattr(new, key) for key in same)
    assert (old.hidden_size == old.num_heads * old.head_size) == (new.hidden_size == new.num_heads * new.head_size)
    assert (old.sliding_window is None) == (new.sliding_window is None)
    assert cfg.model.num_layers != 2, "the original is left as it was"


def test_accumulation_survives_shrinking() -> None:
    cfg = compose.load(["train.global_batch_size=64", "train.micro_batch_size=8", "launcher.processes=4", "parallel.tp=2"])
    small = shrink(cfg, small_world(cfg))
    assert (small.train.micro_batch_size, small.train.global_batch_size) == (2, 16), "4 microbatches on each of 2 ranks"
