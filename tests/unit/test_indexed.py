"""The indexed dataset against bytes packed by hand, and against damaged files."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import numpy as np
import pytest

from megatron_scratch.data.indexed import IndexedDataset, best_dtype, check_token_ids
from megatron_scratch.data.writer import IndexedWriter
from megatron_scratch.util import files
from megatron_scratch.util.errors import UserError


def write(prefix: Path, documents: list[list[int]], dtype: str = "<u2") -> Path:
    with IndexedWriter(prefix, dtype) as writer:
        for ids in documents:
            writer.add_document(ids)
    return prefix


def index_bytes(code: int, sizes: list[int], offsets: list[int], documents: list[int]) -> bytes:
    n, d = len(sizes), len(documents)
    return (b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, n, d) + struct.pack(f"<{n}i", *sizes)
            + struct.pack(f"<{n}q", *offsets) + struct.pack(f"<{d}q", *documents))  # fmt: skip


@pytest.mark.parametrize("dtype,code,item", [("<u2", 8, "H"), ("<i4", 4, "i"), ("<u1", 1, "B"), ("<i8", 5, "q")])
def test_bytes_are_megatrons(tmp_path: Path, dtype: str, code: int, item: str) -> None:
    write(tmp_path / "x", [[1, 2, 3], [], [7], [9, 8]], dtype)  # the empty document: an entry, no sequence
    size = struct.calcsize(item)
    assert (tmp_path / "x.bin").read_bytes() == struct.pack(f"<6{item}", 1, 2, 3, 7, 9, 8)
    expected = index_bytes(code, [3, 1, 2], [0, 3 * size, 4 * size], [0, 1, 1, 2, 3])
    assert (tmp_path / "x.idx").read_bytes() == expected


def test_reads_hand_made_files_out_of_order_with_several_sequences_per_document(tmp_path: Path) -> None:
    tokens = list(range(100, 110))
    (tmp_path / "x.bin").write_bytes(struct.pack("<10H", *tokens))
    # sequence 0 lies last in the file; documents: sequences 0 and 1, none, sequence 2
    (tmp_path / "x.idx").write_bytes(index_bytes(8, [3, 2, 5], [14, 0, 4], [0, 2, 2, 3]))
    x = IndexedDataset(tmp_path / "x")
    assert [x.document(i).tolist() for i in range(3)] == [[107, 108, 109, 100, 101], [], [102, 103, 104, 105, 106]]
    assert (x.num_documents, x.num_sequences, x.num_tokens, x.contiguous) == (3, 3, 10, False)
    assert x.document_starts.tolist() == [0, 5, 5, 10]
    assert x.read(2, 3).tolist() == [102, 103, 104]  # as the file lies


def test_round_trip_and_empty_dataset(tmp_path: Path) -> None:
    documents = [[random.Random(i).randrange(60000) for _ in range(i % 7)] for i in range(50)]
    x = IndexedDataset(write(tmp_path / "x", documents))
    assert [x.document(i).tolist() for i in range(len(x))] == documents and x.contiguous
    empty = IndexedDataset(write(tmp_path / "e", []))
    assert (empty.num_documents, empty.num_sequences, empty.num_tokens) == (0, 0, 0)


def test_mode_column_of_multimodal_files_is_accepted(tmp_path: Path) -> None:
    write(tmp_path / "x", [[1, 2], [3]])
    with open(tmp_path / "x.idx", "ab") as f:
        f.write(b"\0\0")
    assert IndexedDataset(tmp_path / "x").document(1).tolist() == [3]


def test_items_are_copies_that_outlive_the_dataset(tmp_path: Path) -> None:
    x = IndexedDataset(write(tmp_path / "x", [[1, 2, 3], [4]]))
    a, b = x.document(0), x.read(1, 3)
    a[0] = b[0] = 99
    assert x.document(0).tolist() == [1, 2, 3]
    del x
    assert a.tolist() == [99, 2, 3] and b.tolist() == [99, 3, 4]


def test_pickles_by_its_path(tmp_path: Path) -> None:
    x = IndexedDataset(write(tmp_path / "x", [[1, 2, 3]]))
    kind, args = x.__reduce__()
    assert kind(*args).document(0).tolist() == [1, 2, 3]


def test_a_writer_that_raises_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), IndexedWriter(tmp_path / "x", "<u2") as writer:
        writer.add_document([1])
        raise ZeroDivisionError
    with pytest.raises(UserError, match="do not fit"), IndexedWriter(tmp_path / "x", "<u2") as writer:
        writer.add_document([65536])
    with pytest.raises(UserError, match="do not fit"), IndexedWriter(tmp_path / "x", "<u2") as writer:
        writer.add_document([-1])
    with pytest.raises(UserError, match="whole numbers"), IndexedWriter(tmp_path / "x", "<u2") as writer:
        writer.add_document([1.5])
    assert list(tmp_path.iterdir()) == []


def test_a_failed_rewrite_keeps_the_old_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "x", [[1, 2, 3]])
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(self: IndexedWriter) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(IndexedWriter, "_write_index", full)
    with pytest.raises(OSError, match="no space"):
        write(tmp_path / "x", [[9]])
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_new_bin_never_meets_an_old_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the two renames of a rewrite: no index, so nothing that opens."""
    write(tmp_path / "x", [[1, 2, 3]])
    rename = files.os.replace

    def dies(a: Path, b: Path) -> None:
        if b.suffix == ".idx":
            raise KeyboardInterrupt
        rename(a, b)

    monkeypatch.setattr(files.os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "x", [[9, 9, 9]])
    assert [p.name for p in tmp_path.iterdir()] == ["x.bin"]


