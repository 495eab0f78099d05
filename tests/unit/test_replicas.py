"""A checksum that no flipped bit escapes, and messages that name who and what."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import run_ranks

from megatron_scratch.parallel import SINGLE, Topology
from megatron_scratch.train import replicas
from megatron_scratch.train.replicas import check_replicas, checksum, describe
from megatron_scratch.util.errors import RunFailed


def flips(tensor: torch.Tensor, sum_of: Callable[[torch.Tensor], Any]) -> tuple[int, int]:
    """(bits, of these seen) of every single flip of a tensor."""
    before, content = int(sum_of(tensor)), tensor.view(-1).view(torch.uint8)
    seen = 0
    for at in range(content.numel()):
        for bit in range(8):
            content[at] ^= 1 << bit
            seen += int(sum_of(tensor)) != before
            content[at] ^= 1 << bit
    assert int(sum_of(tensor)) == before
    return 8 * content.numel(), seen


def tensor(dtype: torch.dtype, count: int) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(count)).mul(100).to(dtype)


DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8]


@pytest.mark.parametrize("count", [1, 3, 7, 21])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_single_flip_is_seen(dtype: torch.dtype, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1 to 168 bytes, in pieces of 4 words: at the beginning, at seams, in the tail."""
    monkeypatch.setattr(replicas, "WORDS", 4)
    bits, seen = flips(tensor(dtype, count), checksum)
    assert seen == bits


def test_two_flips_of_the_same_bit_do_not_cancel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as two changed signs. In words of 64 bits every second one is the top bit, whose odd multiples are all alike."""
    monkeypatch.setattr(replicas, "WORDS", 3)
    numbers = tensor(torch.float32, 12)
    words, before = numbers.view(torch.int64), int(checksum(numbers))
    for bit in range(64):
        one = torch.tensor(1) << bit
        for i, j in itertools.combinations(range(words.numel()), 2):
            words[i] ^= one
            words[j] ^= one
            assert int(checksum(numbers)) != before, (bit, i, j)
            words[i] ^= one
            words[j] ^= one


def test_special_values_and_shapes() -> None:
    for value in (torch.zeros(5), torch.full((3, 3), -1.0), torch.tensor(7.0), torch.tensor([torch.nan, torch.inf, -0.0])):
        bits, seen = flips(value, checksum)
        assert seen == bits
    assert int(checksum(torch.zeros(0))) == 0
    assert int(checksum(torch.tensor([0.0]))) != int(checksum(torch.tensor([-0.0]))), "equal as numbers, not as bits"


def test_a_mutant_is_caught() -> None:
    """Even weights push high bits out of the word, the first word's all of them; a sum of numbers rounds low bits away."""

    def even(t: torch.Tensor) -> torch.Tensor:
        words = t.view(torch.int64)
        return (words * torch.arange(words.numel()) * 2).sum()

    def of_numbers(t: torch.Tensor) -> torch.Tensor:
        return t.sum().view(torch.int32)

    for wrong in (even, of_numbers):
        bits, seen = flips(tensor(torch.float32, 16), wrong)
        assert seen < bits


def test_it_does_not_depend_on_where_a_tensor_lies_or_how_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = tensor(torch.bfloat16, 101)
    want = int(checksum(flat))
    for offset in range(5):
        room = torch.zeros(120, dtype=torch.bfloat16)
        room[offset : offset + 101] = flat
        assert int(checksum(room[offset : offset + 101])) == want
    square = tensor(torch.float32, 36).view(6, 6)
    assert int(checksum(square.t().contiguous().t())) == int(checksum(square)), "by value, whatever the strides"
    assert int(checksum(square.t())) != int(checksum(square))
    monkeypatch.setattr(replicas, "WORDS", 3)
    assert int(checksum(flat)) == want


def test_who_is_named() -> None:
    def said(*sums: int) -> str:
        return describe({10 + rank: {"same": 1, "w": value} for rank, value in enumerate(sums)})

    assert said(5, 5, 6) == "w is not the same on all ranks that hold a copy: rank 12 differs from the other 2"
    assert "rank 10 differs from the other 3" in said(6, 5, 5, 5)
    assert "ranks 10, 13 differ from the other 3" in said(6, 5, 5, 7, 5)
    assert "ranks 10, 11 differ, and no majority" in said(5, 6)
    assert "ranks 10, 11, 12, 13 differ, and no majority" in said(5, 6, 5, 6)
    many = describe({0: {str(i): 0 for i in range(9)}, 1: {str(i): 1 for i in range(9)}})
    assert many.count("is not the same") == 3 and many.endswith("; and 6 more tensors")


def _engine(state: dict[str, torch.Tensor], copies: str) -> Any:
    return SimpleNamespace(copies=copies, state=lambda: state)


def _checked(topo: Topology, copies: str, broken: tuple[int, str] | None) -> str:
    """A state per (tp) place, copied over dp, with one bit flipped on one rank."""
    place = float(topo.index("tp"))
    state = {
        "model.a": torch.arange(1000.0) + place,
        "optim.a.step": torch.tensor(3.0),
        "grad.a": torch.full((3,), float(topo.rank)),
    }
    if broken is not None and topo.rank == broken[0]:
        state[broken[1]].view(-1).view(torch.uint8)[2] ^= 64
    try:
        check_replicas(_engine(state, copies), topo, 9)
    except RunFailed as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("world", "degrees", "broken", "words"), [
    (2, {}, (1, "model.a"), "step 9: model.a is not the same on all ranks that hold a copy: ranks 0, 1 differ"),
    (3, {}, (1, "optim.a.step"), "optim.a.step is not the same on all ranks that hold a copy: rank 1 differs from the other 2"),
    (4, {"tp": 2}, (3, "model.a"), "ranks 1, 3 differ, and no majority says which is right"),
    (4, {"tp": 2}, None, ""),
])  # fmt: skip
def test_all_ranks_hear_of_it(world: int, degrees: dict[str, int], broken: tuple[int, str] | None, words: str) -> None:
    """Also those whose own copies are in order: nobody goes on alone. Gradients are no state."""
    found = run_ranks(world, _checked, "dp", broken, degrees=degrees)
    assert len(set(found)) == 1 and (words in found[0] if words else not found[0]), found


def test_where_there_are_no_copies_nothing_is_compared() -> None:
    assert run_ranks(2, _checked, "", (1, "model.a")) == ["", ""]
    assert run_ranks(2, _checked, "replicate", (1, "model.a")) == ["", ""], "hsdp's axis, over one rank"
    check_replicas(_engine({"model.a": torch.ones(3)}, "dp"), SINGLE, 1)
