"""Indexed datasets: ours read by megatron-core and its own read by us, token for token."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron_real import DOCUMENTS
from test_megatron_order import GOLDEN, HERE, REAL

from megatron_scratch.data.indexed import IndexedDataset
from megatron_scratch.data.writer import IndexedWriter

DTYPES = {name: np.int32 if name == "i32" else np.uint16 for name in DOCUMENTS}
FLAT = [name for name in DOCUMENTS if name != "joined"]  # what our writer writes: a sequence is a document


def golden(folder: Path, name: str) -> Path:
    """The files that IndexedDatasetBuilder wrote of DOCUMENTS[name]."""
    for suffix, told in GOLDEN["files"][name].items():
        (folder / f"{name}.{suffix}").write_bytes(base64.b64decode(told))
    return folder / name


def write(prefix: Path, given: list[Any], dtype: Any) -> Path:
    with IndexedWriter(prefix, dtype) as writer:
        for tokens in given:
            writer.add_document(np.asarray(tokens, dtype))
    return prefix


def joined(document: list[Any]) -> list[int]:
    return [t for part in document for t in (part if isinstance(part, list) else [part])]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_we_read_what_its_builder_wrote(tmp_path: Path, name: str) -> None:
    data = IndexedDataset(golden(tmp_path, name))
    assert [data.document(i).tolist() for i in range(len(data))] == [joined(d) for d in DOCUMENTS[name]]
    assert data.dtype == DTYPES[name] and data.contiguous
    assert data.num_tokens == sum(len(joined(d)) for d in DOCUMENTS[name])


@pytest.mark.parametrize("name", FLAT)
def test_we_write_the_same_bytes(tmp_path: Path, name: str) -> None:
    theirs, ours = golden(tmp_path, name), write(tmp_path / "ours", DOCUMENTS[name], DTYPES[name])
    for suffix in ("bin", "idx"):
        assert Path(f"{ours}.{suffix}").read_bytes() == Path(f"{theirs}.{suffix}").read_bytes()


def many(seed: int) -> list[list[int]]:
    """Documents of 0 to 400 tokens of any id below 65,500."""
    random = np.random.RandomState(seed)
    return [random.randint(0, 65500, random.randint(0, 400)).tolist() for _ in range(300)]


@pytest.mark.skipif(not REAL, reason="megatron-core is not importable: pip install --no-deps --target DIR megatron-core==0.16.1")
def test_megatron_reads_what_we_wrote(tmp_path: Path) -> None:
    given = {"u16": many(1), "i32": many(2), "empty": [[], [1], [], [2, 3], []]}
    prefixes = {name: str(write(tmp_path / name, texts, DTYPES[name])) for name, texts in given.items()}
    command = [sys.executable, str(HERE.parents[1] / "megatron_real.py"), "read", *prefixes.values()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    for name, texts in given.items():
        told, sequences = found[prefixes[name]], [x for x in texts if x]
        assert told["mmap=True"] == told["mmap=False"] == sequences
        assert told["documents"] == np.cumsum([0, *(bool(x) for x in texts)]).tolist()
        assert told["dtype"] == np.dtype(DTYPES[name]).name
