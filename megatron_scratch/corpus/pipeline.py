"""`data prepare`: the stages of `graph.py`, the two datasets, and the manifest, which comes last.

Killed anywhere, the same command goes on at the tasks without a marker and gives the same bytes. Between stages all lies in
`OUTPUT/.prepare`; memory holds one shard per worker, whatever the size of the corpus.
"""

from __future__ import annotations

import errno
import fcntl
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_scratch import registry
from megatron_scratch.config.corpus import CorpusConfig, check_corpus
from megatron_scratch.config.launcher import LauncherConfig
from megatron_scratch.corpus import tokenizer_report
from megatron_scratch.corpus.clean import build_cleaners, files_of
from megatron_scratch.corpus.clock import clocked
from megatron_scratch.corpus.graph import FORMAT, Graph
from megatron_scratch.corpus.read import settings
from megatron_scratch.corpus.report import collect
from megatron_scratch.corpus.report_page import write_report
from megatron_scratch.corpus.sources import SourceFile, find_files
from megatron_scratch.corpus.stages import hash_of
from megatron_scratch.corpus.told import described, summary
from megatron_scratch.corpus.write import encoders
from megatron_scratch.corpus.write.encode import SIDES, Deal
from megatron_scratch.corpus.write.parts import join
from megatron_scratch.corpus.write.sample import sample_documents, sample_texts
from megatron_scratch.data.indexed import best_dtype
from megatron_scratch.data.tokenizer import FILES, Tokenizer, load_tokenizer
from megatron_scratch.util.errors import UserError
from megatron_scratch.util.files import atomic_write, sha256_file, write_json
from megatron_scratch.util.sealed import sealed

MANIFEST, WORK, REMOVED, REPORT = "manifest.json", ".prepare", "removed.jsonl", "report.html"
OUTPUTS = [f"{side}.{suffix}" for side in SIDES for suffix in ("bin", "idx")] + [*FILES, "documents"]
NOT_CONTENT = ("output", "engine", "workers", "shard_mb")  # how and where, not what: the same bytes come out
Say = Callable[[str], Any]
Make = Callable[[Graph, Path, str], dict[str, Any]]


def prepare(cfg: CorpusConfig, progress: Say | None = None, plugins: list[str] | None = None,
            launcher: LauncherConfig | None = None) -> dict[str, Any]:  # fmt: skip
    """Make `cfg.output`/{train,valid}.{bin,idx,meta}, the tokenizer, removed.jsonl and manifest.json. Returns the manifest.

    Args:
        progress: gets one line per stage and task.
        plugins: modules that register cleaners, tokenizers or encoders of the user's own; workers import them.
        launcher: what corpus.engine=slurm asks the scheduler for.

    Errors: `UserError` for a missing or empty input, an impossible vocabulary, or an output made with other settings.
    """
    return run("prepare", _prepare, cfg, progress, plugins, launcher)


def run(verb: str, make: Make, cfg: CorpusConfig, progress: Say | None = None, plugins: list[str] | None = None,
        launcher: LauncherConfig | None = None, unread: Sequence[str] = ()) -> dict[str, Any]:  # fmt: skip
    """What all verbs that write a folder have in common. They share the stages: what one left unfinished another goes on with.

    Args:
        make: (graph, output, key) -> the verb's own part of the manifest; its files are written then.
        unread: settings that this verb does not read; they are at their defaults.
    """
    say = progress or (lambda line: None)
    check_corpus(cfg)
    cleaners = build_cleaners(cfg.clean, settings(cfg)["options"])  # what they refuse is refused before any worker starts
    output = Path(cfg.output)
    files = find_files(cfg.input, exclude=output)
    key = _key(verb, cfg, files, unread, files_of(cleaners))
    with _locked(output):
        if manifest := _finished(output, key):
            shutil.rmtree(output / WORK, ignore_errors=True)  # killed after the manifest, before the end
            say(f"{output} is up to date: {summary(manifest)}")
            return manifest
        for scrap in output.glob(".*.tmp"):  # of one that was killed
            shutil.rmtree(scrap) if scrap.is_dir() else scrap.unlink()
        work = output / WORK
        work.mkdir(parents=True, exist_ok=True)
        engine = registry.get("corpus_engine", cfg.engine)(cfg, work, say, launcher or LauncherConfig())
        with engine:
            graph = Graph(cfg, files, work, engine, plugins or [], say)
            if cfg.minhash.export:
                graph.exported  # noqa: B018  (asking for it makes it)
            told = {"format": FORMAT, "key": key, "verb": verb, "config": content(cfg, unread)}
            manifest = sealed({**told, **make(graph, output, key), **described(graph)})
            write_report(output / REPORT, collect(graph, manifest, output))
        write_json(output / MANIFEST, manifest)
        shutil.rmtree(work)
    say(f"{output}: {summary(manifest)}")
    return manifest


