"""A rank that does not answer is told of: by which signal it died, or where it stood when its time was over."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from megatron_scratch.train.forked import run_ranks
from megatron_scratch.util.env import Rank
from megatron_scratch.util.errors import RunFailed, UserError


def crash(rank: Rank) -> int:
    if rank.rank == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    return rank.rank


def hang(rank: Rank) -> None:
    threading.Event().wait()


def refuse(rank: Rank) -> None:
    raise UserError("model.num_layers=0 must be at least 1")


def test_a_crash_shows_its_signal_and_its_stack() -> None:
    with pytest.raises(RunFailed) as error:
        run_ranks(2, crash)
    text = str(error.value)
    assert "rank 1:\ndied of SIGSEGV" in text and "in crash" in text and "rank 0" not in text


def test_a_hang_shows_where_it_stood() -> None:
    with pytest.raises(RunFailed) as error:
        run_ranks(1, hang, timeout=1)
    assert "rank 0:\nended with 1 before it answered\nTimeout" in str(error.value) and "in hang" in str(error.value)


def test_bad_input_of_any_rank_is_bad_input() -> None:
    with pytest.raises(UserError, match="num_layers=0"):
        run_ranks(2, refuse)
