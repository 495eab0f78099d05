"""`data prepare`: read and clean, train the tokenizer, split and tokenize. Each stage leaves a marker, the manifest comes last.

Killed anywhere, the same command goes on at the first stage without a marker and gives the same bytes. Between stages the text
lies in `OUTPUT/.prepare` (an indexed dataset of UTF-8 bytes), so memory holds 16 bytes per document and one batch of text.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from array import array
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megatron_scratch import registry
from megatron_scratch.config.data import CorpusConfig, check_corpus
from megatron_scratch.corpus.clean import Cleaner
from megatron_scratch.corpus.sources import Document, Dropped, SourceFile, find_files, read_documents
from megatron_scratch.corpus.tokenize import sample_texts, split_by_document, split_tail, write_split
from megatron_scratch.data.indexed import IndexedDataset, IndexedWriter
from megatron_scratch.data.tokenizer import FILES, Tokenizer, load_tokenizer
from megatron_scratch.util.errors import UserError
from megatron_scratch.util.files import atomic_write, sha256_file, write_json

FORMAT = 1
MANIFEST = "manifest.json"
WORK = ".prepare"
SPLITS = ("train", "valid")
OUTPUTS = [f"{split}.{suffix}" for split in SPLITS for suffix in ("bin", "idx")] + list(FILES)
Progress = Callable[[str], Any]


def prepare(cfg: CorpusConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Make `cfg.output`/{train,valid}.{bin,idx}, the tokenizer and manifest.json. Returns the manifest.

    Args:
        progress: gets one line per stage, and one per batch of text.

    Errors: `UserError` for a missing or empty input, an impossible vocabulary, or an output made with other settings.
    """
    check_corpus(cfg)
    say = progress or (lambda line: None)
    output = Path(cfg.output)
    files = find_files(cfg.input, exclude=output)
    keys = _keys(cfg, files)
    if manifest := _finished(output, keys["tokenize"]):
        say(f"{output} is up to date: {_summary(manifest)}")
        return manifest
    work = output / WORK
    work.mkdir(parents=True, exist_ok=True)
    read = _stage(work, "read", keys, lambda: _read(cfg, files, work, say))
    say(f"read {read['documents']} documents, {read['bytes'] / 1e6:.1f} MB; {_lost(read['dropped'])}")
    store = IndexedDataset(work / "text")
    told = _stage(work, "tokenizer", keys, lambda: _tokenizer(cfg, store, output))
    tokenizer = load_tokenizer(output / told["file"])
    say(f"tokenizer {cfg.tokenizer}: {tokenizer.vocab_size} ids")
    splits = _stage(work, "tokenize", keys, lambda: _tokenize(cfg, store, work, tokenizer, say))
    manifest = _manifest(cfg, keys["tokenize"], read, told, splits)
    write_json(output / MANIFEST, manifest)
    shutil.rmtree(work)
    say(f"{output}: {_summary(manifest)}")
    return manifest


def _lost(dropped: dict[str, Any]) -> str:
    """What was left out, by reason, with the first place of each; the manifest names more."""
    if not dropped:
        return "nothing left out"
    return "left out: " + ", ".join(f"{told['count']} {reason} (e.g. {told['samples'][0]})" for reason, told in dropped.items())


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _keys(cfg: CorpusConfig, files: list[SourceFile]) -> dict[str, str]:
    """What each stage depends on, as a hash: the settings it reads, and the key of the stage before."""
    trained = cfg.tokenizer in registry.names("tokenizer_trainer")
    named = cfg.tokenizer if trained else load_tokenizer(cfg.tokenizer).sha256
    read = _hash(FORMAT, [(f.name, f.probe()) for f in files], cfg.text_key, cfg.dedup, cfg.min_chars, cfg.max_bytes)
    tokenizer = _hash(read, named, cfg.vocab_size, cfg.tokenizer_bytes)
    return {"read": read, "tokenizer": tokenizer, "tokenize": _hash(tokenizer, cfg.split, cfg.valid_fraction, cfg.seed)}


def _finished(output: Path, key: str) -> dict[str, Any] | None:
    """The manifest of a complete output with this key; None if there is work to do; refuse to write over anything else."""
    path = output / MANIFEST
    if not path.is_file():
        foreign = [name for name in OUTPUTS if (output / name).exists()]
        if foreign and not (output / WORK).is_dir():
            raise UserError(f"corpus.output={output} holds a {foreign[0]} that is not ours (no {MANIFEST}); choose another folder")
        return None
    try:
        manifest = json.loads(path.read_text("utf-8"))
        same, listed = manifest["key"] == key, manifest["files"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}); delete {output}, or choose another corpus.output") from error
    if not same:
        raise UserError(f"corpus.output={output} was prepared from other inputs or settings; choose another folder, or delete it")
    if all((output / name).is_file() and (output / name).stat().st_size == told["bytes"] for name, told in listed):
        return manifest
    path.unlink()  # a file is gone or cut: make it again
    (output / WORK).mkdir(exist_ok=True)
    return None


