"""The guard: which steps are applied, by the plainest possible arithmetic; and that what it remembers is all that it needs."""

from __future__ import annotations

import json
import math
import random
import statistics

import pytest
import torch
from ranks import run_ranks
from refused import refused_in_one_line

from megatron_scratch.config import check, compose
from megatron_scratch.config.fault import FaultConfig
from megatron_scratch.config.precision import PrecisionConfig
from megatron_scratch.parallel import Topology
from megatron_scratch.train.guard import Guard
from megatron_scratch.train.scaler import LossScaler
from megatron_scratch.train.step import shared_numbers
from megatron_scratch.util.errors import RunFailed

NAN, INF = math.nan, math.inf


def losses(count: int, seed: int = 0) -> list[float]:
    """Falling, noisy, with a spike in about every tenth place."""
    rng = random.Random(seed)
    return [3 / (1 + i / 50) + rng.gauss(0, 0.01) + (2 if rng.random() < 0.1 else 0) for i in range(count)]


@pytest.mark.parametrize("spike", ["log", "skip", "rollback"])
def test_a_spike_is_above_mean_and_deviation_of_the_last_accepted_losses(spike: str) -> None:
    guard = Guard(FaultConfig(spike=spike, sigma=3.0, window=20, warmup=5, max_skips=50, max_rollbacks=50))
    accepted: list[float] = []
    seen = 0
    for loss in losses(300):
        last = accepted[-20:]
        want = len(last) >= 5 and loss > statistics.fmean(last) + 3.0 * statistics.stdev(last)
        verdict = guard.judge(loss, 1.0)
        assert verdict.event == ((spike if spike != "log" else "spike") if want else "")
        assert verdict.applied == (not want or spike == "log") and bool(verdict.reason) == want
        if verdict.applied:
            accepted.append(loss)
        seen += want
    assert seen > 10, "or nothing was tested"


def test_a_loss_far_below_is_no_spike() -> None:
    guard = Guard(FaultConfig(spike="skip", warmup=2, window=4))
    assert all(guard.judge(loss, 1.0).applied for loss in (5.0, 5.1, 4.9, 0.1))


def test_what_it_remembers_is_all_it_needs() -> None:
    """Through JSON and into another one, at every step: the same verdicts, reasons and state."""
    cfg = FaultConfig(nonfinite="skip", spike="skip", sigma=2.0, window=16, warmup=8, max_skips=6)
    whole, again = Guard(cfg), Guard(cfg)
    events = set()
    for i, loss in enumerate(losses(200, seed=1)):
        loss = NAN if i % 23 == 0 else loss
        fresh = Guard(cfg)
        fresh.load(json.loads(json.dumps(again.state(), allow_nan=False)))
        again = fresh
        verdict = whole.judge(loss, 1.0)
        assert again.judge(loss, 1.0) == verdict and again.state() == whole.state()
        events.add(verdict.event)
    assert events == {"", "skip"}


def test_a_checkpoint_without_a_guard_begins_a_new_one() -> None:
    guard = Guard(FaultConfig())
    guard.judge(1.0, 1.0)
    guard.load({})
    assert guard.state() == Guard(FaultConfig()).state()


@pytest.mark.parametrize(("loss", "norm"), [(NAN, 1.0), (1.0, NAN), (INF, 1.0), (1.0, INF), (-INF, NAN)])
def test_numbers_that_are_not_finite(loss: float, norm: float) -> None:
    stop, skip = Guard(FaultConfig()), Guard(FaultConfig(nonfinite="skip"))
    verdict = stop.judge(loss, norm)
    assert verdict.event == "stop" and not verdict.applied
    with pytest.raises(RunFailed, match=r"step 7: loss .*, gradient norm .*: not finite; .*nothing of it was applied"):
        stop.refuse_to_go_on(7)
    assert skip.judge(loss, norm).event == "skip"
    skip.refuse_to_go_on(7)
    assert skip.losses == [] and skip.skips == 1, "what is not finite is never in the window"


def test_skips_in_a_row_end_a_run() -> None:
    guard = Guard(FaultConfig(nonfinite="skip", max_skips=2))
    found = [guard.judge(loss, 1.0).event for loss in (1.0, NAN, NAN, 1.0, NAN, NAN, NAN)]
    assert found == ["", "skip", "skip", "", "skip", "skip", "stop"]
    with pytest.raises(RunFailed, match="step 7: .*after fault.max_skips=2 skipped steps in a row"):
        guard.refuse_to_go_on(7)


def test_rollbacks_end_a_run() -> None:
    guard = Guard(FaultConfig(spike="rollback", max_rollbacks=2, warmup=2, window=4))
    found = [guard.judge(loss, 1.0).event for loss in (1.0, 1.1, 9.0, 1.0, 9.0, 1.0, 9.0)]
    assert found == ["", "", "rollback", "", "rollback", "", "stop"]
    with pytest.raises(RunFailed, match="after fault.max_rollbacks=2 rollbacks"):
        guard.refuse_to_go_on(7)


