"""Ranks that are slow are named, once, and again when they are not."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from runs import config, ledger, run

from megatron_scratch.engine.ddp import DDPEngine
from megatron_scratch.engine.fsdp import FSDPEngine
from megatron_scratch.train.own_time import OwnTime
from megatron_scratch.train.straggler import IN_A_ROW, Change, Straggler
from megatron_scratch.util.env import Rank, node_name

ALIKE = [0, 0, 0, 0]


def changes(straggler: Straggler, rows: Sequence[Sequence[float]], work: Sequence[int] = ALIKE) -> list[list[Change]]:
    return [straggler.judge(row, work) for row in rows]


def test_named_after_three_in_a_row_once_and_again_when_over() -> None:
    slow, well = [1.0, 1.0, 2.0, 1.1], [1.0, 1.0, 1.4, 1.1]
    assert changes(Straggler(1.5), [slow] * 6 + [well] * 3 + [slow] * 3) == [
        [], [], [Change(2, 2.0, True)], [], [], [], [Change(2, 1.4, False)], [], [], [], [], [Change(2, 2.0, True)],
    ]  # fmt: skip


def test_two_in_a_row_are_no_three() -> None:
    slow, well = [2.0, 1.0, 1.0, 1.0], [1.0] * 4
    assert IN_A_ROW == 3 and not any(changes(Straggler(1.5), [slow, slow, well] * 4))


def test_the_threshold() -> None:
    assert not any(changes(Straggler(1.5), [[1.0, 1.0, 1.0, 1.5]] * 5))
    assert any(changes(Straggler(1.5), [[1.0, 1.0, 1.0, 1.51]] * 5))


def test_one_of_two_and_two_of_four() -> None:
    assert changes(Straggler(1.5), [[1.0, 1.6]] * 3, [0, 0])[2] == [Change(1, 1.6, True)], "their mean would be 1.3"
    assert [c.rank for c in changes(Straggler(1.5), [[1.0, 3.0, 3.0, 1.0]] * 3)[2]] == [1, 2]


def test_stages_are_compared_with_their_like() -> None:
    """The last stage has the head, and takes twice as long on every rank."""
    assert not any(changes(Straggler(1.5), [[1.0, 1.0, 2.0, 2.0]] * 3, [0, 0, 1, 1]))
    assert changes(Straggler(1.5), [[1.0, 1.0, 2.0, 4.0]] * 3, [0, 0, 1, 1])[2] == [Change(3, 2.0, True)]


def test_only_forward_passes_of_training_are_timed() -> None:
    own = OwnTime(torch.device("cpu"), clock=iter([0.0, 2.0, 10.0, 14.0]).__next__)
    forward = own.around(lambda x: x + 1)
    forward(torch.zeros(()))
    with torch.no_grad():
        forward(torch.zeros(()))
    forward(torch.zeros(()))
    assert own.mean() == 3.0 and own.mean() == 0.0


def slow(on: int, passes: range) -> object:
    """Passes of one rank take 4 seconds of a clock on which others take 1; a pass is counted on every rank alike."""

    def arm(rank: Rank) -> None:
        whole = OwnTime.around

        def around(self: OwnTime, call: object) -> object:
            ticks = itertools.count()
            seconds = [0.0]

            def clock() -> float:
                number, ends = divmod(next(ticks), 2)
                seconds[0] += ends * (4.0 if rank.rank == on and number in passes else 1.0)
                return seconds[0]

            self.clock = clock
            return whole(self, call)  # type: ignore[arg-type]

        OwnTime.around = around  # type: ignore[assignment, method-assign]

    return arm


@pytest.mark.parametrize("words", [[], ["parallel.pp=2"], ["engine=hsdp", "engine.replicas=2"]], ids=str)
def test_a_run_names_them(words: list[str], corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    world = 4
    cfg = config(corpus, tmp_path, "train.steps=16", "train.micro_batch_size=1", "train.log_every=2", *words, world=world)
    per_step = 8 // (2 if words and words[0] == "parallel.pp=2" else world)
    arm = slow(1, range(4 * per_step, 12 * per_step))  # steps 5 to 12: the intervals that end with 6, 8, 10, 12
    assert run(cfg, world, arm=arm) == [0] * world  # type: ignore[arg-type]
    found = [(e["step"], e["rank"], e["host"], e["ratio"], e["slow"]) for e in ledger(tmp_path, "straggler")]
    assert found == [(10, 1, node_name(), 4.0, True), (14, 1, node_name(), 1.0, False)]
    lines = [line for line in capfd.readouterr().out.splitlines() if "straggler" in line or "is slow" in line]
    assert (
        lines[0] == f"step 10: rank 1 on {node_name()} is slow: its forward pass takes 4.00 x the median's time" and len(lines) == 2
    )


def test_it_can_be_turned_off_and_is_off_where_it_cannot_tell(corpus: Path, tmp_path: Path) -> None:
    for name, words in (("off", ["fault.straggler=0"]), ("fsdp", ["engine=fsdp"])):
        cfg = config(corpus, tmp_path / name, "train.steps=8", *words, world=2)
        assert run(cfg, 2, arm=slow(1, range(0, 100))) == [0, 0]  # type: ignore[arg-type]
        assert not ledger(tmp_path / name, "straggler")


def test_what_is_timed_is_what_engines_call(corpus: Path, tmp_path: Path) -> None:
    """A forward pass that really is slow, by the real clock: on rank 1 it is done ten times."""

    def arm(rank: Rank) -> None:
        if rank.rank == 1:
            for engine in (DDPEngine, FSDPEngine):
                whole = engine.forward
                engine.forward = lambda self, *args, whole=whole: [whole(self, *args) for _ in range(10)][-1]  # type: ignore[method-assign]

    cfg = config(corpus, tmp_path, "train.steps=8", "engine=hsdp", "engine.replicas=2", world=2)
    assert run(cfg, 2, arm=arm) == [0, 0]
    assert [(e["rank"], e["slow"]) for e in ledger(tmp_path, "straggler")] == [(1, True)]
