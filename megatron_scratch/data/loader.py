"""From the `data` section to batches: open what it names, then deal the samples of a step to ranks and microbatches.

Sample numbers are all the state there is: `microbatches(first_sample, global_batch_size)` gives the same samples in the same
microbatches for every data-parallel size. Legend: B micro batch size, S sequence length.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_scratch import registry
from megatron_scratch.config.data import DataConfig, blend_parts
from megatron_scratch.data.dataset import Blend, EvalWindows, GPTDataset, Later, Sample
from megatron_scratch.data.indexed import IndexedDataset, check_token_ids, paths
from megatron_scratch.data.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from megatron_scratch.util.errors import UserError

IGNORED = -100  # a label that is not predicted: torch's ignore_index
MANIFEST = "manifest.json"
FORMATS = (1, 2)  # of the manifest: 2 has a sidecar beside each dataset
MAKE_ONE = "make one with: megatron-scratch data prepare corpus.input=TEXT corpus.output=DIR"


@dataclass(frozen=True)
class Batch:
    """One microbatch of one rank.

    tokens_BS, labels_BS i64 (labels IGNORED where nothing is predicted). With data.mask_documents also positions_BS i64, which
    restart at each document, and documents_BS i64, the number of the document in its row (attention stays inside a number).
    """

    tokens_BS: np.ndarray
    labels_BS: np.ndarray
    positions_BS: np.ndarray | None
    documents_BS: np.ndarray | None
    first_sample: int

    @property
    def predicted(self) -> int:
        """Labels that count in the loss."""
        return int((self.labels_BS != IGNORED).sum())


@dataclass(frozen=True)
class DataSource:
    """What the `data` section names. vocab_size is None where neither tokenizer nor manifest tells it."""

    train: GPTDataset | Blend | Later | None
    valid: EvalWindows | None
    tokenizer: Tokenizer | None
    vocab_size: int | None
    fingerprint: str  # of the training tokens, their order and blend: a resumed run must see the same one
    valid_sets: dict[str, EvalWindows] = field(default_factory=dict)  # data.valid_sets, by name

    @property
    def evaluated(self) -> dict[str, EvalWindows]:
        """All that a run is evaluated on: its validation set, if it has one, as "", then those with a name."""
        return ({} if self.valid is None else {"": self.valid}) | self.valid_sets


class Loader:
    """Deals samples [first, first + global batch) to microbatches: microbatch m of rank r is the B samples from
    first + (m dp_size + r) B. So a microbatch is the same set of samples at every dp_size, and state is one integer.

    Args:
        dataset: `GPTDataset`, `Blend` or `EvalWindows`: anything with `[k] -> Sample` and `locate(k)`.
        vocab_size: ids are checked against it in every batch; None: no check.
        contiguous: a rank's microbatches follow each other, from first + r n B for n of them, as `train.canonical_reduction` needs.
    """

    def __init__(self, dataset: Any, micro_batch_size: int, dp_rank: int = 0, dp_size: int = 1, *, mask_documents: bool = False,
                 mask_eod: bool = True, vocab_size: int | None = None, contiguous: bool = False):  # fmt: skip
        assert 0 <= dp_rank < dp_size and micro_batch_size > 0
        self.dataset, self.micro, self.dp_rank, self.dp_size = dataset, micro_batch_size, dp_rank, dp_size
        self.mask_documents, self.mask_eod, self.vocab_size = mask_documents, mask_eod, vocab_size
        self.contiguous = contiguous

    def microbatches(self, first_sample: int, global_batch_size: int) -> Iterator[Batch]:
        """This rank's microbatches of one step, in order. The next step begins at first_sample + global_batch_size."""
        unit = self.micro * self.dp_size
        if global_batch_size % unit:
            raise UserError(f"train.global_batch_size={global_batch_size} is not divisible by train.micro_batch_size={self.micro} "
                            f"x data-parallel size {self.dp_size}; allowed: multiples of {unit}")  # fmt: skip
        count, rank, ranks = global_batch_size // unit, self.dp_rank, self.dp_size
        for number in range(rank * count, (rank + 1) * count) if self.contiguous else range(rank, count * ranks, ranks):
            yield self.batch(first_sample + number * self.micro)

    def batch(self, first: int) -> Batch:
        """Samples [first, first + B) as one batch."""
        samples = [self._checked(k) for k in range(first, first + self.micro)]
        tokens, starts = np.stack([s.tokens for s in samples]), np.stack([s.starts for s in samples])
        labels = tokens[:, 1:].copy()
        labels[np.arange(1, tokens.shape[1]) >= np.array([[s.valid] for s in samples])] = IGNORED
        if self.mask_eod:
            labels[starts[:, 1:]] = IGNORED
        positions = documents = None
        if self.mask_documents:
            positions, documents = document_columns(starts[:, :-1])
        return Batch(np.ascontiguousarray(tokens[:, :-1]), labels, positions, documents, first)

    def _checked(self, k: int) -> Sample:
        sample = self.dataset[k]
        if self.vocab_size is not None and sample.valid:
            name, j = self.dataset.locate(k)
            check_token_ids(sample.tokens[: sample.valid], self.vocab_size, f"sample {j} of {name}")
        return sample