def test_the_loss_scaler_comes_first_and_its_skips_are_no_others() -> None:
    """An overflow under a scale says nothing of the run: it neither counts as a skip nor ends a row of them."""
    guard = Guard(FaultConfig(nonfinite="skip", max_skips=2), LossScaler(PrecisionConfig("fp16", scale=8.0)))
    assert guard.judge(NAN, NAN).reason == "gradients overflowed under the loss scale 8, it is 4 now" and guard.scale == 4.0
    assert guard.skips == 0 and guard.losses == []
    assert guard.judge(NAN, 1.0).reason.startswith("loss nan") and guard.scale == 4.0, "no gradient has overflowed"
    guard.judge(1.0, INF)
    assert guard.skips == 1
    other = Guard(guard.cfg, LossScaler(PrecisionConfig("fp16")))
    other.load(guard.state())
    assert other.scale == 2.0 and other.state() == guard.state()
    assert Guard(guard.cfg).scale is None and "scaler" not in Guard(guard.cfg).state()


CASES = [((1.0, 2.0), (5.0, 5.0), (3.0, 5.0)), ((1.0, NAN), (5.0, 5.0), (NAN, 5.0)), ((1.0, 2.0), (5.0, INF), (3.0, NAN)),
         ((1.0, 2.0), (NAN, 5.0), (3.0, NAN)), ((INF, 2.0), (5.0, 5.0), (INF, 5.0)),
         ((1.0, 0.0), (5.0, 5.5), (1.0, 5.0))]  # fmt: skip


def _shared(topo: Topology) -> list[list[float]]:
    found = []
    for parts, norms, _ in CASES:
        found.append(list(shared_numbers(torch.tensor(parts[topo.rank]), torch.tensor(norms[topo.rank]), topo)))
    return found


def test_every_rank_has_the_same_numbers() -> None:
    """One rank's NaN is everybody's, in its loss or in its norm; and where norms differ (as they never should) the main rank's
    counts, so that all still do the same."""
    for found in run_ranks(2, _shared):
        for got, (_, _, want) in zip(found, CASES, strict=True):
            assert got == pytest.approx(list(want), nan_ok=True)


def test_sums_of_losses_are_exact() -> None:
    """So the order in which ranks are added, which depends on the size of the message, cannot matter."""
    rng = random.Random(0)
    parts = torch.tensor([rng.uniform(2**-20, 1.0) for _ in range(1024)]).double()  # fp32 numbers
    sums = {float(parts[torch.randperm(1024, generator=torch.Generator().manual_seed(i))].cumsum(0)[-1]) for i in range(20)}
    assert sums == {math.fsum(parts.tolist())}


REFUSED = [
    (1, ["fault.nonfinite=ignore"], ["fault.nonfinite='ignore'", "allowed: stop, skip"]),
    (1, ["fault.spike=skipp"], ["allowed: log, skip, rollback", "did you mean 'skip'"]),
    (1, ["fault.sigma=0"], ["fault.sigma=0.0", "above 0"]),
    (1, ["fault.sigma=inf"], ["fault.sigma=inf", "finite"]),
    (1, ["fault.warmup=1"], ["fault.warmup=1", "between 2"]),
    (1, ["fault.window=16"], ["fault.warmup=32", "fault.window=16"]),
    (1, ["fault.max_skips=0", "fault.spike=skip"], ["fault.max_skips=0", "at least 1"]),
    (1, ["fault.max_rollbacks=0"], ["fault.max_rollbacks=0", "at least 1"]),
    (1, ["fault.replica_check_every=-1"], ["fault.replica_check_every=-1", "at least 0"]),
    (1, ["fault.max_skips=5"], ["fault.max_skips=5 has no effect", "fault.nonfinite=skip"]),
    (1, ["fault.max_rollbacks=5", "fault.spike=skip"], ["fault.max_rollbacks=5 has no effect with fault.spike=skip"]),
    (1, ["fault.spike=skip", "train.steps=32"], ["no effect in train.steps=32", "fault.warmup=32"]),
    (1, ["fault.spike=rollback"], ["checkpoint.every=0", "give checkpoint.every=N"]),
    (1, ["fault.replica_check_every=5"], ["fault.replica_check_every=5 has no effect", "on 1 data-parallel rank"]),
    (2, ["fault.replica_check_every=5", "parallel.tp=2"], ["on 1 data-parallel rank"]),
    (2, ["fault.replica_check_every=5", "engine=fsdp"], ["engine=fsdp", "cuts all that it keeps"]),
    (2, ["fault.replica_check_every=5", "engine=zero1"], ["engine=zero1"]),
]  # fmt: skip
SMALL = ["model.vocab_size=64", "train.micro_batch_size=1", "train.global_batch_size=8"]


@pytest.mark.parametrize(("world", "overrides", "words"), REFUSED, ids=[" ".join(row[1]) for row in REFUSED])
def test_refused(world: int, overrides: list[str], words: list[str]) -> None:
    refused_in_one_line(world, [*SMALL, *overrides], words)


@pytest.mark.parametrize(("world", "overrides"), [
    (1, []), (1, ["fault.nonfinite=skip", "fault.max_skips=5"]), (1, ["fault.spike=skip", "fault.max_skips=5"]),
    (1, ["fault.spike=rollback", "checkpoint.every=9", "fault.max_rollbacks=1"]), (2, ["fault.replica_check_every=5"]),
    (4, ["fault.replica_check_every=5", "engine=hsdp", "engine.replicas=2"]),
    (1, ["fault.sigma=4", "fault.warmup=2", "train.steps=9"]),
])  # fmt: skip
def test_allowed(world: int, overrides: list[str]) -> None:
    check(compose.load([*SMALL, *overrides]), world)
