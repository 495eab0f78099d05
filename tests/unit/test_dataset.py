"""Sample k as a pure function: permutations, windows, epochs, blends, evaluation."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from megatron_scratch.data.dataset import Blend, EvalWindows, GPTDataset, feistel, mix, permutation
from megatron_scratch.data.indexed import IndexedDataset
from megatron_scratch.data.writer import IndexedWriter
from megatron_scratch.util.errors import UserError


def make(prefix: Path, lengths: list[int]) -> IndexedDataset:
    """Documents of these lengths; every token of the file has its own id."""
    with IndexedWriter(prefix, "<i4") as writer:
        at = 0
        for n in lengths:
            writer.add_document(list(range(at, at + n)))
            at += n
    return IndexedDataset(prefix)


LENGTHS = [5, 0, 13, 1, 40, 7, 0, 22, 9, 3]  # 100 tokens


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 65, 1000])
def test_feistel_is_a_bijection_that_depends_on_its_key(n: int) -> None:
    assert sorted(feistel(i, n, 42) for i in range(n)) == list(range(n))
    if n >= 64:
        a, b = ([feistel(i, n, key) for i in range(n)] for key in (1, 2))
        assert a != b and a != list(range(n)) and sum(i == x for i, x in enumerate(a)) < n / 8


def test_feistel_spreads() -> None:
    """Neighbours land far apart: the mean distance of a random permutation is n / 3."""
    out = np.array([feistel(i, 10_000, 7) for i in range(10_000)])
    assert abs(np.abs(np.diff(out)).mean() - 10_000 / 3) < 150


def test_permutations_never_change() -> None:
    """Golden values: a change here reshuffles every run in the world that goes on after an upgrade."""
    assert [feistel(i, 10, 1234) for i in range(10)] == GOLDEN_FEISTEL
    assert permutation(10, 1234).tolist() == GOLDEN_PERMUTATION
    assert mix(1) == 0x5692161D100B05E5  # splitmix64's finalizer


GOLDEN_FEISTEL = [1, 9, 5, 0, 3, 4, 7, 2, 8, 6]
GOLDEN_PERMUTATION = [0, 8, 4, 9, 5, 7, 6, 3, 2, 1]


def epoch_tokens(data: GPTDataset, epoch: int) -> np.ndarray:
    """The epoch's windows put back in the stream's order, overlaps removed."""
    n = data.samples_per_epoch
    by_window = {data.window_of(epoch * n + i)[1]: data[epoch * n + i].tokens for i in range(n)}
    assert sorted(by_window) == list(range(n))
    for i in range(n - 1):
        assert by_window[i][-1] == by_window[i + 1][0]  # one shared token: each token is predicted once
    return np.concatenate([by_window[i][:-1] for i in range(n)])


@pytest.mark.parametrize("order", ["documents", "contiguous"])
def test_an_epoch_reads_every_token_once(tmp_path: Path, order: str) -> None:
    data = GPTDataset(make(tmp_path / "x", LENGTHS), seq_len=9, seed=1, order=order)
    assert data.samples_per_epoch == 11  # (100 - 1) // 9
    first, second = epoch_tokens(data, 0), epoch_tokens(data, 1)
    assert len(set(first.tolist())) == 99 and len(set(second.tolist())) == 99
    if order == "contiguous":
        assert first.tolist() == list(range(99)) == second.tolist()
        assert [data.window_of(j)[1] for j in range(11)] != [data.window_of(j)[1] for j in range(11, 22)]
    else:
        assert first.tolist() != second.tolist()


def test_documents_stay_whole_in_document_order(tmp_path: Path) -> None:
    x = make(tmp_path / "x", LENGTHS)
    tokens = epoch_tokens(GPTDataset(x, 9, seed=3), 0)
    starts = np.cumsum([0, *LENGTHS])
    jumps = [b for a, b in zip(tokens[:-1], tokens[1:], strict=True) if b != a + 1]
    assert set(jumps) <= set(starts.tolist())


def test_earlier_samples_do_not_depend_on_later_reads(tmp_path: Path) -> None:
    x = make(tmp_path / "x", LENGTHS)
    forward = [GPTDataset(x, 9, 5)[j].tokens.tolist() for j in range(60)]  # a fresh dataset for each: no state
    one = GPTDataset(x, 9, 5)
    assert [one[j].tokens.tolist() for j in range(60)] == forward
    assert [one[j].tokens.tolist() for j in reversed(range(60))] == forward[::-1]
    assert [GPTDataset(x, 9, 6)[j].tokens.tolist() for j in range(60)] != forward


def test_starts_mark_the_first_tokens_of_documents(tmp_path: Path) -> None:
    x = make(tmp_path / "x", LENGTHS)
    firsts = {int(s) for s, n in zip(np.cumsum([0, *LENGTHS[:-1]]), LENGTHS, strict=True) if n}
    for order in ("documents", "contiguous"):
        data = GPTDataset(x, 9, 1, order)
        for j in range(22):
            sample = data[j]
            assert sample.tokens.dtype == np.int64 and sample.tokens.shape == (10,)
            assert [t in firsts for t in sample.tokens.tolist()] == sample.starts.tolist()


def test_sequences_of_a_document_stay_together_wherever_they_lie(tmp_path: Path) -> None:
    values = [*range(50, 80), *range(0, 50)]  # the file: sequence 2, then 0 and 1
    (tmp_path / "x.bin").write_bytes(struct.pack("<80i", *values))
    index = (b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, 3, 3) + struct.pack("<3i", 20, 30, 30)
             + struct.pack("<3q", 120, 200, 0) + struct.pack("<3q", 0, 2, 3))  # fmt: skip
    (tmp_path / "x.idx").write_bytes(index)
    x = IndexedDataset(tmp_path / "x")
    for seed in range(4):
        tokens = epoch_tokens(GPTDataset(x, 7, seed), 0).tolist()
        whole = [*range(50), *range(50, 80)] if tokens[0] == 0 else [*range(50, 80), *range(50)]
        assert tokens == whole[: len(tokens)]
    assert np.concatenate([s.tokens[:-1] for s in (EvalWindows(x, 7)[i] for i in range(11))]).tolist() == list(range(77))


def test_too_small_a_dataset_is_refused(tmp_path: Path) -> None:
    x = make(tmp_path / "x", [9])
    with pytest.raises(UserError, match="9 tokens, one sample of train.seq_len=9 needs 10"):
        GPTDataset(x, 9, 0)
    assert GPTDataset(x, 8, 0).samples_per_epoch == 1
    with pytest.raises(UserError, match="at least 2"):
        EvalWindows(make(tmp_path / "y", [1]), 8)


def test_a_file_that_changes_is_noticed_at_the_next_epoch(tmp_path: Path) -> None:
    data = GPTDataset(make(tmp_path / "x", LENGTHS), 9, 0)
    data[0]
    with open(tmp_path / "x.bin", "ab") as f:
        f.write(b"more")
    with pytest.raises(UserError, match="changed while in use"):
        data[11]


class Numbers:
    """A dataset whose sample j is j."""

    def __init__(self, name: str):
        self.name = name

    def __getitem__(self, j: int) -> int:
        return j

    def locate(self, j: int) -> tuple[str, int]:
        return self.name, j


@pytest.mark.parametrize("weights", [[1], [1, 1], [0.7, 0.2, 0.1], [5, 1, 1, 1, 0.01], [2.0**-i for i in range(12)], [1] * 20])
def test_blend_keeps_proportions_without_gaps(weights: list[float]) -> None:
    blend = Blend([Numbers(str(i)) for i in range(len(weights))], weights, seed=3)
    counts = np.zeros(len(weights), dtype=int)
    share = np.array(weights) / sum(weights)
    for k in range(3000):
        part, j = blend.locate_part(k)
        assert j == counts[part]  # 0, 1, 2, ... of each dataset
        counts[part] += 1
        assert np.abs(counts - (k + 1) * share).max() < 2.5
    assert blend.locate(0)[0] in {str(i) for i in range(len(weights))}


def test_blend_is_closed_form_far_out() -> None:
    blend = Blend([Numbers("a"), Numbers("b")], [0.75, 0.25], seed=0)
    part, j = blend.locate_part(10**12)
    assert abs(j - 10**12 * (0.75, 0.25)[part]) < 1 + 10**12 * 2**-32
    with pytest.raises(UserError, match="above 0"):
        Blend([Numbers("a")], [0.0], 0)


@pytest.mark.parametrize("lengths,seq_len", [(LENGTHS, 9), (LENGTHS, 99), (LENGTHS, 200), ([2], 5), ([10], 3)])
def test_evaluation_predicts_every_token_once(tmp_path: Path, lengths: list[int], seq_len: int) -> None:
    x = make(tmp_path / "x", lengths)
    windows = EvalWindows(x, seq_len)
    predicted = [t for i in range(len(windows)) for t in windows[i].tokens[1 : windows[i].valid].tolist()]
    assert predicted == list(range(1, sum(lengths)))
    assert windows[len(windows)].valid == 0 and windows[len(windows) + 5].tokens.tolist() == [0] * (seq_len + 1)


def test_evaluation_over_several_files(tmp_path: Path) -> None:
    windows = EvalWindows([make(tmp_path / "x", [10]), make(tmp_path / "y", [4, 4])], 4)
    samples = [windows[i] for i in range(len(windows))]
    assert [s.tokens[1 : s.valid].tolist() for s in samples] == [[1, 2, 3, 4], [5, 6, 7, 8], [9], [1, 2, 3, 4], [5, 6, 7]]
    assert [windows.locate(i)[1] for i in range(5)] == [0, 1, 2, 0, 1]
    assert samples[3].starts.tolist() == [True, False, False, False, True]


def test_fingerprints(tmp_path: Path) -> None:
    x, y = make(tmp_path / "x", [30]), make(tmp_path / "y", [10, 20])
    prints = [GPTDataset(x, 5, 0).fingerprint(), GPTDataset(y, 5, 0).fingerprint(), GPTDataset(x, 5, 0, "contiguous").fingerprint(),
              Blend([GPTDataset(x, 5, 0), GPTDataset(y, 5, 0)], [1, 1], 0).fingerprint(),
              Blend([GPTDataset(x, 5, 0), GPTDataset(y, 5, 0)], [1, 2], 0).fingerprint()]  # fmt: skip
    assert len(set(prints)) == 5
    assert GPTDataset(x, 7, 3).fingerprint() == prints[0]  # neither length nor seed: those are the run's
