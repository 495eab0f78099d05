"""Batches: the same samples for every data-parallel size, one integer of state, masks from real document boundaries."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_scratch.config.data import DataConfig
from megatron_scratch.data.dataset import EvalWindows, GPTDataset
from megatron_scratch.data.indexed import IndexedDataset
from megatron_scratch.data.loader import IGNORED, Batch, Loader, document_columns, open_data
from megatron_scratch.data.tokenizer import ByteTokenizer
from megatron_scratch.data.writer import IndexedWriter
from megatron_scratch.util.errors import UserError

EOD = 256


def write(prefix: Path, documents: list[list[int]]) -> IndexedDataset:
    with IndexedWriter(prefix, "<u2") as writer:
        for ids in documents:
            writer.add_document(ids)
    return IndexedDataset(prefix)


def documents(count: int = 40) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [[*rng.integers(0, 250, size=rng.integers(0, 30)).tolist(), EOD] for _ in range(count)]


@pytest.fixture
def data(tmp_path: Path) -> GPTDataset:
    return GPTDataset(write(tmp_path / "x", documents()), seq_len=16, seed=7)


def folder(path: Path, tokenizer: ByteTokenizer | None = None, seed: int = 0, valid: bool = True) -> Path:
    """A prepared folder in small."""
    path.mkdir()
    tokenizer = tokenizer or ByteTokenizer()
    write(path / "train", documents(40 + seed))
    if valid:
        write(path / "valid", documents(3))
    tokenizer.save(path)
    size = (path / "train.bin").stat().st_size
    (path / "manifest.json").write_text(json.dumps({"format": 1, "tokenizer": {"sha256": tokenizer.sha256},
                                                    "files": {"train.bin": {"bytes": size, "sha256": f"sum {seed}"}}}))  # fmt: skip
    return path


def rows(batches: list[Batch]) -> list[list[int]]:
    return [row for batch in batches for row in batch.tokens_BS.tolist()]


@pytest.mark.parametrize("mask_documents", [False, True])
def test_the_same_microbatches_for_every_dp_size(data: GPTDataset, mask_documents: bool) -> None:
    def step(dp: int, first: int) -> dict[int, Batch]:
        loaders = [Loader(data, 2, rank, dp, mask_documents=mask_documents) for rank in range(dp)]
        return {batch.first_sample: batch for loader in loaders for batch in loader.microbatches(first, 8)}

    for first in (0, 8, 104):  # 104 crosses epochs
        one = step(1, first)
        assert sorted(one) == [first, first + 2, first + 4, first + 6]
        for dp in (2, 4):
            other = step(dp, first)
            assert sorted(other) == sorted(one)
            for k, batch in one.items():
                for name in ("tokens_BS", "labels_BS", "positions_BS", "documents_BS"):
                    assert np.array_equal(getattr(batch, name), getattr(other[k], name)), name


def test_microbatch_m_of_rank_r(data: GPTDataset) -> None:
    loader = Loader(data, 2, dp_rank=1, dp_size=3)
    assert [b.first_sample for b in loader.microbatches(100, 12)] == [102, 108]
    assert np.array_equal(loader.batch(102).tokens_BS[1], data[103].tokens[:-1])


def test_state_is_the_number_of_samples(data: GPTDataset) -> None:
    whole = rows([b for step in range(10) for b in Loader(data, 2).microbatches(step * 4, 4)])
    resumed = rows([b for step in range(6, 10) for b in Loader(data, 2).microbatches(step * 4, 4)])
    assert whole[24:] == resumed
    assert whole == rows(list(Loader(data, 4).microbatches(0, 40)))  # another batch size, the same samples


def test_labels_are_the_next_tokens(data: GPTDataset) -> None:
    batch = next(Loader(data, 8, mask_eod=False).microbatches(0, 8))
    assert batch.tokens_BS.shape == batch.labels_BS.shape == (8, 16)
    assert batch.tokens_BS.dtype == batch.labels_BS.dtype == np.int64
    assert np.array_equal(batch.labels_BS[:, :-1], batch.tokens_BS[:, 1:])
    assert batch.positions_BS is None and batch.documents_BS is None and batch.predicted == 128


def test_mask_eod_ignores_the_label_after_each_document_end(data: GPTDataset) -> None:
    masked = next(Loader(data, 8).microbatches(0, 8))
    ends = masked.tokens_BS == EOD  # every document ends in EOD here, and only there
    assert ends.sum() > 3
    assert np.array_equal(masked.labels_BS == IGNORED, ends)
    assert masked.predicted == 128 - ends.sum()


def test_boundaries_are_those_of_the_index_not_of_an_id(tmp_path: Path) -> None:
    data = GPTDataset(write(tmp_path / "x", [[EOD, 1, EOD, 2], [3, 4, 5, 6]]), 7, 0, "contiguous")
    batch = Loader(data, 1, mask_documents=True).batch(0)
    assert batch.tokens_BS.tolist() == [[EOD, 1, EOD, 2, 3, 4, 5]]
    assert batch.labels_BS.tolist() == [[1, EOD, 2, IGNORED, 4, 5, 6]]
    assert batch.positions_BS.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert batch.documents_BS.tolist() == [[0, 0, 0, 0, 1, 1, 1]]


def test_document_columns() -> None:
    positions, numbers = document_columns(np.array([[0, 0, 1, 0, 1, 1], [1, 0, 0, 0, 0, 1]], dtype=bool))
    assert positions.tolist() == [[0, 1, 0, 1, 0, 0], [0, 1, 2, 3, 4, 0]]
    assert numbers.tolist() == [[0, 0, 1, 1, 2, 3], [0, 0, 0, 0, 0, 1]]


@pytest.mark.parametrize("dp", [1, 2, 3])
def test_evaluation_batches_predict_every_token_once(tmp_path: Path, dp: int) -> None:
    x = write(tmp_path / "x", [[i] for i in range(50)])
    windows = EvalWindows(x, 4)
    batches = [b for first in range(0, len(windows), 2 * dp) for r in range(dp)
               for b in Loader(windows, 2, r, dp, mask_eod=False).microbatches(first, 2 * dp)]  # fmt: skip
    labels = np.concatenate([b.labels_BS.ravel() for b in sorted(batches, key=lambda b: b.first_sample)])
    assert labels[labels != IGNORED].tolist() == list(range(1, 50))


def test_ids_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    data = GPTDataset(write(tmp_path / "wiki", [[1, 2, 3, 4, 99]]), 4, 0)
    assert Loader(data, 1, vocab_size=100).batch(0).predicted == 4
    with pytest.raises(UserError, match=r"sample 0 of .*wiki has token id 99, the vocabulary has 99 ids"):
        Loader(data, 1, vocab_size=99).batch(0)


def test_batches_that_do_not_divide_are_refused(data: GPTDataset) -> None:
    with pytest.raises(UserError, match="train.global_batch_size=6.*multiples of 4"):
        list(Loader(data, 2, 0, 2).microbatches(0, 6))


def test_open_a_folder(tmp_path: Path) -> None:
    d = folder(tmp_path / "d")
    source = open_data(DataConfig(dir=str(d)), 16, 1)
    assert isinstance(source.train, GPTDataset) and source.vocab_size == 257 and source.tokenizer.eod_id == 256
    assert len(source.valid) > 0
    assert open_data(DataConfig(train=str(d / "train")), 16, 1).vocab_size == 257  # a prefix in a prepared folder knows it too
    moved = d.rename(tmp_path / "elsewhere")
    assert open_data(DataConfig(dir=str(moved)), 8, 2).fingerprint == source.fingerprint
    assert open_data(DataConfig(dir=str(folder(tmp_path / "e", seed=1))), 16, 1).fingerprint != source.fingerprint


def test_open_megatron_files_and_valid(tmp_path: Path) -> None:
    write(tmp_path / "my_text_document", documents())
    write(tmp_path / "held", documents(5))
    source = open_data(DataConfig(train=str(tmp_path / "my_text_document"), valid=str(tmp_path / "held")), 16, 1)
    assert source.vocab_size is None and source.tokenizer is None and len(source.valid) > 1
    path = ByteTokenizer().save(tmp_path)
    assert open_data(DataConfig(train=str(tmp_path / "my_text_document"), tokenizer=str(path)), 16, 1).vocab_size == 257
    only = open_data(DataConfig(valid=str(tmp_path / "held")), 16, 1, need_train=False)
    assert only.train is None and len(only.valid) == len(source.valid)


def test_open_a_blend(tmp_path: Path) -> None:
    a, b = folder(tmp_path / "a"), folder(tmp_path / "b", seed=2, valid=False)
    source = open_data(DataConfig(blend=[f"{a}:3", f"{b}:1"]), 16, 1)
    assert [source.train.locate(k)[0] for k in range(400)].count(str(a / "train")) == pytest.approx(300, abs=1)
    assert len(source.valid) == len(open_data(DataConfig(dir=str(a)), 16, 1).valid)
    assert source.fingerprint != open_data(DataConfig(blend=[f"{a}:2", f"{b}:1"]), 16, 1).fingerprint


class OtherBytes(ByteTokenizer):
    """A tokenizer that only its sha256 tells apart."""

    def __init__(self) -> None:
        super().__init__()
        self.sha256 = "0" * 64


def test_a_tokenizer_that_is_not_the_datasets_is_refused(tmp_path: Path) -> None:
    a, b = folder(tmp_path / "a"), folder(tmp_path / "b", OtherBytes())
    with pytest.raises(UserError, match="not the dataset's"):
        open_data(DataConfig(dir=str(b)), 16, 1)
    with pytest.raises(UserError, match="not the dataset's"):
        open_data(DataConfig(blend=[f"{a}:1", f"{b}:1"]), 16, 1)
    with pytest.raises(UserError, match="not the dataset's"):
        open_data(DataConfig(dir=str(a), valid=str(b)), 16, 1)


@pytest.mark.parametrize("config,words", [
    (DataConfig(), "no training data is named; .*megatron-scratch data prepare"),
    (DataConfig(dir="no/such"), "neither a dataset folder nor a prefix.*megatron-scratch data prepare"),
    (DataConfig(train="no/such"), "neither a dataset folder nor a prefix"),
    (DataConfig(dir="."), "has no train.idx: it is not a prepared dataset"),
])  # fmt: skip
def test_missing_data_says_how_to_make_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: DataConfig, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words) as error:
        open_data(config, 16, 1)
    assert "\n" not in str(error.value)


def test_damaged_manifest_and_swapped_file(tmp_path: Path) -> None:
    d = folder(tmp_path / "d")
    write(d / "train", documents(30))
    with pytest.raises(UserError, match="manifest.json says"):
        open_data(DataConfig(dir=str(d)), 16, 1)
    for content in ("{", "[]", '{"format": 2}'):
        (d / "manifest.json").write_text(content)
        with pytest.raises(UserError, match="is not a manifest of data prepare"):
            open_data(DataConfig(dir=str(d)), 16, 1)
