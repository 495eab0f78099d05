"""What megatron-core itself makes of small datasets, as JSON. Run as a program; it never runs inside pytest.

    pip install --no-deps --target DIR megatron-core==0.16.1      (torch and numpy are there)
    PYTHONPATH=DIR python tests/megatron_real.py > tests/unit/megatron_golden.json
    PYTHONPATH=DIR python tests/megatron_real.py read PREFIX ...  what its IndexedDataset reads from these files

    orders   per case of CASES: samples, digests of the three arrays and of the tokens of some samples; small arrays whole
    blends   per case of BLENDS: size, digests of its two arrays and of the tokens of some samples
    files    name -> base64 of what IndexedDatasetBuilder wrote of DOCUMENTS[name]

Tests import its cases and compare with the golden file; where megatron-core is importable they also run it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

# (sequences, S, samples, seed, split): one epoch and many, the last apart and not (89 and 90 are at 0.8 of it), windows over
# several sequences and within one; the last two end where an epoch of 38 tokens does, and need one more
CASES: list[tuple[int, int, int, int, str | None]] = [
    (10, 9, 5, 1234, None), (10, 9, 11, 1234, None), (10, 9, 12, 1, None), (10, 9, 100, 7, None), (40, 16, 34, 1234, None),
    (40, 16, 60, 1234, None), (40, 16, 89, 1234, None), (40, 16, 90, 1234, None), (40, 16, 400, 99, None), (40, 1000, 3, 5, None),
    (40, 16, 30, 3, "969,30,1"), (40, 16, 70, 3, "0.5,0.5"), (300, 32, 900, 1234, "99,1,0"), (1, 4, 50, 2, None),
    (40, 2000, 2, 5, None), (1, 38, 1, 5, None), (1, 19, 2, 5, None),
]  # fmt: skip
# (weights, samples, seed, split)
BLENDS: list[tuple[list[float], int, int, str | None]] = [
    ([0.7, 0.2, 0.1], 500, 1234, None), ([1.0, 1.0], 301, 5, None), ([3.0, 1.0, 1.0, 0.05], 1000, 7, None),
    ([1.0, 1 / 3, 0.3333], 20000, 1, None), ([0.3, 0.7], 700, 3, "8,1,1"),
    ([1.0, 1.0], 3287, 2, None),  # the first dataset needs another epoch with a surplus above 0.5 %, the second with one of 0.5 %
]  # fmt: skip
DOCUMENTS = {
    "u16": [[1, 2, 3], [65499, 0], [7]],
    "i32": [[100000, 5], [2147483647], [0, 1, 2, 3]],
    "empty": [[5, 6], [], [8], []],  # an empty document is an entry without a sequence
    "joined": [[[1, 2], [3]], [[4]], [[5], [6, 7], [8]]],  # documents of several sequences
}


def documents(count: int, seed: int) -> list[np.ndarray]:
    """Sequences of 1 to 39 tokens; every token of a file has its own id. Shared with the tests."""
    sizes = np.random.RandomState(seed).randint(1, 40, count)
    ends = np.cumsum(sizes)
    return [np.arange(end - n, end, dtype=np.int32) for n, end in zip(sizes, ends, strict=True)]


def digest(array: np.ndarray) -> str:
    """Of type, shape and bytes, 16 hexadecimal digits."""
    told = f"{array.dtype.str} {array.shape} ".encode() + np.ascontiguousarray(array).tobytes()
    return hashlib.sha256(told).hexdigest()[:16]


def spread(n: int) -> list[int]:
    """Samples that are compared whole."""
    return sorted({0, n // 2, n - 1})


def _write(prefix: Path, given: list[Any], dtype: Any) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in given:
        nested = len(document) and isinstance(document[0], list)
        for sequence in document if nested else [document] if len(document) else []:
            builder.add_item(torch.from_numpy(np.asarray(sequence, dtype)))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


def _config(seed: int, seq_len: int, **more: Any) -> Any:
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    tokenizer = SimpleNamespace(vocab_size=None, eod=-2, pad=-1, unique_identifiers={}, special_tokens_dict={"eod": -2})
    return GPTDatasetConfig(random_seed=seed, sequence_length=seq_len, reset_position_ids=False, reset_attention_mask=False,
                            eod_mask_loss=False, create_attention_mask=False, tokenizer=tokenizer, **more)  # fmt: skip


def _built(config: Any, samples: int) -> Any:
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset

    others = 1 if config.blend and config.blend[1] else None  # samples of the other splits; a blend by weights wants a number
    return BlendedMegatronDatasetBuilder(GPTDataset, [samples, others, others], lambda: True, config).build()[0]


def order(folder: Path, case: tuple[int, int, int, int, str | None]) -> dict[str, Any]:
    count, seq_len, samples, seed, split = case
    prefix = folder / "x"
    _write(prefix, documents(count, count), np.int32)
    blend = {"blend": ([str(prefix)], None), "split": split} if split else {"blend_per_split": [([str(prefix)], None), None, None]}
    data = _built(_config(seed, seq_len, **blend), samples)
    arrays = (data.document_index, data.sample_index, data.shuffle_index)
    texts = {str(k): digest(data._query_document_sample_shuffle_indices(k)[0]) for k in spread(len(data))}
    small = [array.tolist() for array in arrays] if count <= 10 and len(data) < 40 else None
    told = {"case": case, "samples": len(data), "digests": [digest(array) for array in arrays], "texts": texts}
    return told | ({"arrays": small} if small else {})


def blend(folder: Path, case: tuple[list[float], int, int, str | None]) -> dict[str, Any]:
    weights, samples, seed, split = case
    prefixes = [str(folder / f"part{i}") for i in range(len(weights))]
    for i, prefix in enumerate(prefixes):
        _write(Path(prefix), documents(20 + i, i), np.int32)
    given = {"blend": (prefixes, weights), "split": split} if split else {"blend_per_split": [(prefixes, weights), None, None]}
    data = _built(_config(seed, 8, **given), samples)
    texts = {}
    for k in spread(len(data)):
        part, j = int(data.dataset_index[k]), int(data.dataset_sample_index[k])
        texts[str(k)] = digest(data.datasets[part]._query_document_sample_shuffle_indices(j)[0])
    return {"case": case, "size": len(data), "parts": digest(data.dataset_index), "numbers": digest(data.dataset_sample_index),
            "texts": texts}  # fmt: skip


def files(folder: Path) -> dict[str, Any]:
    told = {}
    for name, given in DOCUMENTS.items():
        _write(folder / name, given, np.int32 if name == "i32" else np.uint16)
        told[name] = {s: base64.b64encode((folder / f"{name}.{s}").read_bytes()).decode() for s in ("bin", "idx")}
    return told


def read(prefix: str) -> dict[str, Any]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    found = {}
    for mmap in (True, False):
        data = IndexedDataset(prefix, mmap=mmap)
        found[f"mmap={mmap}"] = [data[i].tolist() for i in range(len(data))]
    return {**found, "documents": data.document_indices.tolist(), "dtype": np.dtype(data.index.dtype).name}


def main(words: list[str]) -> dict[str, Any]:
    if words:
        return {prefix: read(prefix) for prefix in words[1:]}
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / str(i) for i in range(len(CASES) + len(BLENDS) + 1)]
        for folder in folders:
            folder.mkdir()
        return {"made_by": "megatron-core 0.16.1: PYTHONPATH=DIR python tests/megatron_real.py > tests/unit/megatron_golden.json",
                "orders": [order(f, case) for f, case in zip(folders, CASES, strict=False)],
                "blends": [blend(f, case) for f, case in zip(folders[len(CASES) :], BLENDS, strict=False)],
                "files": files(folders[-1])}  # fmt: skip


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        print(json.dumps(main(sys.argv[1:])))
