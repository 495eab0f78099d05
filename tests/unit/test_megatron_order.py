"""data.order=megatron: the arrays and the samples that megatron-core made once, and where it is installed makes now."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron_real import BLENDS, CASES, digest, documents, spread

from megatron_scratch.config.data import DataConfig, check_data, fill_samples, split_fraction
from megatron_scratch.data import megatron_order
from megatron_scratch.data.dataset import GPTDataset, Later
from megatron_scratch.data.indexed import IndexedDataset
from megatron_scratch.data.loader import Loader, open_data
from megatron_scratch.data.megatron_order import MegatronBlend, MegatronOrder, length
from megatron_scratch.data.writer import IndexedWriter
from megatron_scratch.util.errors import UserError

HERE = Path(__file__).resolve()
GOLDEN = json.loads((HERE.parent / "megatron_golden.json").read_text("utf-8"))
REAL = importlib.util.find_spec("megatron") and importlib.util.find_spec("megatron.core")


def write(prefix: Path, given: list[Any]) -> IndexedDataset:
    with IndexedWriter(prefix, "<i4") as writer:
        for tokens in given:
            writer.add_document(tokens)
    return IndexedDataset(prefix)


def dataset(prefix: Path, case: tuple[int, int, int, int, str | None]) -> GPTDataset:
    count, seq_len, samples, seed, split = case
    return GPTDataset(write(prefix, documents(count, count)), seq_len, seed, "megatron", None, samples, split)


def texts(data: Any, n: int) -> dict[str, str]:
    return {str(k): digest(data[k].tokens) for k in spread(n)}


@pytest.mark.parametrize("told", GOLDEN["orders"], ids=lambda told: "-".join(map(str, told["case"])))
def test_the_three_arrays_and_the_samples(tmp_path: Path, told: dict[str, Any]) -> None:
    data = dataset(tmp_path / "x", tuple(told["case"]))
    arrays = data.order.arrays
    for array, whole in zip(arrays, told.get("arrays", ()), strict=False):
        assert array.tolist() == whole  # the same as the digests say, but a failure shows where
    assert [digest(array) for array in arrays] == told["digests"]
    assert data.samples_per_epoch == told["samples"] and texts(data, told["samples"]) == told["texts"]


def test_the_cases_have_every_kind_of_last_epoch() -> None:
    kinds = set()
    for count, seq_len, samples, _, split in CASES:
        sizes = [len(d) for d in documents(count, count)]
        plan = length(sum(sizes[: round(split_fraction(split) * count)]), seq_len, samples)
        kinds.add((min(plan.epochs, 3), plan.apart))
    assert kinds == {(1, False), (2, False), (2, True), (3, False), (3, True)}
    assert [tuple(told["case"]) for told in GOLDEN["orders"]] == CASES  # the golden file is of these cases


@pytest.mark.parametrize("told", GOLDEN["blends"], ids=lambda told: "-".join(map(str, told["case"][1:])))
def test_blends(tmp_path: Path, told: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron_order, "BLOCK", 128)  # several blocks
    weights, samples, seed, split = told["case"]
    for i in range(len(weights)):
        write(tmp_path / f"part{i}", documents(20 + i, i))
    config = DataConfig(blend=[f"{tmp_path}/part{i}:{w!r}" for i, w in enumerate(weights)], order="megatron",
                        megatron_samples=samples, megatron_split=split)  # fmt: skip
    data = open_data(config, 8, seed).train
    assert isinstance(data, MegatronBlend) and data.size == told["size"]
    found = np.array([data.locate_part(k) for k in range(data.size)])
    assert digest(found[:, 0].astype(np.int16)) == told["parts"] and digest(found[:, 1]) == told["numbers"]
    assert texts(data, data.size) == told["texts"]
    with pytest.raises(UserError, match=f"asks for sample {data.size}"):
        data[data.size]


def test_the_golden_blends_are_these() -> None:
    assert [tuple(told["case"]) for told in GOLDEN["blends"]] == BLENDS


@pytest.mark.skipif(not REAL, reason="megatron-core is not importable: pip install --no-deps --target DIR megatron-core==0.16.1")
def test_megatron_itself_still_makes_the_golden_arrays() -> None:
    done = subprocess.run([sys.executable, str(HERE.parents[1] / "megatron_real.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == GOLDEN


def test_a_sequence_is_a_document(tmp_path: Path) -> None:
    """Where sequences start is told, also of empty ones in between and at both ends of a window."""
    data = dataset(tmp_path / "x", (40, 16, 90, 1234, None))
    firsts = {int(d[0]) for d in documents(40, 40)}
    for k in range(100):
        sample = data[k]
        assert sample.valid == 17 and [t in firsts for t in sample.tokens.tolist()] == sample.starts.tolist()


def test_empty_documents_do_not_count(tmp_path: Path) -> None:
    """Megatron numbers sequences, and an empty document has none."""
    some = documents(10, 10)
    write(tmp_path / "x", [[], *some[:4], [], [], *some[4:], []])
    given = GPTDataset(IndexedDataset(tmp_path / "x"), 9, 1234, "megatron", None, 5)
    assert digest(given.order.arrays[0]) == GOLDEN["orders"][0]["digests"][0] and given[3].tokens.tolist() == dataset(
        tmp_path / "y", (10, 9, 5, 1234, None))[3].tokens.tolist()  # fmt: skip


def test_sequences_of_no_tokens(tmp_path: Path) -> None:
    """Such files exist (a builder that was handed an empty tensor): a window walks over them, and one at its end is no start."""
    x = write(tmp_path / "x", [[0, 1], [2, 3, 4], [5, 6, 7, 8]])
    x.sizes, x.offsets = np.array([0, 2, 0, 3, 4, 0], np.int32), np.array([0, 0, 8, 8, 20, 36])
    x.num_sequences, x.document_indices = 6, np.arange(7)
    data = GPTDataset(x, 2, 0, "megatron", None, 4)
    read = np.concatenate([data.order.stream(0).window(2 * i, 3)[0][:2] for i in range(data.samples_per_epoch)])
    whole = np.concatenate([x.sequence(int(i)) for i in data.order.arrays[0]])
    assert read.tolist() == whole[: len(read)].tolist() and data.order.arrays[1][0].tolist() == [0, 0]


def test_where_a_sample_comes_from(tmp_path: Path) -> None:
    data = GPTDataset(write(tmp_path / "x", [*documents(20, 3), [], [1, 2, 3]]), 16, 7, "megatron", None, 60, None)
    for k in range(60):
        pieces = data.pieces(k)
        assert pieces is not None and all(a < b for _, a, b in pieces)
        assert np.concatenate([data.indexed.document(d)[a:b] for d, a, b in pieces]).tolist() == data[k].tokens.tolist()


def test_a_longer_run_keeps_its_past_only_within_the_same_epochs(tmp_path: Path) -> None:
    x = write(tmp_path / "x", documents(300, 300))
    runs = {n: GPTDataset(x, 32, 7, "megatron", None, n) for n in (50, 100, 400)}
    past = {n: [data[k].tokens.tolist() for k in range(50)] for n, data in runs.items()}
    assert past[50] == past[100] and runs[50].fingerprint() == runs[100].fingerprint()
    assert past[50] != past[400] and runs[50].fingerprint() != runs[400].fingerprint()
    parts = [GPTDataset(x, 32, 7, "megatron", None, 50, split).fingerprint() for split in (None, "9,1", "8,2")]
    assert len(set(parts)) == 3


def test_a_run_goes_on_at_the_sample_where_the_other_stopped(tmp_path: Path) -> None:
    write(tmp_path / "x", documents(40, 40))
    config = DataConfig(train=str(tmp_path / "x"), order="megatron", megatron_samples=60)
    whole = open_data(config, 16, 3)
    config.consumed = 24
    later = open_data(config, 16, 3)
    assert isinstance(later.train, Later) and later.fingerprint != whole.fingerprint
    here = [b.tokens_BS.tolist() for b in Loader(later.train, 4).microbatches(8, 12)]
    assert here == [b.tokens_BS.tolist() for b in Loader(whole.train, 4).microbatches(32, 12)]
    assert later.train.locate(3) == whole.train.locate(27)
    config.order, config.megatron_samples = "documents", None  # any order can be joined
    ours = GPTDataset(IndexedDataset(tmp_path / "x"), 16, 3)
    assert open_data(config, 16, 3).train[0].tokens.tolist() == ours[24].tokens.tolist()


def test_the_run_ends_where_the_arrays_end(tmp_path: Path) -> None:
    data = dataset(tmp_path / "x", (10, 9, 5, 1234, None))
    assert data[20].tokens.shape == (10,)
    with pytest.raises(UserError, match="has 21 samples in the order of data.megatron_samples.*asks for sample 21"):
        data[21]


@pytest.mark.parametrize("config,words", [
    (DataConfig(megatron_samples=5), "data.megatron_samples=5 is given and data.order=documents does not read it"),
    (DataConfig(megatron_split="9,1"), "data.megatron_split=9,1 is given and data.order=documents"),
    (DataConfig(consumed=-1), "data.consumed=-1 must be at least 0"),
    (DataConfig(order="megatron", megatron_samples=5, consumed=5), "below data.megatron_samples=5"),
    (DataConfig(order="megatron", megatron_samples=0), "below data.megatron_samples=0"),
    (DataConfig(order="megatron", megatron_split="a,b"), "allowed: up to three numbers, the first above 0"),
    (DataConfig(order="megatron", megatron_split="0,1"), "allowed: up to three numbers, the first above 0"),
    (DataConfig(order="megatron", megatron_split="1,1,1,1"), "allowed: up to three numbers"),
    (DataConfig(order="megatron", megatron_split="1,nan"), "allowed: up to three numbers"),
])  # fmt: skip
def test_mistakes_are_refused(config: DataConfig, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        check_data(config)
    assert "\n" not in str(error.value)


def test_samples_from_the_length_of_the_run() -> None:
    config = DataConfig(order="megatron", consumed=100)
    fill_samples(config, 400)
    assert config.megatron_samples == 500
    config.megatron_samples = 9000  # Megatron's run was to be longer than what is left of it here
    fill_samples(config, 400)
    assert config.megatron_samples == 9000
    with pytest.raises(UserError, match="data.megatron_samples=9000 are fewer.*allowed: 9001 or more"):
        fill_samples(config, 8901)
    other = DataConfig()
    fill_samples(other, 400)
    assert other == DataConfig()


def test_what_the_order_needs(tmp_path: Path) -> None:
    x = write(tmp_path / "x", documents(10, 10))
    with pytest.raises(UserError, match="data.order=megatron depends on the length of the run; give data.megatron_samples=N"):
        open_data(DataConfig(train=str(tmp_path / "x"), order="megatron"), 16, 1)
    with pytest.raises(UserError, match="give data.megatron_samples=N"):
        open_data(DataConfig(blend=[f"{tmp_path}/x:1", f"{tmp_path}/x:2"], order="megatron"), 16, 1)
    with pytest.raises(UserError, match="leaves no token"):
        MegatronOrder(x, 1, 16, 5, "1,99")
    assert MegatronOrder(x, 1, 16, 5, "6,94").sequences == 1
