"""Schedules at their edges: first update, end of warm-up, last update, beyond the end."""

from __future__ import annotations

import math

import pytest

from megatron_scratch import registry
from megatron_scratch.config.optim import ScheduleConfig, WSDConfig
from megatron_scratch.optim import lr_at

TOTAL, WARM = 100, 9
NAMES = registry.names("schedule")


def schedule(name: str, **changes: object) -> ScheduleConfig:
    kind = registry.entry("schedule", name).config
    floor = {} if name == "constant" else {"min_lr_ratio": 0.1}
    return kind(**{"name": name, "warmup_steps": WARM, **floor, **changes})


@pytest.mark.parametrize("name", NAMES)
def test_warmup_is_a_straight_line_that_ends_at_1(name: str) -> None:
    cfg = schedule(name)
    assert [lr_at(cfg, s, TOTAL) for s in range(WARM + 1)] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert lr_at(schedule(name, warmup_steps=0), 0, TOTAL) == 1.0


@pytest.mark.parametrize("name", NAMES)
def test_it_never_rises_after_the_warmup_and_keeps_the_floor(name: str) -> None:
    values = [lr_at(schedule(name), s, TOTAL) for s in range(WARM, 5 * TOTAL)]
    assert all(a >= b for a, b in zip(values, values[1:], strict=False)) and min(values) >= 0.1


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd"])
def test_the_floor_is_reached_one_after_the_last_update(name: str) -> None:
    cfg = schedule(name)
    assert lr_at(cfg, TOTAL - 1, TOTAL) > 0.1
    assert lr_at(cfg, TOTAL, TOTAL) == pytest.approx(0.1) == pytest.approx(lr_at(cfg, 10 * TOTAL, TOTAL))


def test_shapes_in_the_middle() -> None:
    middle = WARM + (TOTAL - WARM) / 2
    cfg = schedule("cosine", warmup_steps=0)
    assert lr_at(cfg, 50, TOTAL) == pytest.approx(0.55)
    assert lr_at(schedule("linear"), int(middle), TOTAL) == pytest.approx(0.1 + 0.9 * (1 - (int(middle) - WARM) / 91))
    assert lr_at(schedule("inverse_sqrt"), 39, TOTAL) == pytest.approx(0.5)
    assert lr_at(schedule("constant"), 10**6, TOTAL) == 1.0


@pytest.mark.parametrize(("decay", "half"), [("linear", 0.5), ("sqrt", 1 - math.sqrt(0.5)), ("cosine", 0.5)])
def test_wsd_is_flat_then_falls(decay: str, half: float) -> None:
    cfg = WSDConfig(warmup_steps=WARM, min_lr_ratio=0.0, decay_ratio=0.2, decay=decay)
    assert [lr_at(cfg, s, TOTAL) for s in (WARM, 50, 80)] == [1.0, 1.0, 1.0]
    assert lr_at(cfg, 81, TOTAL) < 1.0 and lr_at(cfg, 90, TOTAL) == pytest.approx(half)
    assert lr_at(cfg, TOTAL, TOTAL) == 0.0


def test_own_length_takes_the_place_of_the_runs() -> None:
    assert lr_at(schedule("linear", steps=50), 50, TOTAL) == pytest.approx(0.1)


@pytest.mark.parametrize("name", NAMES)
def test_degenerate_lengths(name: str) -> None:
    assert lr_at(schedule(name, warmup_steps=1), 0, 1) == 0.5
    assert 0.1 <= lr_at(schedule(name, warmup_steps=1), 1, 1) <= 1.0
    assert lr_at(schedule(name, warmup_steps=0), 0, 1) == 1.0
