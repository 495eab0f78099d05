"""What is in a dataset, as text for a person."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from megatron_scratch.data.indexed import IndexedDataset
from megatron_scratch.data.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from megatron_scratch.util.errors import UserError

BAR = 40  # characters of the longest bar in the histogram


def inspect(path: str | Path, document: int | None = None, sample: int | None = None, seq_len: int = 256, seed: int = 1234) -> str:
    """Counts and a histogram of document lengths; or one document, or training sample `sample` of a run (seq_len, seed), decoded.

    Args:
        path: a prepared folder (its train split) or a Megatron prefix.
    """
    path = Path(path)
    prefix = path / "train" if path.is_dir() else path
    indexed, tokenizer = IndexedDataset(prefix), _tokenizer(prefix.parent)
    if document is not None:
        return _show(f"document {document} of {prefix}", indexed.document(document), tokenizer)
    if sample is not None:
        from megatron_scratch.data.dataset import GPTDataset

        if sample < 0:
            raise UserError(f"sample={sample} must be 0 or more")
        dataset = GPTDataset(indexed, seq_len, seed)
        epoch, window = dataset.window_of(sample)
        where = f"epoch {epoch}, window {window} of {dataset.samples_per_epoch}"
        title = f"sample {sample} of {prefix} (seq_len {seq_len}, seed {seed}: {where})"
        return _show(title, dataset[sample].tokens, tokenizer)
    lines = [f"{prefix}: {indexed.num_documents} documents, {indexed.num_sequences} sequences, {indexed.num_tokens} tokens of "
             f"{indexed.dtype.name}, {indexed.bin_bytes} bytes"]  # fmt: skip
    if tokenizer:
        lines.append(f"tokenizer: {tokenizer.vocab_size} ids, EOD {tokenizer.eod_id}, sha256 {tokenizer.sha256[:12]}")
    return "\n".join(lines + _histogram(np.diff(indexed.document_starts)) + _manifest(path))


def _tokenizer(folder: Path) -> Tokenizer | None:
    return load_tokenizer(folder) if has_tokenizer(folder) else None


def _show(title: str, tokens: np.ndarray, tokenizer: Tokenizer | None) -> str:
    body = tokenizer.decode(tokens.tolist()) if tokenizer else " ".join(map(str, tokens.tolist()))
    return f"{title}: {len(tokens)} tokens\n{body}"


def _histogram(lengths: np.ndarray) -> list[str]:
    """Documents per power of two of tokens."""
    if not len(lengths):
        return []
    counts = np.bincount([int(n).bit_length() for n in lengths])
    bars = ["#" * -(-int(n) * BAR // int(counts.max())) for n in counts]
    rows = [f"{1 << b >> 1:>10} to {(1 << b) - 1:<10} {n:>9} {bars[b]}" for b, n in enumerate(counts)]
    return [f"tokens per document: median {int(np.median(lengths))}, mean {lengths.mean():.1f}, longest {int(lengths.max())}",
            *rows[int(np.flatnonzero(counts)[0]) :]]  # fmt: skip


def _manifest(folder: Path) -> list[str]:
    path = folder / "manifest.json"
    if not path.is_file():
        return []
    manifest = json.loads(path.read_text("utf-8"))
    lines = [f"source {s['input']}: {s['files']} files, {s['documents']} documents, {s['bytes']} bytes"
             for s in manifest["sources"]]  # fmt: skip
    return lines + [f"dropped {d['count']}: {reason} (e.g. {d['samples'][0]})" for reason, d in manifest["dropped"].items()]
