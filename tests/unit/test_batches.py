"""Which samples a step consumes."""

from __future__ import annotations

from megatron_scratch.config.train import BatchRamp, TrainConfig
from megatron_scratch.train.batches import BatchPlan


def walk(plan: BatchPlan, steps: int) -> list[tuple[int, int]]:
    return [plan.at(step) for step in range(steps)]


def test_constant() -> None:
    assert walk(BatchPlan(TrainConfig(global_batch_size=4)), 3) == [(0, 4), (4, 4), (8, 4)]


def test_ramp_is_megatrons_rule() -> None:
    cfg = TrainConfig(global_batch_size=16, ramp=BatchRamp(start=4, increment=4, samples=60))
    consumed, expected = 0, []
    for _ in range(20):  # the rule itself, step by step
        size = min(16, 4 + 4 * (consumed * 3 // 60)) if consumed < 60 else 16
        expected.append((consumed, size))
        consumed += size
    assert walk(BatchPlan(cfg), 20) == expected


def test_ramp_over_nothing_is_no_ramp() -> None:
    cfg = TrainConfig(global_batch_size=16, ramp=BatchRamp(start=4, increment=4, samples=0))
    assert BatchPlan(cfg).at(0) == (0, 16)


def test_rebase_loses_and_repeats_nothing() -> None:
    before, after = BatchPlan(TrainConfig(global_batch_size=4)), BatchPlan(TrainConfig(global_batch_size=6))
    after.rebase(step=5, consumed=before.consumed(5))
    assert after.at(5) == (20, 6) and after.at(6) == (26, 6)
