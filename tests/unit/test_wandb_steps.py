"""Which rows go to W&B, under which step and in which order."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from megatron_scratch.logs import wandb_steps
from megatron_scratch.logs.wandb_steps import Steps


def add(steps: Steps, *numbers: int, **values: Any) -> None:
    for n in numbers:
        steps.add({"step": n, **values})


def sent(steps: Steps, all_of_it: bool = False) -> list[tuple[int, int, int]]:
    """(W&B's step, ours, overlap)"""
    return [(step, values["step"], values.get("overlap", 0)) for step, values in steps.ready(all_of_it)]


def test_names() -> None:
    row = {"step": 1, "time": 5.0, "tokens": 9, "loss": 1.5, "lr": 0.1, "mfu": 0.4, "data_seconds": 0.1, "memory_gib": 2.0,
           "val_loss/wiki": 2.0, "val_loss": 3.0, "val_bits_per_byte/a/b": 1.0, "something": 7}  # fmt: skip
    assert wandb_steps.metrics(row) == {
        "step": 1, "_timestamp": 5.0, "tokens": 9, "train/loss": 1.5, "train/lr": 0.1, "speed/mfu": 0.4, "time/data_seconds": 0.1,
        "memory/gib": 2.0, "val/loss/wiki": 2.0, "val/loss": 3.0, "val/bits_per_byte/a/b": 1.0, "something": 7,
    }  # fmt: skip
    row = {"step": 2, "time": 6.0, "layers": {"embed": {"grad_norm": 1.0}, "layers.0": {"grad_norm": 2.0, "weight_norm": 3.0}}}
    assert wandb_steps.layers(row) == {"step": 2, "_timestamp": 6.0, "layers/embed/grad_norm": 1.0, "layers/0/grad_norm": 2.0,
                                       "layers/0/weight_norm": 3.0}  # fmt: skip


def test_no_name_of_w_and_b_has_two_of_ours() -> None:
    assert len(set(wandb_steps.NAMES.values())) == len(wandb_steps.NAMES)


def test_a_step_waits_until_all_files_have_been_read_beyond_it() -> None:
    steps = Steps()
    add(steps, 1, 2, 3, a=1)
    assert sent(steps) == [], "of 3 there may be more, and of 1 and 2 in files that were read before"
    add(steps, 1, 2, 3, b=2)
    add(steps, 4, a=1)
    out = dict(steps.ready())
    assert out == {1: {"step": 1, "a": 1, "b": 2}, 2: {"step": 2, "a": 1, "b": 2}}
    add(steps, 4, b=2)
    assert sent(steps) == [(3, 3, 0)]
    assert sent(steps) == []
    assert dict(steps.ready(True)) == {4: {"step": 4, "a": 1, "b": 2}}


ROWS = [{"_timestamp": 10.0, "x": 1}, {"_timestamp": 20.0, "y": 2}, {"z": 3}]


@pytest.mark.parametrize("order", list(itertools.permutations(ROWS)))
def test_a_step_has_the_time_of_its_earliest_row(order: tuple[dict[str, Any], ...]) -> None:
    """Its rows lie in several files, and a look at them may fall between two that are being written."""
    steps = Steps()
    for values in order:
        add(steps, 1, **values)
    assert dict(steps.ready(True)) == {1: {"step": 1, "_timestamp": 10.0, "x": 1, "y": 2, "z": 3}}


def test_the_later_of_two_values_counts() -> None:
    steps = Steps()
    add(steps, 1, x=1)
    add(steps, 1, x=2)
    assert dict(steps.ready(True)) == {1: {"step": 1, "x": 2}}


def test_what_is_there_is_passed_over() -> None:
    steps = Steps(last=3)
    add(steps, 1, 3, 4)
    assert sent(steps, True) == [(4, 4, 0)]
    add(steps, 4)
    assert sent(steps, True) == []


def test_steps_computed_anew_follow_and_are_marked() -> None:
    steps = Steps()
    add(steps, 1, 2, 3, 4, 5)
    assert len(sent(steps, True)) == 5
    steps.rewound(3)
    steps.rewound(3)  # which may be said twice
    add(steps, 4, 5, 6, 7)
    assert sent(steps, True) == [(6, 4, 1), (7, 5, 1), (8, 6, 0), (9, 7, 0)]


def test_back_again_before_the_old_end_is_reached() -> None:
    steps = Steps()
    add(steps, *range(1, 9))
    sent(steps, True)
    steps.rewound(2)
    add(steps, 3, 4)
    sent(steps, True)
    steps.rewound(3)
    add(steps, *range(4, 11))
    out = sent(steps, True)
    assert out == [(11 + n, 4 + n, int(4 + n <= 8)) for n in range(7)]


def test_rows_that_wait_go_with_the_steps_that_they_are_of() -> None:
    """Nobody has seen them: nothing overlaps."""
    steps = Steps()
    add(steps, 1, 2, 3)
    sent(steps)
    add(steps, 4, 5)
    assert sent(steps) == [(1, 1, 0), (2, 2, 0)]
    steps.rewound(3)
    add(steps, 4)
    assert sent(steps) == [], "which of 3 is whole, only the next look tells"
    add(steps, 5)
    assert sent(steps) == [(3, 3, 0)]
    assert sent(steps, True) == [(4, 4, 0), (5, 5, 0)]


def test_texts_of_a_step_are_together_and_once() -> None:
    steps = Steps()
    for text in ("a", "b", "a"):
        steps.add_sample({"step": 2, "text": text})
    assert dict(steps.ready(True)) == {2: {"step": 2, "samples": [{"step": 2, "text": "a"}, {"step": 2, "text": "b"}]}}
