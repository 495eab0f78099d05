"""The pipeline's bubble: torch's schedules on a simulated clock, against the formulas, in exact arithmetic."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.pipelining import PipelineStage, schedules

from megatron_scratch import registry
from megatron_scratch.config.pipeline import owned_stages
from megatron_scratch.plan import bubble, picture
from megatron_scratch.plan.bubble import EVEN, FORMULAS, Action, Cost, activations, expected, simulate
from megatron_scratch.train.forked import run_ranks
from megatron_scratch.util.env import Rank
from megatron_scratch.util.errors import UserError

STAGES = {"gpipe": (1,), "1f1b": (1,), "interleaved_1f1b": (2, 3, 4), "interleaved_zero_bubble": (1, 2, 3), "zbv_zero_bubble": (2,),
          "dualpipev": (2,)}  # fmt: skip
SIZES = [(2, 2), (2, 3), (2, 4), (2, 8), (3, 6), (4, 4), (4, 6), (4, 8), (4, 16), (8, 8), (8, 16)]  # p, m
COSTS = [EVEN, Cost(2, 2, 1), Cost(2, 3, 1), Cost(10, 14, 10), Cost(4, 5, 3)]  # W <= F <= B
SKEWED = [Cost(1, 5, 5), Cost(5, 1, 5), Cost(1, 1, 5), Cost(5, 1, 1)]
order = cache(bubble.order)


def sizes(schedule: str) -> list[tuple[int, int, int]]:
    """(p, v, m) for which the formulas hold."""
    return [(p, v, m) for p, m in SIZES for v in STAGES[schedule] if m >= FORMULAS[schedule].enough(p)]


def test_every_schedule_has_a_formula() -> None:
    assert set(FORMULAS) == set(registry.names("pipeline")) == set(STAGES)
    assert all(len(sizes(schedule)) >= 6 for schedule in FORMULAS)


@pytest.mark.parametrize("schedule", FORMULAS)
def test_the_bubble_is_the_formulas(schedule: str) -> None:
    for p, v, m in sizes(schedule):
        for cost in COSTS if FORMULAS[schedule].ordered else COSTS + SKEWED:
            found, bounds = simulate(order(schedule, p, v, m), cost), expected(schedule, p, v, m, cost)
            assert bounds is not None and bounds[0] <= found.bubble <= bounds[1], (p, v, m, cost, found.bubble, bounds)
            assert bounds[0] == bounds[1] or schedule == "dualpipev" and cost.forward < cost.backward_input
            assert found.ideal == m * sum(cost) and all(sum(s.end - s.start for s in spans) == found.ideal for spans in found.ranks)


@pytest.mark.parametrize("schedule, published", [
    ("gpipe", lambda p, v, m: Fraction(p - 1, m)), ("1f1b", lambda p, v, m: Fraction(p - 1, m)),
    ("interleaved_1f1b", lambda p, v, m: Fraction(p - 1, v * m)),
    ("interleaved_zero_bubble", lambda p, v, m: Fraction(p - 1, 3 * v * m)),
    ("zbv_zero_bubble", lambda p, v, m: 0), ("dualpipev", lambda p, v, m: Fraction(p - 1, 3 * m)),
])  # fmt: skip
def test_the_papers_numbers_for_equal_costs(schedule: str, published: Any) -> None:
    for p, v, m in sizes(schedule):
        timeline = simulate(order(schedule, p, v, m))
        assert timeline.inside / timeline.ideal == published(p, v, m), (p, v, m)


def test_zbv_is_idle_inside_for_unequal_costs_and_with_few_microbatches() -> None:
    for p, v, m in sizes("zbv_zero_bubble"):
        for cost in COSTS:
            inside = (p - 1) * (cost.backward_input - cost.backward_weight)
            assert simulate(order("zbv_zero_bubble", p, v, m), cost).inside == inside
    few = simulate(order("zbv_zero_bubble", 4, 2, 4))
    assert expected("zbv_zero_bubble", 4, 2, 4) is None and (few.bubble, few.inside) == (3, 3)  # 3 / 2 and 0 from m = 7 on


def test_what_dualpipev_loses_by_sending_after_a_pair() -> None:
    """A forward pass of 1 / v for every rank but one, where F = B: sent at once, the bubble is interleaved_zero_bubble's."""
    for p, v, m in sizes("dualpipev"):
        for f, b, w in (EVEN, Cost(2, 2, 1), Cost(4, 4, 3)):
            at_once = [[x for a in actions if a.kind in "FBIW" for x in (a, a._replace(kind=f"SEND_{a.kind.replace('I', 'B')}"))]
                       for actions in order("dualpipev", p, v, m)]  # fmt: skip
            assert simulate(at_once, Cost(f, b, w)).bubble == Fraction((p - 1) * (f + b - w), 2)
            assert expected("dualpipev", p, v, m, Cost(f, b, w)) == (Fraction((p - 1) * (2 * f + b - w), 2),) * 2


@pytest.mark.parametrize("schedule", FORMULAS)
def test_activations_are_the_formulas(schedule: str) -> None:
    for p, v, m in sizes(schedule):
        for rank, actions in enumerate(order(schedule, p, v, m)):
            assert activations(actions) == FORMULAS[schedule].activations(p, v, m, rank), (p, v, m, rank)


