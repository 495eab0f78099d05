"""The bubble of a pipeline: torch's schedules on a simulated clock, and the formulas they are held against.

`order` is what torch's runtime executes, `simulate` gives every action a start and an end, `FORMULAS` say what comes out. A pass
of one microbatch through all of a rank's layers costs F, its backward B for the input and W for the weights; a rank has v stages
of 1 / v of that each; messages cost nothing. p ranks, m microbatches; an ideal step takes m (F + B + W), the rest is the bubble:

    schedule                 bubble of torch's order                    where                published
    gpipe                    (p - 1) (F + B + W)                        always               the same [1]
    1f1b                     (p - 1) (F + B + W)                        m >= p               the same [1]
    interleaved_1f1b         (p - 1) (F + B + W) / v                    m >= p               the same [1]
    interleaved_zero_bubble  (p - 1) max(F, B, F + B - W) / v           m >= p               (p - 1) (F + B - W), v = 1 (ZB-H1) [2]
    zbv_zero_bubble          (p - 1) max(B, 2 (B - W)) / 2              W <= F <= B,         0 for F = B = W [2]
                                                                        m >= 2 p - 1
    dualpipev                (p - 1) (F + B - W + [F to B]) / 2         W <= F <= B,         (p - 1) (F&B + B - 2 W) / 2, where
                             (exact where F = B)                        m >= 2 p             F&B is a pair's time [3]

ZB-V's 0 is the idle time between a rank's first action and its last: `Timeline.inside`, (p - 1) (B - W) here. Rank r begins r
forward passes late and ends as much later, which costs nothing where ranks go on into the next step without waiting for each
other. A gradient norm over all ranks makes them wait, so `Timeline.bubble` counts from the first action of any rank to the last.
DualPipeV's formula counts on pairs of a forward and a backward that hide each other's messages (F&B < F + B + W). torch runs the
two one after the other, and sends what they have made when both are done: F&B = F + B + W.

[1] Narayanan et al., arXiv 2104.04473.  [2] Qi et al., arXiv 2401.10241.  [3] DeepSeek-V3, arXiv 2412.19437, and DualPipe's page
(there B is B + W, and stages are counted, of which a rank has two).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from typing import Any, NamedTuple

from torch.distributed.pipelining import schedules

from megatron_scratch import registry
from megatron_scratch.config.pipeline import check_pipeline, owned_stages
from megatron_scratch.config.train import ParallelConfig


class Action(NamedTuple):
    """What a rank does, in torch's letters."""

    kind: str  # F forward, B backward, I its input part, W its weight part; SEND_F, SEND_B: a result leaves for another rank
    stage: int
    microbatch: int


class Cost(NamedTuple):
    """Of one microbatch in all of a rank's layers."""

    forward: int = 1
    backward_input: int = 1
    backward_weight: int = 1


EVEN = Cost()


class Span(NamedTuple):
    """An action on the clock."""

    start: Fraction
    end: Fraction
    action: Action


@dataclass(frozen=True)
class Timeline:
    """What each rank computes and when; idle times are by construction the same on every rank."""

    ranks: list[list[Span]]
    ideal: int  # the busy time of a rank

    @property
    def total(self) -> Fraction:
        return max(spans[-1].end for spans in self.ranks)

    @property
    def bubble(self) -> Fraction:
        """Idle time of a rank, from the first action of any to the last."""
        return self.total - self.ideal

    @property
    def inside(self) -> Fraction:
        """Idle time between a rank's own first action and its last, of the rank that has most of it."""
        return max(spans[-1].end - spans[0].start for spans in self.ranks) - self.ideal


class _Stage:
    """Stands in for a `PipelineStage`: writes down what the runtime asks of it, and sends nothing."""

    submod, has_backward = None, True

    def __init__(self, index: int, count: int, rank: int, pp: int, log: list[Action]) -> None:
        self.stage_index, self.num_stages, self.group_rank, self.group_size = index, count, rank, pp
        self.is_first, self.is_last, self.log = index == 0, index == count - 1, log

    def _did(self, kind: str, microbatch: int) -> list[Any]:
        self.log.append(Action(kind, self.stage_index, microbatch))
        return []

    def forward_one_chunk(self, microbatch: int, *_: Any, **__: Any) -> None:
        self._did("F", microbatch)

    def backward_one_chunk(self, microbatch: int, full_backward: bool = True, **_: Any) -> None:
        self._did("B" if full_backward else "I", microbatch)

    def backward_weight_one_chunk(self, microbatch: int, **_: Any) -> None:
        self._did("W", microbatch)

    def get_fwd_send_ops(self, microbatch: int) -> list[Any]:
        return [] if self.is_last else self._did("SEND_F", microbatch)

    def get_bwd_send_ops(self, microbatch: int) -> list[Any]:
        return [] if self.is_first else self._did("SEND_B", microbatch)

    def _nothing(self, *_: Any) -> list[Any]:
        return []

    get_fwd_recv_ops = get_bwd_recv_ops = set_local_fwd_input = set_local_bwd_input = _nothing
    get_local_bwd_output = perform_reduce_grad = _nothing