def document_columns(starts_BS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(positions_BS, documents_BS), i64, from where documents start. The tail of a document at a row's beginning counts from 0."""
    at = np.arange(starts_BS.shape[1])
    begun = np.maximum.accumulate(np.where(starts_BS, at, 0), axis=1)
    documents = np.cumsum(starts_BS, axis=1, dtype=np.int64)
    return (at - begun).astype(np.int64), documents - documents[:, :1]


@dataclass(frozen=True)
class Part:
    """One dataset of a config: its prefix, and the prepared folder it lies in (None: bare Megatron files)."""

    prefix: Path
    folder: Path | None
    manifest: dict[str, Any] | None

    def open(self) -> IndexedDataset:
        indexed = IndexedDataset(self.prefix)
        known = self._known()
        if known and known["bytes"] != indexed.bin_bytes:
            raise UserError(f"{indexed.bin_path} has {indexed.bin_bytes} bytes, {self.folder}/{MANIFEST} says {known['bytes']}; "
                            "copy the folder whole, or prepare it again")  # fmt: skip
        return indexed

    def _known(self) -> dict[str, Any] | None:
        return self.manifest["files"].get(f"{self.prefix.name}.bin") if self.manifest else None

    @property
    def content(self) -> str | None:
        """sha256 of the .bin by the manifest."""
        known = self._known()
        return known["sha256"] if known else None


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """`manifest.json` of a prepared folder, or None if it has none."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text("utf-8"))
        if manifest["format"] in FORMATS and "files" in manifest and "tokenizer" in manifest:
            return manifest
        found = f"format {manifest['format']}"
    except (ValueError, KeyError, TypeError) as error:
        found = f"{type(error).__name__}: {' '.join(str(error).split())}"
    allowed = " or ".join(map(str, FORMATS))
    raise UserError(f"{path} is not a manifest of data prepare ({found}); allowed: format {allowed}; prepare the folder again")


def find_part(path: str | Path, split: str) -> Part:
    """A folder means its `split`; anything else is a Megatron prefix, perhaps one inside a prepared folder."""
    path = Path(path)
    if path.is_dir():
        if not paths(path / split)[1].is_file():
            raise UserError(f"{path} has no {split}.idx: it is not a prepared dataset; {MAKE_ONE}")
        return Part(path / split, path, read_manifest(path))
    if not paths(path)[1].is_file():
        raise UserError(f"{path} is neither a dataset folder nor a prefix: {path}.idx does not exist; give another, or {MAKE_ONE}")
    manifest = read_manifest(path.parent) if (path.parent / MANIFEST).is_file() else None
    if manifest and f"{path.name}.bin" in manifest["files"]:
        return Part(path, path.parent, manifest)
    return Part(path, None, None)


def _train_parts(data: DataConfig) -> list[tuple[Part, float]]:
    named = [(data.dir, 1.0)] if data.dir else [(data.train, 1.0)] if data.train else blend_parts(data)
    return [(find_part(path, "train"), weight) for path, weight in named]


def _valid_files(parts: list[Part]) -> list[IndexedDataset]:
    """The valid files of all folders that have one with something to predict."""
    folders = dict.fromkeys(p.folder for p in parts if p.folder and p.prefix.name == "train")
    files = [find_part(folder, "valid").open() for folder in folders if paths(folder / "valid")[1].is_file()]
    return [f for f in files if f.num_tokens >= 2]


def _tokenizer(data: DataConfig, parts: list[Part], more: list[Part]) -> Tokenizer | None:
    """The one tokenizer of all parts; None for bare Megatron files. Each part's manifest must name its sha256.

    `more`: parts that must have the same one where it is known, and do not decide which: a set that a run is evaluated on besides
    must not change what is trained.
    """
    has_one = [p.folder for p in parts if p.folder and (p.manifest or has_tokenizer(p.folder))]
    where = data.tokenizer or (has_one[0] if has_one else None)
    tokenizer = load_tokenizer(where) if where else None
    for part in parts + more if tokenizer else []:
        if part.manifest:
            made_with = part.manifest["tokenizer"]["sha256"]
        elif part.folder and has_tokenizer(part.folder):
            made_with = load_tokenizer(part.folder).sha256
        else:
            continue
        if made_with != tokenizer.sha256:
            raise UserError(f"{where} gives a tokenizer that is not the dataset's: sha256 {tokenizer.sha256[:12]}, "
                            f"{part.folder} was made with {made_with[:12]}; use that one, or prepare the data again")  # fmt: skip
    return tokenizer


def _train_set(data: DataConfig, parts: list[tuple[Part, float]], seq_len: int, seed: int) -> GPTDataset | Blend | Later | None:
    """What the order makes of the parts, from data.consumed on. One part is no blend, in Megatron either."""

    def make(i: int, samples: int | None) -> GPTDataset:
        part = parts[i][0]
        return GPTDataset(part.open(), seq_len, seed, data.order, part.content, samples, data.megatron_split)

    if not parts:
        return None
    if len(parts) == 1:
        train = make(0, data.megatron_samples)
    else:
        order = registry.get("sample_order", data.order)
        train = order.blended(make, [weight for _, weight in parts], seed, data.megatron_samples)
    return Later(train, data.consumed) if data.consumed else train


def open_data(data: DataConfig, seq_len: int, seed: int, need_train: bool = True) -> DataSource:
    """Open what the `data` section names: training set, evaluation windows, tokenizer. Mistakes raise `UserError`.

    With need_train=False (evaluation) data.valid alone is enough, `train` is then None, and data.valid_sets are left alone.
    """
    parts = _train_parts(data)
    if not parts and (need_train or not data.valid):
        raise UserError(f"no {'training ' * need_train}data is named; give data.dir=DIR, data.train=PREFIX or "
                        f"data.blend=[PATH:WEIGHT,...]; {MAKE_ONE}")  # fmt: skip
    evaluated = [(find_part(data.valid, "valid"), 1.0)] if data.valid else []
    named = {name: find_part(path, "valid") for name, path in data.valid_sets.items()} if need_train else {}
    tokenizer = _tokenizer(data, [part for part, _ in parts + evaluated], list(named.values()))
    train = _train_set(data, parts, seq_len, seed)
    files = [part.open() for part, _ in evaluated] or _valid_files([part for part, _ in parts])
    valid = EvalWindows(files, seq_len) if files else None
    sets = {name: EvalWindows(part.open(), seq_len) for name, part in named.items()}
    vocab_size = tokenizer.vocab_size if tokenizer else None
    return DataSource(train, valid, tokenizer, vocab_size, (train or valid).fingerprint(), sets)