def test_truncated_and_foreign_files_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "x", [[1, 2, 3], [4, 5]])
    data, index = (tmp_path / "x.bin").read_bytes(), (tmp_path / "x.idx").read_bytes()
    for damaged, words in ((data[:-1], "truncated: 9 bytes, its index expects 10"), (data + b"\0\0", "too long: 12 bytes")):
        (tmp_path / "x.bin").write_bytes(damaged)
        with pytest.raises(UserError, match=words):
            IndexedDataset(tmp_path / "x")
    (tmp_path / "x.bin").write_bytes(data)
    for damaged, words in ((index[:-1], "truncated or damaged"), (b"", "not a Megatron index"),
                           (b"PK" + index[2:], "not a Megatron index"),
                           (index[:9] + b"\2" + index[10:], "version 2; allowed: 1"),
                           (index[:26] + bytes(8) + index[34:58], "truncated or damaged"),  # no document entry at all
                           (index[:17] + b"\6" + index[18:], "dtype code 6"), (index[:30], "not a Megatron")):  # fmt: skip
        (tmp_path / "x.idx").write_bytes(damaged)
        with pytest.raises(UserError, match=words):
            IndexedDataset(tmp_path / "x")
    with pytest.raises(UserError, match="nothing.bin does not exist"):
        IndexedDataset(tmp_path / "nothing")


def test_a_file_cut_while_open_is_an_error_not_a_crash(tmp_path: Path) -> None:
    x = IndexedDataset(write(tmp_path / "x", [list(range(5000))]))
    x.check_size()
    with open(tmp_path / "x.bin", "r+b") as f:
        f.truncate(100)
    with pytest.raises(UserError, match="truncated: 100 bytes"):
        x.document(0)
    with pytest.raises(UserError, match="changed while in use: 100 bytes, 10000 when opened"):
        x.check_size()


def test_300_mutated_indices_give_an_error_or_data(tmp_path: Path) -> None:
    documents = [[1, 2, 3], [], [4, 5], [6], [7, 8, 9, 10]]
    write(tmp_path / "x", documents)
    index, rng, refused = (tmp_path / "x.idx").read_bytes(), random.Random(0), 0
    for _ in range(300):
        bad = bytearray(index)
        for _ in range(rng.randint(1, 4)):
            bad[rng.randrange(len(bad))] = rng.choice([0, 1, 2, 127, 128, 255, rng.randrange(256)])
        if rng.random() < 0.2:
            bad = bad[: rng.randrange(len(bad))]
        (tmp_path / "x.idx").write_bytes(bad)
        try:
            x = IndexedDataset(tmp_path / "x")
            read = [x.document(i).tolist() for i in range(x.num_documents)]
            assert all(0 <= len(r) <= 20 for r in read) and x.document_starts[-1] == x.num_tokens
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 200


def test_fingerprint_sees_tokens_and_lengths(tmp_path: Path) -> None:
    a = IndexedDataset(write(tmp_path / "a", [[1, 2, 3], [4]])).fingerprint()
    assert a == IndexedDataset(write(tmp_path / "b", [[1, 2, 3], [4]])).fingerprint()
    assert a != IndexedDataset(write(tmp_path / "c", [[1, 2, 3], [5]])).fingerprint()
    assert a != IndexedDataset(write(tmp_path / "d", [[1, 2], [3, 4]])).fingerprint()


def test_dtype_rule_and_id_check() -> None:
    assert best_dtype(65_499) == np.dtype("<u2") and best_dtype(65_500) == np.dtype("<i4")
    check_token_ids(np.array([0, 9]), 10, "x")
    check_token_ids(np.array([], dtype=np.int64), 10, "x")
    with pytest.raises(UserError, match=r"wiki has token id 10, the vocabulary has 10 ids \(0 to 9\)"):
        check_token_ids(np.array([3, 10]), 10, "wiki")
    with pytest.raises(UserError, match="token id -1"):
        check_token_ids(np.array([-1]), 10, "wiki")