@pytest.mark.parametrize("schedule", FORMULAS)
def test_each_pass_once_and_in_the_order_that_torch_shows(schedule: str) -> None:
    p, v, m = sizes(schedule)[-1]
    facts: Any = registry.get("pipeline", schedule)
    kind = getattr(schedules, facts.torch_name)
    stages = [bubble._Stage(s, p * v, 0, p, []) for s in owned_stages(facts, p, v, 0)]
    shown = kind(stages[0] if v == 1 and kind.__base__ is schedules.PipelineScheduleSingle else stages, m).pipeline_order
    for rank, actions in enumerate(order(schedule, p, v, m)):
        passes = Counter((s, i, half) for k, s, i in actions for half in {"F": "F", "B": "IW", "I": "I", "W": "W"}.get(k, ""))
        assert passes == Counter((s, i, x) for s in owned_stages(facts, p, v, rank) for i in range(m) for x in "FIW")
        mine = [(a.stage, a.kind, a.microbatch) for a in actions if a.kind in "FBIW"]
        torchs = [(s, str(k.value), i) for a in shown[rank] if a for s, k, i, _ in a.sub_actions or (a,) if k.value in "FBIW"]
        if (schedule, rank) != ("1f1b", p - 1):  # which torch 2.13 shows, but does not execute, as forward 1 to m
            assert mine == torchs


def real_calls(rank: Rank, schedule: str, v: int, m: int) -> list[Action]:
    """What this rank's real stages, of one small layer each, are asked to compute in a step."""
    facts: Any = registry.get("pipeline", schedule)
    calls: list[Action] = []

    class Written(PipelineStage):
        def forward_one_chunk(self, i: int, *args: Any, **kwargs: Any) -> Any:
            calls.append(Action("F", self.stage_index, i))
            return super().forward_one_chunk(i, *args, **kwargs)

        def backward_one_chunk(self, i: int, *args: Any, full_backward: bool = True, **kwargs: Any) -> Any:
            calls.append(Action("B" if full_backward else "I", self.stage_index, i))
            return super().backward_one_chunk(i, *args, full_backward=full_backward, **kwargs)

        def backward_weight_one_chunk(self, i: int, *args: Any, **kwargs: Any) -> Any:
            calls.append(Action("W", self.stage_index, i))
            return super().backward_weight_one_chunk(i, *args, **kwargs)

    count, device = rank.world * v, torch.device("cpu")
    stages = [Written(torch.nn.Linear(2, 2), s, count, device) for s in owned_stages(facts, rank.world, v, rank.rank)]
    kind = getattr(schedules, facts.torch_name)
    runtime = kind(stages if v > 1 else stages[0], m, loss_fn=lambda out, target: (out - target).sum())
    batch = torch.ones(m, 2)
    target = {"target": batch} if any(stage.is_last for stage in stages) else {}
    runtime.step(*([batch] if any(stage.is_first for stage in stages) else []), **target)
    return calls


@pytest.mark.parametrize("schedule, v", [("1f1b", 1), ("zbv_zero_bubble", 2), ("dualpipev", 2)])
def test_real_stages_are_asked_for_the_same(schedule: str, v: int) -> None:
    wanted = [[a for a in actions if a.kind in "FBIW"] for actions in order(schedule, 2, v, 5)]
    assert run_ranks(2, real_calls, schedule, v, 5) == wanted


def test_1f1b_by_hand() -> None:
    timeline = simulate(order("1f1b", 2, 1, 2), Cost(1, 1, 1))
    text = [" ".join(f"{a.kind}{a.microbatch}@{start}" for start, _, a in spans) for spans in timeline.ranks]
    assert text == ["F0@0 F1@1 B0@4 B1@7", "F0@1 B0@2 F1@4 B1@5"]
    assert (timeline.total, timeline.bubble, timeline.inside) == (9, 3, 3)


def test_a_result_is_there_when_it_has_been_sent() -> None:
    first = [Action("F", 0, 0), Action("F", 0, 1), Action("SEND_F", 0, 0), Action("SEND_F", 0, 1)]
    second = [Action("F", 1, 0), Action("F", 1, 1)]
    assert [span.start for span in simulate([first, second]).ranks[1]] == [2, 3]
    with pytest.raises(AssertionError, match="every rank waits"):
        simulate([first[:2], second])


@pytest.mark.parametrize("layout", [("1f1b", 4, 1, 2), ("gpipe", 2, 2, 4), ("interleaved_1f1b", 2, 2, 5), ("dualpipev", 4, 2, 7)])
def test_what_torch_cannot_run_is_refused(layout: tuple[str, int, int, int]) -> None:
    with pytest.raises(UserError):
        bubble.order(*layout)


def test_picture(tmp_path: Path) -> None:
    drawn = picture.draw(tmp_path / "x.png", [("1f1b", 1), ("zbv_zero_bubble", 2)], pp=2, microbatches=3)
    assert drawn.read_bytes().startswith(b"\x89PNG")