def order(schedule: str, pp: int, virtual_stages: int, microbatches: int) -> list[list[Action]]:
    """For each rank what torch's runtime executes, in order: the runtime is run, on stages that compute nothing.

    Not read from `pipeline_order`: that is what the runtime follows only in schedules of several stages a rank. Schedule1F1B
    never looks at its own, which numbers the last rank's forward passes from 1 (torch 2.13).
    """
    asked = ParallelConfig(pp=pp, schedule=schedule, virtual_stages=virtual_stages)
    check_pipeline(asked, pp * virtual_stages, {"microbatches": microbatches}, compiled=False)
    facts: Any = registry.get("pipeline", schedule)
    kind = getattr(schedules, facts.torch_name)
    logs = []
    for rank in range(pp):
        log: list[Action] = []
        owned = owned_stages(facts, pp, virtual_stages, rank)
        stages = [_Stage(stage, pp * virtual_stages, rank, pp, log) for stage in owned]
        runtime = kind(stages[0] if issubclass(kind, schedules.PipelineScheduleSingle) else stages, microbatches)
        runtime._initialize_pp_stages = lambda *_, **__: (False, False)  # it would exchange shapes with the other ranks
        runtime._step_microbatches()
        logs.append(log)
    return logs


def simulate(order: Sequence[Sequence[Action]], cost: Cost = EVEN) -> Timeline:
    """An action starts when its rank is free and its inputs are there, from another rank when that has sent them."""
    home = {action.stage: rank for rank, actions in enumerate(order) for action in actions}
    forward, b, w = (Fraction(x, len(home) // len(order)) for x in cost)
    duration = {"F": forward, "B": b + w, "I": b, "W": w}
    done: dict[Action, Fraction] = {}
    ranks: list[list[Span]] = [[] for _ in order]
    clocks, left = [Fraction(0)] * len(order), [list(reversed(actions)) for actions in order]

    def inputs(action: Action, rank: int) -> list[Action]:
        kind, stage, microbatch = action
        before, own = {"F": (stage - 1, []), "B": (stage + 1, ["F"]), "I": (stage + 1, ["F"]), "W": (None, ["B"])}[kind]
        result = "F" if kind == "F" else "B"
        there = [] if before not in home else [(result if home[before] == rank else f"SEND_{result}", before)]
        return [Action(k, s, microbatch) for k, s in [*there, *((k, stage) for k in own)]]

    while any(left):
        moved = False
        for rank, actions in enumerate(left):
            while actions:
                action = actions[-1]
                needed = inputs(action, rank) if action.kind in duration else []
                if not all(result in done for result in needed):
                    break
                start = max([clocks[rank], *(done[result] for result in needed)])
                clocks[rank] = start + duration.get(action.kind, 0)
                done[action._replace(kind="B") if action.kind == "I" else action] = clocks[rank]
                if action.kind in duration:
                    ranks[rank].append(Span(start, clocks[rank], action))
                moved = bool(actions.pop())
        assert moved, f"every rank waits for another: {[actions[-1:] for actions in left]}"
    return Timeline(ranks, len({action.microbatch for action in order[0]}) * sum(cost))


def activations(actions: Sequence[Action]) -> Fraction:
    """Most microbatches whose activations a rank holds at a time, from forward to the end of backward (of its weight part, where
    it is split); 1: one microbatch in all of the rank's layers. The order alone decides it, whatever things cost."""
    change = {"F": 1, "B": -1, "W": -1}
    most = max(accumulate(change.get(action.kind, 0) for action in actions))
    return Fraction(most, len({action.stage for action in actions}))


@dataclass(frozen=True)
class Formula:
    """Of one schedule. `bubble`: least and most of it, times v / (p - 1)."""

    text: str  # of the bubble for F = B = W, over the ideal time
    bubble: Callable[[int, int, int], tuple[int, int]]  # F, B, W
    enough: Callable[[int], int]  # fewest microbatches from which it holds, of p
    activations: Callable[[int, int, int, int], Fraction | int]  # p, v, m, rank
    ordered: bool = False  # holds where W <= F <= B


def _equal(x: int) -> tuple[int, int]:
    return x, x


def _round(p: int, m: int) -> int:
    """Microbatches that pass a stage before the rank turns to its next one."""
    return m // max(1, m // p)


FORMULAS = {
    "gpipe": Formula("(p-1)/m", lambda f, b, w: _equal(f + b + w), lambda p: 1, lambda p, v, m, r: m),
    "1f1b": Formula("(p-1)/m", lambda f, b, w: _equal(f + b + w), lambda p: p, lambda p, v, m, r: min(m, p - r)),
    "interleaved_1f1b": Formula(
        "(p-1)/(v m)", lambda f, b, w: _equal(f + b + w), lambda p: p,
        lambda p, v, m, r: min(m, Fraction((v - 1) * _round(p, m) + 2 * (p - r) - 1, v))),
    "interleaved_zero_bubble": Formula(
        "(p-1)/(3v m)", lambda f, b, w: _equal(max(f, b, f + b - w)), lambda p: p,
        lambda p, v, m, r: Fraction((v - 1) * _round(p, m) + p, v)),
    "zbv_zero_bubble": Formula(
        "(p-1)/(6m)", lambda f, b, w: _equal(max(b, 2 * (b - w))), lambda p: 2 * p - 1, lambda p, v, m, r: p, ordered=True),
    "dualpipev": Formula(
        "(p-1)/(3m)", lambda f, b, w: (2 * f + b - w, f + 2 * b - w), lambda p: 2 * p,
        lambda p, v, m, r: p + Fraction(1, 2), ordered=True),
}  # fmt: skip


def expected(schedule: str, pp: int, virtual_stages: int, microbatches: int, cost: Cost = EVEN) -> tuple[Fraction, Fraction] | None:
    """Least and most bubble by the formula; None where it does not hold."""
    formula, (f, b, w) = FORMULAS[schedule], cost
    if microbatches < formula.enough(pp) or formula.ordered and not w <= f <= b:
        return None
    least, most = (Fraction((pp - 1) * x, virtual_stages) for x in formula.bubble(f, b, w))
    return least, most
