"""Near-deduplication of whole corpora against brute force: who goes, in favour of whom, at which similarity."""

from __future__ import annotations

import json
import os
import random
import resource
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_scratch.config.corpus import CorpusConfig, MinHashConfig
from megatron_scratch.corpus import prepare
from megatron_scratch.corpus.dedup import minhash
from megatron_scratch.corpus.dedup.removals import find, kept_mask, removals
from megatron_scratch.corpus.dedup.signatures import MinHash
from megatron_scratch.corpus.stages import Outputs
from megatron_scratch.corpus.store import ShardWriter, Store
from megatron_scratch.data.sidecar import Sidecar
from megatron_scratch.util.files import sha256_file

SHARES = (0.0, 0.01, 0.02, 0.03, 0.05, 0.08)  # of the words of a copy that are changed; five shingles go with each


def corpus(seed: int, families: int = 40) -> list[str]:
    """Families of texts that were copied from any earlier one of the family, so that chains of similar pairs arise."""
    rng = random.Random(seed)
    vocabulary = [f"word{i}" for i in range(500)]
    texts = []
    for _ in range(families):
        family = [rng.choices(vocabulary, k=rng.randint(40, 300))]
        for _ in range(rng.randrange(7)):
            words, share = list(rng.choice(family)), rng.choice(SHARES)
            for i in rng.sample(range(len(words)), int(share * len(words))):
                words[i] = rng.choice(vocabulary)
            if rng.random() < 0.3:
                words += rng.choices(vocabulary, k=rng.randint(1, len(words) // 10 + 1))
            family.append(words)
        texts += [rng.choice(["", "\n", "## "]) + rng.choice([" ", "\n", ", "]).join(words) for words in family]
    rng.shuffle(texts)
    return texts


def shingles(text: str) -> set[tuple[str, ...]]:
    words = text.replace("#", " ").replace(",", " ").lower().split()
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


def similarity(a: set[Any], b: set[Any]) -> float:
    return len(a & b) / len(a | b)


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def removed(cfg: CorpusConfig, texts: list[str]) -> tuple[dict[int, tuple[int, float]], dict[str, Any]]:
    """(document that went -> (the one in its favour, their recorded similarity), the manifest). Documents by their place."""
    manifest = prepare(cfg)
    at, place = {}, 0
    for i, text in enumerate(texts):
        at[place] = i
        place += len(json.dumps({"text": text})) + 1
    lines = [json.loads(line) for line in (Path(cfg.output) / "removed.jsonl").read_text().splitlines()]
    return {at[x["place"]]: (at[x["of"]["place"]], x["similarity"]) for x in lines}, manifest


def settings(source: Path, output: Path, **changes: Any) -> CorpusConfig:
    return CorpusConfig(input=str(source), output=str(output), tokenizer="byte", valid_fraction=0.0, clean=[], **changes)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_every_removal_is_right_and_none_is_missing(tmp_path: Path, seed: int) -> None:
    """28 bands of 4 miss a pair of J >= 0.8 once in 5 million, so against brute force nothing differs."""
    texts = corpus(seed)
    gone, manifest = removed(settings(write(tmp_path / "x.jsonl", texts), tmp_path / "out"), texts)
    sets = [shingles(text) for text in texts]
    for document, (kept, told) in gone.items():
        assert kept not in gone and kept < document, "went in favour of one that went, or that came later"
        assert told == round(similarity(sets[document], sets[kept]), 6) and told >= 0.8
    stay = [i for i in range(len(texts)) if i not in gone]
    assert not [(a, b) for a, b in combinations(stay, 2) if similarity(sets[a], sets[b]) >= 0.8]
    greedy = {}  # the rule itself: in order, gone if one that stays is similar, in favour of the most similar
    for i in range(len(texts)):
        near = [(similarity(sets[i], sets[k]), -k) for k in range(i) if k not in greedy]
        if near and max(near)[0] >= 0.8:
            greedy[i] = -max(near)[1]
    assert {document: kept for document, (kept, _) in gone.items()} == greedy
    assert manifest["splits"]["train"]["documents"] == len(stay)
    copies = Sidecar(tmp_path / "out" / "train").columns
    assert dict(zip(copies["document"].tolist(), copies["copies"].tolist(), strict=True)) == {
        i: sum(kept == i for kept, _ in gone.values()) for i in stay
    }


def test_a_shared_band_is_enough_for_the_preset_of_fineweb(tmp_path: Path) -> None:
    texts = corpus(4)
    gone, manifest = removed(settings(write(tmp_path / "x.jsonl", texts), tmp_path / "out", dedup="fineweb"), texts)
    told = manifest["stages"]["check"]
    assert told["candidates"] == told["compared"] == told["confirmed"] >= len(gone) > 0  # nothing is checked away
    assert min(similarity for _, similarity in gone.values()) < 0.8  # which is what the check is for


@pytest.mark.parametrize("keep", ["longest", "source"])
def test_who_is_kept(tmp_path: Path, keep: str) -> None:
    texts = corpus(5, 25)
    half = len(texts) // 2
    paths = [write(tmp_path / "a.jsonl", texts[:half]), write(tmp_path / "b.jsonl", texts[half:])]
    cfg = settings(tmp_path, tmp_path / "out", keep=keep, priority=[str(paths[1])] if keep == "source" else [])
    cfg.input = [str(path) for path in paths]
    prepare(cfg)
    wanted = sorted(range(len(texts)), key=lambda i: (-len(texts[i].encode()), i) if keep == "longest" else (i < half, i))
    sets, greedy = [shingles(text) for text in texts], set()
    for at, i in enumerate(wanted):
        if any(k not in greedy and similarity(sets[i], sets[k]) >= 0.8 for k in wanted[:at]):
            greedy.add(i)
    assert sorted(Sidecar(tmp_path / "out" / "train").columns["document"]) == [i for i in range(len(texts)) if i not in greedy]


def test_the_same_bytes_from_any_number_of_shards_and_workers(tmp_path: Path) -> None:
    rng = random.Random(6)
    texts = [text + " " + " ".join(rng.choices(text.split(), k=1500)) for text in corpus(6, 60)] + corpus(7, 5) * 2
    source = write(tmp_path / "x.jsonl", texts)
    assert source.stat().st_size > 2 << 20
    outputs = [tmp_path / "one", tmp_path / "many"]
    for output, how in zip(outputs, ({"workers": 1}, {"workers": 2, "shard_mb": 1}), strict=True):
        prepare(settings(source, output, spans="line", keep="longest", **how))
    files = [{str(p.relative_to(o)): sha256_file(p) for p in o.rglob("*") if p.is_file() and p.name not in (".lock", "report.html")}
             for o in outputs]  # fmt: skip
    assert files[0] == files[1] and len(files[0]) > 8


def test_a_large_bucket_costs_partners_pairs_each(tmp_path: Path) -> None:
    """One text 200 times with another last word: 199 go in favour of the first, from 8 pairs each and not 19,900."""
    texts = [" ".join(f"w{i}" for i in range(100)) + f" end{k}" for k in range(200)]
    cfg = settings(write(tmp_path / "x.jsonl", texts), tmp_path / "out", minhash=MinHashConfig(partners=8))
    gone, manifest = removed(cfg, texts)
    assert {kept for kept, _ in gone.values()} == {0} and len(gone) == 199
    assert manifest["stages"]["check"]["candidates"] <= 199 * 28 * 8


def _many_shards(folder: Path, shards: int) -> None:
    """Deduplicate in a process that may open 600 files; 1,024 are usual, and a corpus has more shards than that."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (600, 600))
    monkey = pytest.MonkeyPatch()  # a process of its own
    monkey.setattr(os, "fsync", lambda fd: None)  # 4,000 small files
    reading, signing = Outputs(folder / "read", 0), MinHash(4, 2, 3, 1)
    text = b"one two three four five six seven"
    for s in range(shards):
        with ShardWriter(reading, s) as writer:
            writer.add(text, (0, s, 0, len(text), 0, 0))
    store = Store([str(reading.path(str(s))) for s in range(shards)], [1] * shards).spec()
    kind = {"bands": 4, "rows": 2, "ngram": 3, "seed": 1}
    stems = []
    for s in range(shards):
        outputs = Outputs(folder / "sign", s)
        minhash.sign(outputs, store, s, [], kind)
        stems.append(str(outputs.path("")).removesuffix("."))
    pairs = Outputs(folder / "pair", 0)
    minhash.pair(pairs, store, stems, [[band, 0, 1 << 40] for band in range(signing.bands)], 1, "first", [])
    checked = Outputs(folder / "check", 0)
    told = minhash.check(checked, store, stems, [str(pairs.path("0.pairs.npy"))], 0, (1 << 64) - 1, kind, 0.8)
    assert told["confirmed"] == shards - 1, told
    for s in range(shards):
        Outputs(folder / "gone", s).save("removed.npy", removals(np.array([s]), np.array([0]), 1.0))
    gone = [str(Outputs(folder / "gone", s).path("removed.npy")) for s in range(shards)]
    assert not kept_mask(gone, 0, shards).any() and len(find(gone, np.arange(shards))[0]) == shards


def test_more_shards_than_files_that_may_be_open(tmp_path: Path) -> None:
    for name in ("read", "sign", "pair", "check", "gone"):
        (tmp_path / name).mkdir()
    process = get_context("fork").Process(target=_many_shards, args=(tmp_path, 700))
    process.start()
    process.join()
    assert process.exitcode == 0
