"""`train.canonical_reduction`: dp 1, 2 and 4 are one run, to the last bit; and each part of it that could be wrong is seen."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from refused import refused_in_one_line
from runs import config, ledger, rows, run

from megatron_scratch.checkpoint.manifest import tensor, verify
from megatron_scratch.config import compose
from megatron_scratch.config.shrink import shrink
from megatron_scratch.engine import canonical
from megatron_scratch.engine.canonical import PairwiseSum, leaf_size, sum_over_ranks, tree_sum
from megatron_scratch.parallel import Topology
from megatron_scratch.train import build, parity

MODE = ["train.canonical_reduction=true", "train.micro_batch_size=1", "model.dropout=0.1", "train.eval_every=5",
        "schedule=constant"]  # fmt: skip
STEPS = 10

# What a step's M microbatches are, and on how many ranks they go through: tp x dp.
CASES: dict[str, tuple[list[str], int]] = {
    "4": (["train.global_batch_size=4"], 1),  # dp 4: a microbatch a rank, nothing to add but over ranks
    "8": (["train.global_batch_size=8"], 1),
    "12": (["train.global_batch_size=12"], 1),  # 4 leaves of 3 in sequence
    "bf16 ramp": (["train.global_batch_size=12", "train.ramp={start: 4, increment: 4, samples: 40}", "precision=bf16"], 1),
    "tp 2": (["train.global_batch_size=4", "parallel.tp=2"], 2),  # dp 4: of two copies, sums of norms are the same in any order
}


def state(run_dir: Path, step: int) -> dict[str, bytes]:
    """Every tensor of a checkpoint: weights and optimizer state."""
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    return {name: tensor(folder, saved).tobytes() for name, saved in verify(folder).tensors.items()}


def evaluations(run_dir: Path) -> list[float]:
    return [row["val_loss"] for row in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines()) if "val_loss" in row]


def go(corpus: Path, path: Path, world: int, *overrides: str, steps: int = STEPS) -> Path:
    assert run(config(corpus, path, *MODE, *overrides, f"train.steps={steps}", world=world), world) == [0] * world
    return path


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A case at dp 1, never stopped."""
    done: dict[str, Path] = {}

    def at(case: str) -> Path:
        if case not in done:
            overrides, ranks = CASES[case]
            done[case] = go(corpus, tmp_path_factory.mktemp("whole") / "r", ranks, *overrides)
        return done[case]

    return at


def same(a: Path, b: Path, step: int = STEPS) -> bool:
    return rows(a) == rows(b) and state(a, step) == state(b, step) and evaluations(a) == evaluations(b)


@pytest.mark.parametrize(("case", "dp"), [(case, dp) for case in CASES for dp in ((4,) if case == "tp 2" else (2, 4))])
def test_any_dp_gives_the_same_bits(case: str, dp: int, corpus: Path, tmp_path: Path, whole: Callable[[str], Path]) -> None:
    overrides, ranks = CASES[case]
    go(corpus, tmp_path, ranks * dp, *overrides)
    assert rows(tmp_path) == rows(whole(case)), "loss and gradient norm of each step"
    assert any(norm > 1.0 for _, norm in rows(tmp_path).values()), "gradients were clipped"
    assert evaluations(tmp_path) == evaluations(whole(case)) and len(evaluations(tmp_path)) == 2
    assert state(tmp_path, STEPS) == state(whole(case), STEPS)


def test_stopped_and_gone_on_with_fewer_ranks(corpus: Path, tmp_path: Path, whole: Callable[[str], Path]) -> None:
    for world, steps in ((4, 4), (2, 7), (1, STEPS)):
        go(corpus, tmp_path, world, *CASES["12"][0], f"train.eval_every={0 if steps < STEPS else 5}", steps=steps)
    assert rows(tmp_path) == rows(whole("12")) and state(tmp_path, STEPS) == state(whole("12"), STEPS)
    assert evaluations(tmp_path)[-1] == evaluations(whole("12"))[-1]
    assert [event["guarantee"] for event in ledger(tmp_path, "resume")] == [
        f"bitwise: sums have one order at every dp (train.canonical_reduction): dp {a} -> {b}" for a, b in ((4, 2), (2, 1))
    ]


def test_without_the_mode_they_differ(corpus: Path, tmp_path: Path) -> None:
    """Or the tests above would show nothing."""
    for world in (1, 4):
        go(corpus, tmp_path / str(world), world, *CASES["8"][0], "train.canonical_reduction=false", steps=3)
    assert state(tmp_path / "1", 3) != state(tmp_path / "4", 3)


def six(corpus: Path, path: Path, world: int) -> Path:
    """Six steps of 16 microbatches."""
    return go(corpus, path, world, "train.global_batch_size=16", "train.eval_every=0", steps=6)


