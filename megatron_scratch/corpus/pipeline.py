"""`data prepare`: the stages of `graph.py`, the two datasets, and the manifest, which comes last.

Killed anywhere, the same command goes on at the tasks without a marker and gives the same bytes. Between stages all lies in
`OUTPUT/.prepare`; memory holds one shard per worker, whatever the size of the corpus.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_scratch import registry
from megatron_scratch.config.corpus import CorpusConfig, check_corpus
from megatron_scratch.corpus.graph import FORMAT, Graph
from megatron_scratch.corpus.read import SAMPLES
from megatron_scratch.corpus.sources import SourceFile, find_files
from megatron_scratch.corpus.stages import hash_of
from megatron_scratch.corpus.write import encoders
from megatron_scratch.corpus.write.encode import SIDES, Deal
from megatron_scratch.corpus.write.parts import join
from megatron_scratch.corpus.write.sample import sample_documents, sample_texts
from megatron_scratch.data.indexed import best_dtype
from megatron_scratch.data.tokenizer import FILES, Tokenizer, load_tokenizer
from megatron_scratch.util.errors import UserError
from megatron_scratch.util.files import atomic_write, sha256_file, write_json

MANIFEST, WORK, REMOVED, REPORT = "manifest.json", ".prepare", "removed.jsonl", "report.html"
OUTPUTS = [f"{side}.{suffix}" for side in SIDES for suffix in ("bin", "idx")] + list(FILES)
NOT_CONTENT = ("output", "engine", "workers", "shard_mb")  # how and where, not what: the same bytes come out
Say = Callable[[str], Any]


def prepare(cfg: CorpusConfig, progress: Say | None = None, plugins: list[str] | None = None) -> dict[str, Any]:
    """Make `cfg.output`/{train,valid}.{bin,idx,meta}, the tokenizer, removed.jsonl and manifest.json. Returns the manifest.

    Args:
        progress: gets one line per stage and task.
        plugins: modules that register cleaners, tokenizers or encoders of the user's own; workers import them.

    Errors: `UserError` for a missing or empty input, an impossible vocabulary, or an output made with other settings.
    """
    say = progress or (lambda line: None)
    check_corpus(cfg)
    output = Path(cfg.output)
    files = find_files(cfg.input, exclude=output)
    key = _key(cfg, files)
    with _locked(output):
        if manifest := _finished(output, key):
            say(f"{output} is up to date: {summary(manifest)}")
            return manifest
        work = output / WORK
        work.mkdir(parents=True, exist_ok=True)
        engine = registry.get("corpus_engine", cfg.engine)(cfg, work, say)
        with engine:
            manifest = _prepare(Graph(cfg, files, work, engine, plugins or [], say), output, key)
        write_json(output / MANIFEST, manifest)
        shutil.rmtree(work)
    say(f"{output}: {summary(manifest)}")
    return manifest


def _prepare(graph: Graph, output: Path, key: str) -> dict[str, Any]:
    cfg, say = graph.cfg, graph.say
    told = _tokenizer(graph, output)
    path = str((output / told["file"]).resolve())
    tokenizer = load_tokenizer(path)
    say(f"tokenizer {cfg.tokenizer}: {tokenizer.vocab_size} ids, encoded by {told['encoder']}")
    deal = _deal(graph, say)
    encoded = graph.encoded(path, told["encoder"], deal)
    dtype = best_dtype(tokenizer.vocab_size)
    sides = [side for side in SIDES if side == "train" or cfg.valid_fraction]
    splits: dict[str, Any] = {"split": deal.split}
    written = {}
    for side in sides:
        splits[side] = {name: sum(told[side][name] for told in encoded.results) for name in encoded.results[0][side]}
        splits[side] |= {"dtype": dtype.name}
        parts = graph.parts(encoded, side, deal.split, dtype)
        lineage = {"config": content(cfg), "key": key, "tokenizer": tokenizer.sha256}
        written |= join(output / side, parts, dtype, [file.name for file in graph.files], lineage)
    listing = graph.listed
    with atomic_write(output / REMOVED) as f:
        for path in listing.paths("removed.jsonl"):
            with open(path, "rb") as part:
                shutil.copyfileobj(part, f, 1 << 20)
    for name in (told["file"], REMOVED):
        written[name] = ((output / name).stat().st_size, sha256_file(output / name))
    files = {name: {"bytes": size, "sha256": sha256} for name, (size, sha256) in sorted(written.items())}
    return {"format": FORMAT, "key": key, "config": content(cfg), "sources": _sources(graph), "dropped": _dropped(graph),
            "stages": _stages(graph), "tokenizer": told, "splits": splits, "files": files}  # fmt: skip


def content(cfg: CorpusConfig) -> dict[str, Any]:
    """The settings that decide the bytes."""
    return {name: value for name, value in asdict(cfg).items() if name not in NOT_CONTENT}


def _key(cfg: CorpusConfig, files: list[SourceFile]) -> str:
    trained = cfg.tokenizer in registry.names("tokenizer_trainer")
    named = cfg.tokenizer if trained else load_tokenizer(cfg.tokenizer).sha256
    return hash_of(FORMAT, [(file.name, file.probe()) for file in files], content(cfg), named)


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """One preparation at a time in a folder."""
    output.mkdir(parents=True, exist_ok=True)
    with open(output / ".lock", "a") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"corpus.output={output} is being written by another process; wait, or choose another folder"
            ) from error
        yield


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


def _tokenizer(graph: Graph, output: Path) -> dict[str, Any]:
    """Train or copy the tokenizer into the output, and choose its encoder. A trainer that says `whole_corpus` sees all text."""
    cfg, marker = graph.cfg, graph.work / "tokenizer.json"
    trained = cfg.tokenizer in registry.names("tokenizer_trainer")
    key = hash_of(FORMAT, graph.left_key, cfg.tokenizer if trained else load_tokenizer(cfg.tokenizer).sha256, cfg.vocab_size,
                  cfg.tokenizer_bytes, cfg.encoder)  # fmt: skip
    if marker.is_file():
        told = json.loads(marker.read_text("utf-8"))
        if told["key"] == key and (output / told["result"]["file"]).is_file():
            return told["result"]
    tokenizer = _trained(graph) if trained else load_tokenizer(cfg.tokenizer)
    for file in FILES:  # of an earlier, unfinished try with another kind
        (output / file).unlink(missing_ok=True)
    path = tokenizer.save(output)
    encoder, passed = (cfg.encoder, {}) if cfg.encoder != "auto" else encoders.choose(str(path.resolve()), sample_documents(graph))
    result = {"file": path.name, "sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size, "eod_id": tokenizer.eod_id,
              "made_by": cfg.tokenizer if trained else "given", "encoder": encoder, "encoders_passed_over": passed}  # fmt: skip
    write_json(marker, {"key": key, "result": result})
    return result


def _trained(graph: Graph) -> Tokenizer:
    cfg = graph.cfg
    train = registry.get("tokenizer_trainer", cfg.tokenizer)
    limit = None if getattr(train, "whole_corpus", False) else cfg.tokenizer_bytes
    return train(sample_texts(graph, limit), cfg.vocab_size)


def _deal(graph: Graph, say: Say) -> Deal:
    """Who goes to valid. Each side gets a document at least, unless corpus.valid_fraction is 0; one alone is split by its tail."""
    cfg = graph.cfg
    documents, characters = graph.left_total("documents"), graph.left_total("characters")
    split = cfg.split if documents > 1 or not cfg.valid_fraction else "tail"  # one document cannot be dealt to two sides
    if split != cfg.split:
        say(f"one document: its last {cfg.valid_fraction:.0%} is the validation set (corpus.split=tail)")
    if split == "tail":
        return Deal(split, int(characters * (1 - cfg.valid_fraction)), cfg.seed, characters)
    cut = int(cfg.valid_fraction * 2.0**64)
    if cut:
        least, most = min(told["least"] for told in graph.left), max(told["most"] for told in graph.left)
        cut = min(max(cut, least + 1), most)
    return Deal(split, cut, cfg.seed, characters)


def _sources(graph: Graph) -> list[dict[str, Any]]:
    """Per entry of corpus.input: files, and what reading and cleaning left of them."""
    sources: dict[str, dict[str, Any]] = {}
    for file in graph.files:
        told = sources.setdefault(file.entry, {"input": file.entry, "files": 0, "documents": 0, "characters": 0, "bytes": 0})
        told["files"] += 1
    for result in graph.read.results:
        for index, counts in result["sources"].items():
            told = sources[graph.files[int(index)].entry]
            for name, n in counts.items():
                told[name] += n
    return list(sources.values())


def _dropped(graph: Graph) -> dict[str, Any]:
    """What was left out, by reason: how many, and the first places with the beginnings of their texts."""
    merged: dict[str, Any] = {}
    for told in [*graph.read.results, *graph.listed.results]:
        for reason, dropped in told["dropped"].items():
            into = merged.setdefault(reason, {"count": 0, "samples": [], "heads": []})
            into["count"] += dropped["count"]
            for sample in dropped["samples"][: SAMPLES - len(into["samples"])]:
                into["samples"].append(_place(sample, graph.lines_before))
                into["heads"].append(sample["head"])
    return dict(sorted(merged.items()))


def _place(sample: dict[str, Any], lines_before: dict[tuple[str, int], int]) -> str:
    """file:line of a line, file@place of anything else that is not at the beginning of its file."""
    if sample["line"] is not None:
        return f"{sample['source']}:{lines_before[sample['source'], sample['begin']] + sample['line']}"
    return f"{sample['source']}@{sample['place']}" if sample["place"] else sample["source"]


def _stages(graph: Graph) -> dict[str, Any]:
    """What the stages of deduplication counted."""
    stages = {"read": graph.read, "exact": graph.exact, "sign": graph.signed, "pair": graph.paired, "check": graph.checked,
              "star": graph.star, "contaminated": graph.contaminated}  # fmt: skip
    return {name: {key: done.total(key) for key, value in done.results[0].items() if isinstance(value, int) and key != "runs"}
            for name, done in stages.items() if done is not None and done.results}  # fmt: skip


def summary(manifest: dict[str, Any]) -> str:
    sides = [f"{name} {s['documents']} documents, {s['tokens']} tokens" for name in SIDES if (s := manifest["splits"].get(name))]
    return "; ".join([*sides, f"vocabulary {manifest['tokenizer']['vocab_size']}"])
