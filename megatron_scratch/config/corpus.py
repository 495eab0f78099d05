"""The `corpus` section: raw text to tokens on disk."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Optional

from megatron_scratch import registry
from megatron_scratch.util.errors import UserError, choice

KEEP = ("first", "longest", "source")
BAD = ("skip", "stop")


@dataclass
class MinHashConfig:
    """Near-deduplication. What is left out comes from the preset that corpus.dedup names."""

    bands: Optional[int] = None  # b of the S-curve 1 - (1 - s^r)^b
    rows: Optional[int] = None  # r
    ngram: Optional[int] = None  # words per shingle
    threshold: Optional[float] = (
        None  # a document goes if its Jaccard similarity to one that stays is at least this; 0: share a band
    )
    seed: int = 1
    partners: int = 64  # in a bucket of more, each is compared with the first so many
    signatures: Optional[str] = None  # folder of datatrove's .minhash.sig files to take instead of signing
    export: Optional[str] = None  # folder to write datatrove's .minhash.sig files to


# corpus.dedup -> settings of corpus.minhash. minhash: finds .9996 of pairs at 0.85, then compares the texts.
# fineweb: arXiv 2406.17557, 14 bands of 8: .772 at 0.75, .924 at 0.8; a shared band is enough.
PRESETS: dict[str, dict[str, Any]] = {
    "minhash": {"bands": 28, "rows": 4, "ngram": 5, "threshold": 0.8},
    "fineweb": {"bands": 14, "rows": 8, "ngram": 5, "threshold": 0.0},
}
DEDUP = ("none", "exact", *PRESETS)


@dataclass
class CorpusConfig:
    """What `data prepare` reads, what it leaves out, how it tokenizes, and where it writes."""

    input: Any = "stdlib"  # files, folders, globs, URLs (one or a list); stdlib: the text that every Python installation carries
    output: str = "data/stdlib"
    text_key: str = "text"  # the field of a record that holds the document
    id_key: str = "id"  # the field that names it, kept as a hash
    on_bad: str = "skip"  # a record that cannot be read: skip (counted, named) or stop
    clean: list[str] = field(default_factory=lambda: ["newlines", "length"])  # cleaners, in this order
    options: dict[str, Any] = field(default_factory=dict)  # their settings: corpus.options.gopher_quality.min_doc_words=20
    min_chars: int = 1  # of cleaner `length`
    max_record_mb: int = 256  # a larger record (a line, a file of text) is one that cannot be read
    max_bytes: Optional[int] = None  # stop reading after this many bytes of text
    dedup: Any = "minhash"  # none, exact, minhash, fineweb; false: none, true: minhash
    minhash: MinHashConfig = field(default_factory=MinHashConfig)
    keep: str = "first"  # of documents that are alike: first, longest, source (corpus.priority)
    priority: list[str] = field(default_factory=list)  # entries of corpus.input, the ones to keep first; the others follow
    spans: str = "none"  # none, line, paragraph: pieces that came before, anywhere, are cut out of a document
    span_chars: int = 60  # shorter pieces are left
    decontaminate: list[str] = field(default_factory=list)  # evaluation sets: files as in corpus.input
    decontaminate_keys: list[str] = field(default_factory=lambda: ["text"])  # their fields
    decontaminate_ngram: int = 13  # words in a row that a document and an evaluation text must share (GPT-3, arXiv 2005.14165)
    tokenizer: str = "sentencepiece_bpe"  # an entry to train, or the path of a .model / .json file to use
    vocab_size: int = 8192
    tokenizer_bytes: int = 20_000_000  # text that the tokenizer is trained on, spread evenly over the corpus
    encoder: str = "auto"  # auto: the fastest that agrees with the tokenizer's library on a sample of this corpus
    valid_fraction: float = 0.02
    split: str = "document"  # document: by hash of the text; tail: the last part of the text, as nanoGPT does
    seed: int = 1234  # order of the documents on disk
    engine: str = "local"  # local: processes here; slurm: a job array; ray: a Ray cluster
    workers: Optional[int] = None  # tasks at a time; None: one per core here, 64 in a job array
    shard_mb: int = 64  # text per task: bounds the memory of a worker at about 10 times this


@dataclass(frozen=True)
class MinHashSettings:
    """`corpus.minhash` over its preset."""

    bands: int
    rows: int
    ngram: int
    threshold: float
    seed: int
    partners: int


def dedup_name(c: CorpusConfig) -> str:
    return {True: "minhash", False: "none", None: "none"}.get(c.dedup, c.dedup)  # type: ignore[arg-type]


def minhash_settings(c: CorpusConfig) -> MinHashSettings | None:
    """The settings in force, or None without near-deduplication."""
    preset = PRESETS.get(dedup_name(c))
    if preset is None:
        return None
    given = {name: value for name, value in asdict(c.minhash).items() if value is not None}
    return MinHashSettings(**{f.name: ({**preset, **given})[f.name] for f in fields(MinHashSettings)})


def check_corpus(c: CorpusConfig) -> None:
    choice("corpus.split", c.split, ("document", "tail"))
    choice("corpus.dedup", dedup_name(c), DEDUP)
    choice("corpus.keep", c.keep, KEEP)
    choice("corpus.on_bad", c.on_bad, BAD)
    choice("corpus.spans", c.spans, ("none", "line", "paragraph"))
    choice("corpus.engine", c.engine, registry.names("corpus_engine"))
    choice("corpus.encoder", c.encoder, ["auto", *registry.names("encoder")])
    for name in c.clean:
        choice("corpus.clean", name, registry.names("cleaner"))
    for name in c.options:
        choice("corpus.options", name, c.clean)
    if not 0 <= c.valid_fraction < 1:
        raise UserError(f"corpus.valid_fraction={c.valid_fraction} must be in [0, 1)")
    for name, least in (("vocab_size", 2), ("shard_mb", 1), ("workers", 1), ("decontaminate_ngram", 1), ("max_record_mb", 1),
                        ("span_chars", 1), ("tokenizer_bytes", 1), ("max_bytes", 1)):  # fmt: skip
        value = getattr(c, name)
        if value is not None and value < least:
            raise UserError(f"corpus.{name}={value} must be at least {least}")
    _check_unread(c)
    if (c.keep == "source") != bool(c.priority):
        raise UserError(f"corpus.keep={c.keep} with corpus.priority={c.priority}: keep=source needs the priority, nothing else "
                        "reads it; give both or neither")  # fmt: skip
    if not str(c.tokenizer).endswith((".model", ".json")):
        choice("corpus.tokenizer", c.tokenizer, [*registry.names("tokenizer_trainer"), "PATH.model", "PATH.json"])
    _check_minhash(c)


def _check_unread(c: CorpusConfig) -> None:
    """Refuse a setting that nothing reads."""
    evaluated = ("no corpus.decontaminate", bool(c.decontaminate))
    readers = {
        "min_chars": ("corpus.clean without length", "length" in c.clean),
        "keep": ("corpus.dedup=none", dedup_name(c) != "none"),
        "span_chars": ("corpus.spans=none", c.spans != "none"),
        "decontaminate_keys": evaluated,
        "decontaminate_ngram": evaluated,
    }
    plain = CorpusConfig()
    for name, (why, read) in readers.items():
        if not read and getattr(c, name) != getattr(plain, name):
            raise UserError(f"corpus.{name}={getattr(c, name)} is given and nothing reads it with {why}; leave one of them out")


def _check_minhash(c: CorpusConfig) -> None:
    settings = minhash_settings(c)
    if settings is None:
        if c.minhash != MinHashConfig():
            raise UserError(
                f"corpus.minhash is given and corpus.dedup={dedup_name(c)} does not read it; allowed: {', '.join(PRESETS)}"
            )
        return
    for name in ("bands", "rows", "ngram", "partners"):
        if getattr(settings, name) < 1:
            raise UserError(f"corpus.minhash.{name}={getattr(settings, name)} must be at least 1")
    if settings.bands * settings.rows > 4096:
        raise UserError(f"corpus.minhash.bands={settings.bands} x rows={settings.rows} are {settings.bands * settings.rows} hash "
                        "functions; allowed: up to 4096; RefinedWeb's 9,000 cost 80 times FineWeb's 112")  # fmt: skip
    given = c.minhash.signatures
    if given and (c.minhash.export or c.minhash.seed != MinHashConfig.seed):
        other = f"export={c.minhash.export}" if c.minhash.export else f"seed={c.minhash.seed}"
        raise UserError(f"corpus.minhash.{other} with corpus.minhash.signatures={given}: no signatures are made; leave one out")
    if given and not Path(given).is_dir():
        raise UserError(f"corpus.minhash.signatures={given} is no folder; give that of datatrove's MinhashDedupSignature")
    if not 0 <= settings.threshold <= 1:
        raise UserError(f"corpus.minhash.threshold={settings.threshold} must be in [0, 1]")