@pytest.fixture(scope="module")
def right(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return six(corpus, tmp_path_factory.mktemp("right"), 1)


def _far_first(x: torch.Tensor, topo: Topology, axis: str) -> torch.Tensor:
    for distance in (2, 1):
        if distance < topo.size(axis):
            x = x + canonical.swap(x, topo, axis, topo.index(axis) ^ distance)
    return x


def _dealt(self: Any, first: int, size: int) -> Iterator[Any]:
    for m in range(size // self.dp_size):
        yield self.batch(first + m * self.dp_size + self.dp_rank)


MUTANTS = {
    "ranks paired far first": ("megatron_scratch.engine.canonical.sum_over_ranks", _far_first, True),
    "microbatches dealt in turns": ("megatron_scratch.data.loader.Loader.microbatches", _dealt, True),
    "a rank adds in sequence": ("megatron_scratch.engine.canonical.leaf_size", lambda count: count, True),
    "losses added in sequence": ("megatron_scratch.train.passes.tree_sum", sum, False),
    "losses added by whoever comes": ("megatron_scratch.train.passes.sum_over_ranks", lambda x, topo, axis: x, False),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_seen(mutant: str, corpus: Path, tmp_path: Path, right: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, wrong, in_state = MUTANTS[mutant]
    monkeypatch.setattr(target, wrong)  # here, and so in the forked ranks
    six(corpus, tmp_path, 4)
    assert (state(tmp_path, 6) != state(right, 6)) == in_state
    assert in_state or rows(tmp_path) != rows(right)


def test_parity_with_the_plain_sum() -> None:
    """The order changes nothing but the last bits: against one process without the mode."""
    plain = compose.load(["model=llama_tiny", "model.dropout=0.1", "train.global_batch_size=24", "train.micro_batch_size=2"])
    small, _ = parity.comparable(shrink(plain, 4))
    small.train.global_batch_size = 24  # 12 microbatches
    truths = parity.reference(small, 2)
    small.train.canonical_reduction = True
    assert parity.passed(parity.compare(small, 4, 2, truths), parity.tolerance(small))


class Term(str):
    """A sum as it was written."""

    def __add__(self, other: str) -> Term:
        return Term(f"({str(self)}+{str(other)})")


def terms(count: int) -> list[Any]:
    return [Term(i) for i in range(count)]


def test_the_tree() -> None:
    assert tree_sum(terms(1)) == "0" and tree_sum(terms(3)) == "((0+1)+2)" and tree_sum(terms(4)) == "((0+1)+(2+3))"
    assert tree_sum(terms(6)) == "(((0+1)+2)+((3+4)+5))"
    for count in range(1, 49):
        for dp in (1, 2, 4, 8):
            if count % dp == 0:  # what each rank has is a subtree
                level = [tree_sum(terms(count)[r * count // dp : (r + 1) * count // dp]) for r in range(dp)]
                while len(level) > 1:
                    level = [a + b for a, b in zip(level[::2], level[1::2], strict=True)]
                assert level[0] == tree_sum(terms(count)), (count, dp)


@pytest.mark.parametrize("power", range(7))
def test_few_sums_wait(power: int) -> None:
    """log2 of the leaves: what docs/resuming.md promises of memory."""
    total, most = PairwiseSum[int](int.__add__), 0
    for i in range(2**power):
        most = max(most, len(total.parts))  # when a microbatch's gradient is made
        total.push(i)
    assert most == power and total.total() == sum(range(2**power))
    assert leaf_size(3 << power) == 3 and leaf_size(1 << power) == 1


def _messages(topo: Topology) -> tuple[list[tuple[int, int]], float]:
    sent, swap = [], canonical.swap

    def counted(x: torch.Tensor, topo: Topology, axis: str, other: int) -> torch.Tensor:
        sent.append((other, x.numel()))
        return swap(x, topo, axis, other)

    canonical.swap = counted
    return sent, float(sum_over_ranks(torch.full((5,), 10.0**topo.rank), topo, "dp")[0])


def test_messages_are_log2_of_dp() -> None:
    for rank, (sent, total) in enumerate(run_ranks(8, _messages)):
        assert sent == [(rank ^ 1, 5), (rank ^ 2, 5), (rank ^ 4, 5)] and total == 11111111


@pytest.mark.parametrize(("world", "change", "words"), [
    (2, "engine=fsdp", "engine=fsdp, which"), (2, "engine=zero1", "engine=zero1, which"), (2, "parallel.pp=2", "parallel.pp=2"),
    (3, "train.global_batch_size=48", "3 data-parallel ranks"),
    (6, "parallel.tp=2 train.global_batch_size=48", "nearest that are: 4, 8 processes"),
])  # fmt: skip
def test_what_cannot_have_one_order_is_refused(world: int, change: str, words: str) -> None:
    given = ["train.canonical_reduction=true", "train.micro_batch_size=1", *change.split()]
    refused_in_one_line(world, given, ["train.canonical_reduction=true", words])


def test_threads_do_not_follow_from_the_number_of_processes(corpus: Path, tmp_path: Path) -> None:
    for world in (1, 2, 4):
        cfg = config(corpus, tmp_path, *MODE, "train.threads=null", "train.global_batch_size=4", world=world)
        assert build.cpu_threads(cfg, world) == 1
        cfg.train.threads = 3
        assert build.cpu_threads(cfg, world) == 3