def _stage(work: Path, name: str, keys: dict[str, str], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The stage's result, from its marker if that has the right key, else by running it; the marker is written last."""
    marker = work / f"{name}.json"
    if marker.is_file():
        told = json.loads(marker.read_text("utf-8"))
        if told["key"] == keys[name]:
            return told["result"]
    result = run()
    write_json(marker, {"key": keys[name], "result": result})
    return result


def _read(cfg: CorpusConfig, files: list[SourceFile], work: Path, say: Progress) -> dict[str, Any]:
    """Clean text to `text.{bin,idx}`; per document, a hash and its characters to `documents.npy` (D, 2) u64."""
    dropped, columns, left = Dropped(), array("Q"), cfg.max_bytes
    clean = Cleaner(cfg.min_chars, cfg.dedup, dropped)
    sources = {f.entry: {"input": f.entry, "files": 0, "documents": 0, "characters": 0, "bytes": 0} for f in files}
    for file in files:
        sources[file.entry]["files"] += 1
    with IndexedWriter(work / "text", np.uint8) as writer:
        for file, document in read_documents(files, cfg.text_key, dropped):
            kept = clean(document if left is None else _first(document, left))
            if kept:
                raw = kept[0].encode("utf-8")
                writer.add_document(np.frombuffer(raw, np.uint8))
                columns.extend([int.from_bytes(kept[1][:8], "little"), len(kept[0])])
                for name, n in (("documents", 1), ("characters", len(kept[0])), ("bytes", len(raw))):
                    sources[file.entry][name] += n
                left = None if left is None else left - len(raw)
            if left is not None and left <= 0:
                break
    if not columns:
        why = ", ".join(f"{n} {reason}" for reason, n in dropped.counts.items()) or "the files are empty"
        raise UserError(f"corpus.input={cfg.input} gives no document ({why}); give text, or .jsonl with the field {cfg.text_key!r}")
    with atomic_write(work / "documents.npy") as f:
        np.save(f, np.array(columns, dtype=np.uint64).reshape(-1, 2))
    return {"documents": len(columns) // 2, "bytes": writer.tokens, "sources": list(sources.values()),
            "dropped": dropped.as_dict()}  # fmt: skip


def _first(document: Document, limit: int) -> Document:
    """A document cut to `limit` bytes, at a character."""
    return Document(document.text.encode("utf-8")[:limit].decode("utf-8", "ignore"), document.source, document.offset)


def _tokenizer(cfg: CorpusConfig, store: IndexedDataset, output: Path) -> dict[str, Any]:
    """Train or copy the tokenizer into the output. A trainer that says `whole_corpus` sees all of the text, not a sample."""
    if cfg.tokenizer in registry.names("tokenizer_trainer"):
        train = registry.get("tokenizer_trainer", cfg.tokenizer)
        limit = store.num_tokens if getattr(train, "whole_corpus", False) else cfg.tokenizer_bytes
        tokenizer, name = train(sample_texts(store, limit), cfg.vocab_size), cfg.tokenizer
    else:
        tokenizer, name = load_tokenizer(cfg.tokenizer), "given"
    for file in FILES:  # of an earlier, unfinished try with another kind
        (output / file).unlink(missing_ok=True)
    path = tokenizer.save(output)
    return {"file": path.name, "sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size, "eod_id": tokenizer.eod_id,
            "made_by": name}  # fmt: skip


def _tokenize(cfg: CorpusConfig, store: IndexedDataset, work: Path, tokenizer: Tokenizer, say: Progress) -> dict[str, Any]:
    """Write the splits beside `work`; returns the split that was used and the counts of each side."""
    output = work.parent
    columns = np.load(work / "documents.npy")
    split = cfg.split if len(columns) > 1 or not cfg.valid_fraction else "tail"  # one document cannot be dealt to two sides
    if split == "tail":
        sides = split_tail(store, columns[:, 1].astype(np.int64), cfg.valid_fraction)
    else:
        sides = split_by_document(store, columns[:, 0], cfg.valid_fraction, cfg.seed)
    if split != cfg.split:
        say(f"one document: its last {cfg.valid_fraction:.0%} is the validation set (corpus.split=tail)")
    counts: dict[str, Any] = {"split": split}
    whole = store.num_tokens / 1e6
    for name in SPLITS if cfg.valid_fraction else SPLITS[:1]:
        report = lambda done, name=name: say(f"{name}: {done / 1e6:.1f} of {whole:.1f} MB")  # noqa: E731
        counts[name] = write_split(sides[name], tokenizer, output / name, report)
    return counts


def _manifest(cfg: CorpusConfig, key: str, read: dict[str, Any], told: dict[str, Any],
              splits: dict[str, Any]) -> dict[str, Any]:  # fmt: skip
    """The same for the same input and settings, whatever the output folder is called."""
    output = Path(cfg.output)
    names = [told["file"], *(f"{split}.{suffix}" for split in SPLITS if split in splits for suffix in ("bin", "idx"))]
    files = {name: {"bytes": (output / name).stat().st_size, "sha256": sha256_file(output / name)} for name in names}
    config = {name: value for name, value in asdict(cfg).items() if name != "output"}
    return {"format": FORMAT, "key": key, "config": config, "sources": read["sources"], "dropped": read["dropped"],
            "tokenizer": told, "splits": splits, "files": files}  # fmt: skip


def _summary(manifest: dict[str, Any]) -> str:
    sides = [f"{name} {s['documents']} documents, {s['tokens']} tokens" for name in SPLITS if (s := manifest["splits"].get(name))]
    return "; ".join([*sides, f"vocabulary {manifest['tokenizer']['vocab_size']}"])
