"""What is in a dataset, as text for a person: counts, one document, one training sample, each with where it came from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_scratch import registry
from megatron_scratch.corpus.lengths import described, document_lengths
from megatron_scratch.corpus.report_page import read_report
from megatron_scratch.corpus.told import summary
from megatron_scratch.data.indexed import IndexedDataset, paths
from megatron_scratch.data.sidecar import Sidecar
from megatron_scratch.data.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from megatron_scratch.util.errors import UserError, choice

BAR = 40  # characters of the longest bar in the histogram
MANIFEST, REPORT = "manifest.json", "report.html"


def inspect(path: str | Path, document: int | None = None, sample: int | None = None, seq_len: int = 256, seed: int = 1234,
            order: str = "documents", samples: int | None = None, split: str | None = None) -> str:  # fmt: skip
    """Counts, lengths, what was left out; or one document; or training sample `sample` of a run (what follows it is the run's).

    Args:
        path: a prepared folder (its train split, where one document or sample is asked for) or a Megatron prefix.
    """
    path = Path(path)
    prefix = path / "train" if path.is_dir() else path
    if document is not None or sample is not None:
        if path.is_dir() and not paths(prefix)[1].is_file() and (path / MANIFEST).is_file():
            raise UserError(f"{path} holds no tokens, so no document and no sample; data prepare and data tokenize write them")
        view = _View(prefix)
        if document is not None:
            return view.document(document)
        return view.sample(sample, seq_len, seed, order, samples, split)  # type: ignore[arg-type]
    return "\n".join(_overview(path))


class _View:
    """A dataset with what lies beside it."""

    def __init__(self, prefix: Path):
        self.prefix, self.indexed, self.origins = prefix, IndexedDataset(prefix), Sidecar.of(prefix)
        self.tokenizer = _tokenizer(prefix.parent)

    def document(self, i: int) -> str:
        tokens = self.indexed.document(i)
        return "\n".join([f"document {i} of {self.prefix}: {len(tokens)} tokens", *self._origin(i), self._text(tokens)])

    def sample(self, k: int, seq_len: int, seed: int, order: str, samples: int | None, split: str | None) -> str:
        """The pieces of a sample, each under a line that says what it is."""
        from megatron_scratch.data.dataset import GPTDataset

        if k < 0:
            raise UserError(f"sample={k} must be 0 or more")
        choice("order", order, registry.names("sample_order"))
        dataset = GPTDataset(self.indexed, seq_len, seed, order, samples=samples, split=split)
        epoch, window = dataset.window_of(k)
        tokens, starts = dataset[k].tokens, self.indexed.document_starts
        lines = [f"sample {k} of {self.prefix} (seq_len {seq_len}, seed {seed}, order {order}: epoch {epoch}, window {window} of "
                 f"{dataset.samples_per_epoch}): {len(tokens)} tokens"]  # fmt: skip
        pieces, at = dataset.pieces(k), 0
        if pieces is None:
            return "\n".join([*lines, f"-- of documents that order={order} does not tell", self._text(tokens)])
        for i, a, b in pieces:
            lines += [f"-- tokens {a} to {b - 1} of the {int(starts[i + 1] - starts[i])} of document {i}", *self._origin(i),
                      self._text(tokens[at : at + b - a])]  # fmt: skip
            at += b - a
        return "\n".join(lines)

    def _origin(self, i: int) -> list[str]:
        """From where document i came; nothing where that was not written down."""
        if self.origins is None:
            return []
        source, place, copies = self.origins.origin(i)
        number = int(self.origins.columns["document"][i])
        gone = f"; {copies} {'copy' if copies == 1 else 'copies'} went in its favour" if copies else ""
        return [f"   from {source}, place {place}, document {number} of the input{gone}"]

    def _text(self, tokens: np.ndarray) -> str:
        return self.tokenizer.decode(tokens.tolist()) if self.tokenizer else " ".join(map(str, tokens.tolist()))


def _tokenizer(folder: Path) -> Tokenizer | None:
    return load_tokenizer(folder) if has_tokenizer(folder) else None


def _overview(path: Path) -> list[str]:
    manifest = _manifest(path)
    prefixes = [path / side for side in ("train", "valid") if paths(path / side)[1].is_file()] if path.is_dir() else [path]
    if not prefixes and not manifest:
        raise UserError(f"{path} has no train.idx and no {MANIFEST}: it is not a prepared folder; give one, or a Megatron prefix")
    lines = [f"{path}: made by data {manifest.get('verb', 'prepare')}; {summary(manifest)}"] if manifest else []
    for prefix in prefixes:
        lines += _dataset(prefix)
    folder = path if path.is_dir() else path.parent
    if prefixes and (tokenizer := _tokenizer(folder)):
        lines.append(f"tokenizer: {tokenizer.vocab_size} ids, EOD {tokenizer.eod_id}, sha256 {tokenizer.sha256[:12]}"
                     + (f", encoded by {manifest['tokenizer'].get('encoder')}" if manifest else ""))  # fmt: skip
    return lines + _sources(manifest) + _steps(path, manifest) + _dropped(manifest)


def _dataset(prefix: Path) -> list[str]:
    x, sidecar = IndexedDataset(prefix), Sidecar.of(prefix)
    known = "origins and checksums beside it" if sidecar else "no origins and no checksums: unverified"
    tokens = int(x.sizes.sum(dtype=np.int64))
    return [f"{prefix}: {x.num_documents} documents, {x.num_sequences} sequences, {tokens} tokens of {x.dtype.name}, {x.bin_bytes} "
            f"bytes; {known}", *_histogram(described(document_lengths(x)))]  # fmt: skip


def _histogram(told: dict[str, Any]) -> list[str]:
    """Documents per power of two of tokens."""
    if not told["bins"]:
        return []
    most = max(n for _, _, n in told["bins"])
    rows = [f"{a:>10} to {b:<10} {n:>9} {'#' * -(-n * BAR // most)}".rstrip() for a, b, n in told["bins"]]
    return [f"tokens per document: median {told['median']}, mean {told['mean']:.1f}, longest {told['longest']}", *rows]


def _manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text("utf-8"))
        if all(name in manifest for name in ("key", "sources", "dropped", "files")):
            return manifest
        raise ValueError("keys are missing")
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); data verify tells what else is") from error


def _sources(manifest: dict[str, Any] | None) -> list[str]:
    told = manifest["sources"] if manifest else []
    return [f"source {s['input']}: {s['files']} files, {s['documents']} documents, {s['bytes']} bytes" for s in told]


def _steps(folder: Path, manifest: dict[str, Any] | None) -> list[str]:
    """What each step took, from the page of the report; from the manifest alone where it is not there."""
    report = read_report(folder / REPORT) if manifest else None
    if report is None or manifest is None or report["key"] != manifest["key"]:
        stages = manifest.get("stages", {}) if manifest else {}
        return [f"stage {name}: {', '.join(f'{n} {what}' for what, n in told.items())}" for name, told in stages.items()]
    return [f"step {s['label']}: {s['documents_in']} to {s['documents_out']} documents, {s['seconds']:.2f} s, "
            f"{s['cpu_seconds']:.2f} CPU-seconds" for s in report["steps"]]  # fmt: skip


def _dropped(manifest: dict[str, Any] | None) -> list[str]:
    rows: Sequence[tuple[str, Any]] = sorted(manifest["dropped"].items(), key=lambda row: -row[1]["count"]) if manifest else []
    return [f"dropped {d['count']}: {reason} (e.g. {d['samples'][0]})" for reason, d in rows]