def _prepare(graph: Graph, output: Path, key: str) -> dict[str, Any]:
    cfg = graph.cfg
    told = saved_tokenizer(graph, output)
    sides = [side for side in SIDES if side == "train" or cfg.valid_fraction]
    return datasets(graph, output, key, told, _deal(graph, graph.say), sides)


def saved_tokenizer(graph: Graph, output: Path) -> dict[str, Any]:
    """Train or copy the tokenizer into the output, and choose its encoder; what the manifest tells of it."""
    graph.left_total("documents")  # the clock of training begins when all that comes before it is done
    with clocked(graph.work, "tokenizer"):
        told = _tokenizer(graph, output)
    graph.say(f"tokenizer {graph.cfg.tokenizer}: {told['vocab_size']} ids, encoded by {told['encoder']}")
    return told


def datasets(graph: Graph, output: Path, key: str, told: dict[str, Any], deal: Deal, sides: Sequence[str]) -> dict[str, Any]:
    """Encode what is left, and write one dataset for each side."""
    path = str((output / told["file"]).resolve())
    encoded, dtype = graph.encoded(path, told["encoder"], deal), best_dtype(told["vocab_size"])
    lineage = {"config": content(graph.cfg), "key": key, "tokenizer": told["sha256"]}
    splits: dict[str, Any] = {"split": deal.split}
    written = {}
    for side in sides:
        splits[side] = {name: sum(told[side][name] for told in encoded.results) for name in encoded.results[0][side]}
        splits[side] |= {"dtype": dtype.name}
        parts = graph.parts(encoded, side, deal.split, dtype)
        with clocked(graph.work, "write"):
            written |= join(output / side, parts, dtype, [file.name for file in graph.files], lineage)
    used = tokenizer_report.union(encoded.paths("used.npy"))
    samples = {side: tokenizer_report.written(output / side) for side in sides}
    told = {**told, "report": tokenizer_report.report(load_tokenizer(path), samples, used)}
    return {"tokenizer": told, "splits": splits, "files": all_files(graph, output, [told["file"]], written)}


def all_files(graph: Graph, output: Path, names: Sequence[str], written: dict[str, tuple[int, str]]) -> dict[str, Any]:
    """Write removed.jsonl. Returns bytes and sha256 of every file: of those that are told already, of `names`, of removed.jsonl."""
    listing = graph.listed
    with clocked(graph.work, "write"):
        with atomic_write(output / REMOVED) as f:
            for path in listing.paths("removed.jsonl"):
                with open(path, "rb") as part:
                    shutil.copyfileobj(part, f, 1 << 20)
        written = written | {name: ((output / name).stat().st_size, sha256_file(output / name)) for name in [*names, REMOVED]}
    return {name: {"bytes": size, "sha256": sha256} for name, (size, sha256) in sorted(written.items())}


def content(cfg: CorpusConfig, unread: Sequence[str] = ()) -> dict[str, Any]:
    """The settings that decide the bytes."""
    return {name: value for name, value in asdict(cfg).items() if name not in (*NOT_CONTENT, *unread)}


def _key(verb: str, cfg: CorpusConfig, files: list[SourceFile], unread: Sequence[str], of_cleaners: list[str]) -> str:
    """A hash of all that decides the bytes: settings, and the files that they name."""
    trained = cfg.tokenizer in registry.names("tokenizer_trainer")
    named = cfg.tokenizer if trained else load_tokenizer(cfg.tokenizer).sha256
    signatures = sorted(Path(cfg.minhash.signatures).rglob("*")) if cfg.minhash.signatures else []
    read = [*files, *(find_files(cfg.decontaminate) if cfg.decontaminate else ())]
    beside = [*of_cleaners, *(sha256_file(path) for path in signatures if path.is_file())]
    return hash_of(FORMAT, verb, [(file.name, file.probe()) for file in read], content(cfg, unread), named, beside)


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """One preparation at a time in a folder. The kernel lets go of a lock when its holder dies."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        f = open(output / ".lock", "a")
    except OSError as error:
        raise UserError(f"corpus.output={output} cannot be written: {error.strerror}; choose another folder") from error
    with f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"corpus.output={output} is being written by another process; wait, or choose another folder"
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):  # a file system without locks
                raise
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
    (output / WORK).mkdir(exist_ok=True)  # first: what lies there without either is taken for somebody else's
    path.unlink()  # a file is gone or cut: make it again
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
    encoder, passed = encoders.choose(str(path.resolve()), sample_documents(graph), cfg.encoder)
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
