"""The stages of a preparation and what each hands to the next. Asking for a stage runs what it needs and is not there yet.

    read -> exact -> sign -> pair -> check -> star -> spans -> contaminated -> (tokenizer) -> encode -> parts
                                                                           `-> listed, copies

A stage's key is a hash of its settings and of what the stages before it wrote, so a change touches what depends on it alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from megatron_scratch.config.corpus import CorpusConfig, MinHashSettings, dedup_name, minhash_settings
from megatron_scratch.corpus import export, read
from megatron_scratch.corpus.clean import build_cleaners, files_of
from megatron_scratch.corpus.dedup import exact, minhash
from megatron_scratch.corpus.dedup.removals import kept_mask, removal_files
from megatron_scratch.corpus.dedup.signatures import MinHash
from megatron_scratch.corpus.sources import SourceFile
from megatron_scratch.corpus.stages import STAGE, Done, Engine, Stage, execute, hash_of
from megatron_scratch.corpus.store import Store
from megatron_scratch.corpus.write import listing, parts
from megatron_scratch.corpus.write.encode import Deal
from megatron_scratch.data.tokenizer import load_tokenizer
from megatron_scratch.util.errors import UserError

FORMAT = 2
Say = Callable[[str], Any]
Tasks = list[dict[str, Any]]


class Graph:
    """One preparation under `work`. Each property is a finished stage (`Done`), None where the settings leave it out."""

    def __init__(self, cfg: CorpusConfig, files: list[SourceFile], work: Path, engine: Engine, plugins: list[str], say: Say):
        self.cfg, self.files, self.work, self.engine, self.plugins, self.say = cfg, files, work, engine, plugins, say
        self.ran: dict[str, Done] = {}  # for the report

    def _run(self, name: str, function: str, tasks: Tasks, key: list[Any], **common: Any) -> Done:
        """key: the stages that came before (`Done` or None) and settings that are in no task."""
        parts = [part.digest if isinstance(part, Done) else part for part in key]
        stage = Stage(name, function, tasks, common, hash_of(FORMAT, name, parts), self.plugins)
        self.ran[name] = execute(self.work, stage, self.engine, self.say)
        return self.ran[name]

    # reading and cleaning

    @cached_property
    def read(self) -> Done:
        c = self.cfg
        common = read.settings(c)
        cleaners = build_cleaners(common["clean"], common["options"])
        done = self._run("read", "read:run", read.tasks(c, self.files), [common, files_of(cleaners)], **common)
        if not done.total("documents"):
            raise UserError(f"corpus.input={c.input} gives no document ({read.why(done)}); give text, or .jsonl with the field "
                            f"{c.text_key!r}")  # fmt: skip
        return done

    @cached_property
    def lines_before(self) -> dict[tuple[str, int], int]:
        """(file, first byte of a range) -> lines of the file before it."""
        before: dict[tuple[str, int], int] = {}
        counted: dict[str, int] = {}
        for task, told in zip(json.loads((self.read.folder / STAGE).read_text("utf-8"))["tasks"], self.read.results, strict=True):
            for piece, lines in zip(task["ranges"], told["lines"], strict=False):
                before[piece["name"], piece["begin"]] = counted.get(piece["name"], 0)
                counted[piece["name"]] = counted.get(piece["name"], 0) + lines
        return before

    @cached_property
    def documents(self) -> Store:
        """All documents as they were read."""
        return Store.of_stage(self.read)

    # duplicates

    @cached_property
    def _rule(self) -> dict[str, Any]:
        """The keep rule, as tasks take it: priority of each source file by its entry's place in corpus.priority."""
        places = {entry: i for i, entry in enumerate(self.cfg.priority)}
        return {"keep": self.cfg.keep, "priority": [places.get(f.entry, len(places)) for f in self.files] if places else []}

    @cached_property
    def exact(self) -> Done | None:
        if dedup_name(self.cfg) == "none":
            return None
        tasks = exact.tasks(self.documents)
        return self._run("exact", "dedup.exact:run", tasks, [self.read, self._rule], store=self.documents.spec(), **self._rule)

    @cached_property
    def _near(self) -> MinHashSettings | None:
        return minhash_settings(self.cfg)

    @cached_property
    def _kind(self) -> MinHash:
        assert self._near is not None
        return MinHash(self._near.bands, self._near.rows, self._near.ngram, self._near.seed)

    @cached_property
    def signed(self) -> Done | None:
        if self._near is None:
            return None
        common = {"store": self.documents.spec(), "removed": removal_files(self.exact), "kind": asdict(self._kind)}
        key = [self.read, self.exact, asdict(self._kind)]
        if self.cfg.minhash.signatures:
            from megatron_scratch.corpus.dedup import datatrove

            tasks, told = datatrove.read_tasks(self.cfg.minhash.signatures, self.read, self.numbered, self._kind)
            return self._run("sign", "dedup.datatrove:read", tasks, [*key, told], **common, files=told)
        return self._run("sign", "dedup.minhash:sign", self.documents.tasks(), key, **common)

    @cached_property
    def numbered(self) -> Done:
        """How datatrove's reader numbers the documents."""
        from megatron_scratch.corpus.dedup import datatrove

        return self._run("numbered", "dedup.datatrove:number", datatrove.number_tasks(self.read), [self.read])

    @cached_property
    def exported(self) -> Done | None:
        """The signatures as datatrove's files."""
        if self.signed is None or not self.cfg.minhash.export:
            return None
        from megatron_scratch.corpus.dedup import datatrove_export

        tasks = datatrove_export.tasks(len(self.files), self.read, self.numbered)
        common = {"store": self.documents.spec(), "signed": self.signed.stems, "copies": removal_files(self.exact)}
        key = [self.signed, self.exact]
        done = self._run("export", "dedup.datatrove_export:run", tasks, key, kind=asdict(self._kind), **common)
        datatrove_export.publish(done, self.cfg.minhash.export)
        return done

    @cached_property
    def paired(self) -> Done | None:
        if self._near is None or self.signed is None:
            return None
        common = {"store": self.documents.spec(), "signed": self.signed.stems, "partners": self._near.partners}
        return self._run("pair", "dedup.minhash:pair", minhash.pair_tasks(self.signed, self._kind),
                         [self.signed, self._near.partners, self._rule], **common, **self._rule)  # fmt: skip

    @cached_property
    def checked(self) -> Done | None:
        if self._near is None or self.signed is None or self.paired is None:
            return None
        common = {"store": self.documents.spec(), "signed": self.signed.stems, "runs": minhash.runs(self.paired),
                  "kind": asdict(self._kind), "threshold": self._near.threshold}  # fmt: skip
        tasks = minhash.check_tasks(self.paired)
        return self._run("check", "dedup.minhash:check", tasks, [self.paired, self._near.threshold], **common)

    @cached_property
    def star(self) -> Done | None:
        if self.checked is None:
            return None
        stems = self.checked.stems
        return self._run("star", "dedup.minhash:star", [{"documents": self.documents.documents}], [self.checked], confirmed=stems)

    # repeated pieces

    @cached_property
    def spans(self) -> Done | None:
        """New text for every shard, where pieces that came before are cut out; documents left empty are in `removed.npy`."""
        c = self.cfg
        if c.spans == "none":
            return None
        from megatron_scratch.corpus.dedup import spans

        common = {"store": self.documents.spec(), "removed": removal_files(self.exact, self.star), "kind": c.spans}
        found = self._run("span_hashes", "dedup.spans:hashes", self.documents.tasks(),
                          [self.read, self.exact, self.star, c.spans, c.span_chars], least=c.span_chars, **common)  # fmt: skip
        copied = self._run("span_copies", "dedup.spans:copies", spans.copy_tasks(found), [found], hashed=found.paths("pieces.npy"))
        return self._run("spans", "dedup.spans:cut", self.documents.tasks(), [copied], copied=copied.paths("copies.npy"), **common)

    @cached_property
    def text(self) -> Store:
        """The text that the later stages read."""
        return self.documents if self.spans is None else Store.of_stage(self.spans)

    # contamination

    @cached_property
    def evaluations(self) -> Done | None:
        """The n-grams of the evaluation sets."""
        if not self.cfg.decontaminate:
            return None
        from megatron_scratch.corpus import decontaminate

        return self._run("evaluations", "decontaminate:collect", decontaminate.collect_tasks(self.cfg), [])

    @cached_property
    def contaminated(self) -> Done | None:
        found = self.evaluations
        if found is None:
            return None
        key = [found, self.read, self.exact, self.star, self.spans]
        return self._run("contaminated", "decontaminate:find", self.text.tasks(), key,
                         store=self.text.spec(), removed=removal_files(self.exact, self.star, self.spans),
                         lengths=found.results[0]["lengths"], grams=found.path(0, ""))  # fmt: skip

    # what is left

    @cached_property
    def removed(self) -> list[str]:
        """Files of all removals."""
        return removal_files(self.exact, self.star, self.spans, self.contaminated)

    @cached_property
    def left_key(self) -> str:
        stages = (self.read, self.exact, self.star, self.spans, self.contaminated)
        return hash_of([done and done.digest for done in stages])

    @cached_property
    def left(self) -> list[dict[str, int]]:
        """What is left of each shard: documents, characters, bytes; the least and the greatest first half of their hashes."""
        told = []
        for s in range(len(self.text.stems)):
            shard = self.text.shard(s)
            keep = kept_mask(self.removed, shard.base, shard.base + len(shard))
            half = shard.rows["hash_high"][keep]
            told.append({"documents": int(keep.sum()), "characters": int(shard.rows["chars"][keep].sum(dtype=np.int64)),
                         "bytes": int(np.diff(shard.starts)[keep].sum()), "least": int(half.min(initial=np.iinfo(np.uint64).max)),
                         "most": int(half.max(initial=0))})  # fmt: skip
        return told

    def left_total(self, name: str) -> int:
        return sum(told[name] for told in self.left)

    # tokens

    def encoded(self, tokenizer: str, encoder: str, deal: Deal) -> Done:
        """Every shard as ids. tokenizer: its file, whose content is part of the key."""
        firsts = accumulate((told["documents"] for told in self.left), initial=0)
        chars = accumulate((told["characters"] for told in self.left), initial=0)
        tasks = [{"shard": s, "first": first, "first_char": char}
                 for s, (first, char) in enumerate(zip(firsts, chars, strict=True)) if s < len(self.left)]  # fmt: skip
        key = [self.left_key, load_tokenizer(tokenizer).sha256, encoder, asdict(deal)]
        return self._run("encode", "write.encode:run", tasks, key, store=self.text.spec(), removed=self.removed, deal=asdict(deal),
                         tokenizer=tokenizer, encoder=encoder)  # fmt: skip

    @cached_property
    def copies(self) -> Done | None:
        """How many documents went in favour of each."""
        if not self.removed:
            return None
        task = {"documents": self.text.documents}
        return self._run("copies", "write.listing:copies", [task], [self.left_key], removed=self.removed)

    @cached_property
    def _removals(self) -> dict[str, list[str]]:
        stages = {listing.EXACT: self.exact, listing.NEAR: self.star, "nothing new": self.spans, "contaminated": self.contaminated}
        return {why: removal_files(done) for why, done in stages.items()}

    @cached_property
    def counted(self) -> Done:
        """What each step removed of each shard, and what is left of it, for the report."""
        return self._run("counted", "counts:run", self.documents.tasks(), [self.left_key], store=self.documents.spec(),
                         text=self.text.spec(), removed=self._removals)  # fmt: skip

    @cached_property
    def listed(self) -> Done:
        """Every document that was left out, with the reason, as lines of JSON."""
        ends = list(accumulate((len(told["shards"]) for told in self.read.results), initial=0))
        tasks = [{"first": first, "end": end, "drops": self.read.path(i, "drops")}
                 for i, (first, end) in enumerate(zip(ends[:-1], ends[1:], strict=True))]  # fmt: skip
        return self._run("listed", "write.listing:run", tasks, [self.left_key], store=self.documents.spec(),
                         removed=self._removals, sources=[file.name for file in self.files],
                         evaluations=self.evaluations.results[0]["names"] if self.evaluations else [])  # fmt: skip

    def written(self, suffix: str) -> Done:
        """What is left as files of text."""
        return self._run("documents", "export:run", export.tasks(self), [self.left_key, suffix], store=self.text.spec(),
                         removed=self.removed, sources=[file.name for file in self.files], suffix=suffix)  # fmt: skip

    def parts(self, encoded: Done, side: str, split: str, dtype: np.dtype) -> Done:
        copies = None if self.copies is None else self.copies.path(0, "copies.npy")
        tasks = parts.tasks(encoded, side, split, dtype.itemsize)
        return self._run(f"parts_{side}", "write.parts:run", tasks, [encoded, self.copies], store=self.text.spec(),
                         encoded=encoded.paths(side), dtype=dtype.str, copies=copies)  # fmt: skip
