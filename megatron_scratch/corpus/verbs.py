"""The verbs that do a part of `data prepare`: clean, dedup, tokenizer, tokenize. They run the same stages under the same keys, so
a verb that was stopped can be gone on with by another that shares its settings, in the same folder, without doing work twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_scratch import registry
from megatron_scratch.config.corpus import CorpusConfig, dedup_name
from megatron_scratch.corpus import export, pipeline, tokenizer_report
from megatron_scratch.corpus.graph import Graph
from megatron_scratch.corpus.write.encode import Deal
from megatron_scratch.corpus.write.sample import sample_documents
from megatron_scratch.data.tokenizer import load_tokenizer
from megatron_scratch.util.errors import UserError

_ORDER = ("valid_fraction", "split", "seed")
_TOKENS = ("tokenizer", "vocab_size", "tokenizer_bytes", "encoder", *_ORDER)
_EVALUATIONS = ("decontaminate", "decontaminate_keys", "decontaminate_ngram")
_COPIES = ("dedup", "minhash", "keep", "priority", "spans", "span_chars", *_EVALUATIONS)
UNREAD: dict[str, tuple[str, ...]] = {
    "prepare": (), "clean": _TOKENS + _COPIES, "dedup": _TOKENS, "tokenizer": _ORDER, "tokenize": _ORDER}  # fmt: skip
"""Verb -> keys of the corpus section that it does not read."""


def prepare(cfg: CorpusConfig, **how: Any) -> dict[str, Any]:
    """All of it."""
    return pipeline.prepare(cfg, **how)


def clean(cfg: CorpusConfig, **how: Any) -> dict[str, Any]:
    """Read and clean; write the documents that are left. `how`: progress, plugins and launcher, as in `pipeline.prepare`."""
    return pipeline.run("clean", _documents, replace(_defaults(cfg, "clean"), dedup="none"), unread=UNREAD["clean"], **how)


def dedup(cfg: CorpusConfig, **how: Any) -> dict[str, Any]:
    """Clean, deduplicate, decontaminate as configured; write the documents that are left."""
    if dedup_name(cfg) == "none" and cfg.spans == "none" and not cfg.decontaminate:
        raise UserError("data dedup with corpus.dedup=none, corpus.spans=none and no corpus.decontaminate has nothing to do; "
                        "give one of them, or run data clean")  # fmt: skip
    return pipeline.run("dedup", _documents, _defaults(cfg, "dedup"), unread=UNREAD["dedup"], **how)


def tokenizer(cfg: CorpusConfig, **how: Any) -> dict[str, Any]:
    """Clean, deduplicate, train a tokenizer on what is left, and save it."""
    trainers = registry.names("tokenizer_trainer")
    if cfg.tokenizer not in trainers:
        raise UserError(f"data tokenizer trains one, and corpus.tokenizer={cfg.tokenizer} is not to be trained; allowed: "
                        f"{', '.join(trainers)}")  # fmt: skip
    return pipeline.run("tokenizer", _trained, _defaults(cfg, "tokenizer"), unread=UNREAD["tokenizer"], **how)


def tokenize(cfg: CorpusConfig, **how: Any) -> dict[str, Any]:
    """Encode every document that is left, in the order of the input, as `OUTPUT/train.{bin,idx}`: what Megatron's
    preprocess_data.py does with --append-eod. All goes to one side, and nothing is shuffled."""
    return pipeline.run("tokenize", _one_dataset, _defaults(cfg, "tokenize"), unread=UNREAD["tokenize"], **how)


def _defaults(cfg: CorpusConfig, verb: str) -> CorpusConfig:
    """What the verb does not read is as if it had not been given: it does not tell outputs apart."""
    plain = CorpusConfig()
    return replace(cfg, **{name: getattr(plain, name) for name in UNREAD[verb]})


def _documents(graph: Graph, output: Path, key: str) -> dict[str, Any]:
    suffix = export.suffix()
    done = graph.written(suffix)
    written = export.place(done, suffix, output)
    told: dict[str, Any] = {name: done.total(name) for name in ("documents", "characters", "bytes")}
    return {"documents": {**told, "files": len(written)}, "files": pipeline.all_files(graph, output, [], written)}


def _trained(graph: Graph, output: Path, key: str) -> dict[str, Any]:
    told = pipeline.saved_tokenizer(graph, output)
    tokenizer = load_tokenizer(output / told["file"])
    sample = tokenizer_report.encoded(tokenizer, sample_documents(graph))
    told = {**told, "report": tokenizer_report.report(tokenizer, {"sample": sample})}
    return {"tokenizer": told, "files": pipeline.all_files(graph, output, [told["file"]], {})}


def _one_dataset(graph: Graph, output: Path, key: str) -> dict[str, Any]:
    told = pipeline.saved_tokenizer(graph, output)
    deal = Deal("none", 0, graph.cfg.seed, graph.left_total("characters"))
    return pipeline.datasets(graph, output, key, told, deal, ["train"])
