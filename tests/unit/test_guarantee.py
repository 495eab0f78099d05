"""What a resume promises: each thing that can have changed, and the words for it."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_scratch.config import compose
from megatron_scratch.train.guarantee import changes, facts, guarantee

DEGREES = {"dp": 2, "tp": 1, "pp": 1, "cp": 1, "replicate": 1}
MACHINE = {"threads": 1, "device": "cpu AVX512", "torch": "2.13.0"}
ORDER = "state bitwise; sums in another order: losses to {} ({}): "
ASKED = "state bitwise; other losses from here on, as asked: "
FP32 = ORDER.format("1e-05", "fp32")


def of(overrides: str = "", **other: Any) -> dict[str, Any]:
    """Facts of a run on two data-parallel ranks, with other degrees or another machine."""
    degrees, machine = ({key: other.get(key, value) for key, value in table.items()} for table in (DEGREES, MACHINE))
    return facts(compose.load(["model=llama_tiny", *overrides.split()]), degrees, machine)


def test_the_same_layout_and_machine() -> None:
    assert guarantee(of(), of()) == "bitwise: the same layout, threads, torch and device"
    gpu = of(device="NVIDIA H200", threads=None)
    same = "state bitwise; the same layout, threads, torch and device: losses too where its kernels add in a fixed order"
    assert guarantee(gpu, gpu) == same


@pytest.mark.parametrize(("overrides", "other", "words"), [
    ("", {"dp": 1}, FP32 + "dp 2 -> 1"),
    ("parallel.tp=2", {"dp": 1, "tp": 2}, FP32 + "dp 2 -> 1, tp 1 -> 2, sequence_parallel False -> True"),
    ("parallel.tp=2 parallel.sequence_parallel=false", {"tp": 2}, FP32 + "tp 1 -> 2"),
    ("parallel.pp=2", {"dp": 1, "pp": 2}, FP32 + "dp 2 -> 1, pp 1 -> 2, schedule None -> 1f1b"),
    ("parallel.pp=2 parallel.schedule=zbv_zero_bubble", {"pp": 2},
     FP32 + "pp 1 -> 2, schedule None -> zbv_zero_bubble, virtual_stages 1 -> 2"),
    ("parallel.stages=[1,2]", {}, FP32 + "stages None -> [1, 2]"),
    ("engine=fsdp", {}, FP32 + "engine ddp -> fsdp"),
    ("engine=hsdp", {"replicate": 2}, FP32 + "replicate 1 -> 2, engine ddp -> hsdp"),
    ("engine.bucket_mb=1", {}, FP32 + "engine.bucket_mb 25 -> 1"),
    ("train.micro_batch_size=4", {}, FP32 + "micro_batch_size 16 -> 4"),
    ("train.canonical_reduction=true", {}, FP32 + "canonical_reduction False -> True"),
    ("train.compile=true", {}, FP32 + "compile False -> True"),
    ("model.attention=reference", {}, FP32 + "attention auto -> reference"),
    ("model.norm_kernel=auto", {}, FP32 + "norm_kernel torch -> auto"),
    ("optim.kernel=auto", {}, FP32 + "optim.kernel torch -> auto"),
    ("", {"threads": 4}, FP32 + "threads 1 -> 4"),
    ("", {"torch": "2.14.0"}, FP32 + "torch 2.13.0 -> 2.14.0"),
    ("", {"device": "cpu AVX2"}, FP32 + "device cpu AVX512 -> cpu AVX2"),
    ("precision=bf16", {}, "state bitwise; computed in another precision: losses to its rounding: precision fp32 -> bf16"),
    ("optim.lr=1e-5", {}, ASKED + "optim.lr 0.0003 -> 1e-05"),
    ("optim.betas=[0.9,0.99]", {}, ASKED + "optim.betas [0.9, 0.95] -> [0.9, 0.99]"),
    ("optim.clip_grad_norm=0", {}, ASKED + "optim.clip_grad_norm 1.0 -> 0.0"),
    ("schedule=constant", {}, ASKED + "schedule cosine -> constant"),
    ("schedule.warmup_steps=7", {}, ASKED + "schedule.warmup_steps 0 -> 7"),
    ("train.steps=2000", {}, ASKED + "schedule.steps 1000 -> 2000"),
    ("train.global_batch_size=32", {}, ASKED + "train.global_batch_size 16 -> 32"),
    ("train.ramp.start=16 train.ramp.samples=9", {}, ASKED + "train.ramp.start None -> 16, train.ramp.samples 0 -> 9"),
    ("train.z_loss=1e-4", {}, ASKED + "train.z_loss 0.0 -> 0.0001"),
    ("model.dropout=0.1", {"dp": 4}, ASKED + "model.dropout 0.0 -> 0.1; and sums in another order: dp 2 -> 4"),
    ("name=other train.log_every=3 checkpoint.every=4 train.steps=1000 parallel.recompute=full data.check_ids=false", {},
     "bitwise: the same layout, threads, torch and device"),
])  # fmt: skip
def test_each_change(overrides: str, other: dict[str, Any], words: str) -> None:
    base = of("schedule=cosine")
    assert guarantee(base, of(f"schedule=cosine {overrides}", **other)) == words


def test_tolerances_are_of_the_precision() -> None:
    for precision, limit in (("fp64", "1e-10"), ("bf16", "0.005"), ("fp16", "0.005")):
        before, now = of(f"precision={precision}"), of(f"precision={precision}", dp=4)
        assert guarantee(before, now) == ORDER.format(limit, precision) + "dp 2 -> 4"
    before, now = of("precision=fp8"), of("precision=fp8", dp=4)
    assert guarantee(before, now) == "state bitwise; sums in another order: losses to an unknown tolerance (fp8): dp 2 -> 4"


def test_one_order_at_every_dp() -> None:
    mode, order = "train.canonical_reduction=true", "bitwise: sums have one order at every dp (train.canonical_reduction): "
    assert guarantee(of(mode), of(mode, dp=1)) == order + "dp 2 -> 1"
    assert guarantee(of(mode), of(f"{mode} engine.bucket_mb=1", dp=4)) == order + "dp 2 -> 4, engine.bucket_mb 25 -> 1"
    assert guarantee(of(mode), of(mode, dp=1, threads=2)) == FP32 + "dp 2 -> 1, threads 1 -> 2"
    assert guarantee(of(mode), of(mode, dp=1, tp=2)).startswith(FP32)
    assert guarantee(of(), of(mode, dp=1)).startswith(FP32), "what wrote it had no one order, but its state is what it is"
    on_gpu = {"device": "NVIDIA H200", "threads": None}
    assert not guarantee(of(mode, **on_gpu), of(mode, dp=1, **on_gpu)).startswith("bitwise")


def test_compiled_code_may_round_otherwise_what_it_computes_again() -> None:
    before, now = of("train.compile=true"), of("train.compile=true parallel.recompute=full")
    assert guarantee(before, now) == FP32 + "recompute ['none', 1, [], None] -> ['full', 1, [], None]"


def test_dropout_masks_are_of_a_microbatch() -> None:
    """They are functions of its first sample: cut otherwise, the samples get other masks, and losses that are not near."""
    before, now = of("model.dropout=0.1"), of("model.dropout=0.1 train.micro_batch_size=4")
    assert guarantee(before, now) == ASKED + "micro_batch_size, and with it dropout masks, 16 -> 4"


def test_a_checkpoint_that_does_not_say() -> None:
    assert "does not say what wrote it" in guarantee(None, of())


def test_what_has_another_name_is_not_compared_by_its_options() -> None:
    assert changes({"name": "a", "x": 1}, {"name": "b", "y": 2}, "engine.") == {"engine": ("a", "b")}
    assert changes({"name": "a", "x": 1}, {"name": "a", "y": 2}, "e.") == {"e.y": (None, 2), "e.x": (1, None)}
