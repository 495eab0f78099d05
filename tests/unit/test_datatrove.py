"""datatrove's signature files against datatrove itself: its later stages on ours, ours on its own."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_scratch.config.corpus import CorpusConfig, MinHashConfig
from megatron_scratch.corpus.dedup.datatrove import record
from megatron_scratch.corpus.dedup.order import number_of
from megatron_scratch.corpus.engines.local import Local
from megatron_scratch.corpus.graph import Graph
from megatron_scratch.corpus.pipeline import prepare
from megatron_scratch.corpus.sources import find_files
from megatron_scratch.util.errors import UserError

BANDS, ROWS = 14, 8


def test_the_size_of_a_record() -> None:
    assert record(64, 8).itemsize == 8 * 8 + 4 and record(32, 4).itemsize == 4 * 4 + 4


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files of documents, some of them edits or copies of others, with lines that only one reader, or none, takes for one.
    The second is read by two tasks: a word of 1.1 MB is in its middle."""
    rng = random.Random(7)
    vocabulary = ["".join(rng.choices("abcdefghijkl", k=rng.randint(2, 9))) for _ in range(800)]
    folder = tmp_path_factory.mktemp("source")
    texts: list[str] = []
    for _ in range(240):
        words = rng.choice(texts).split() if texts and rng.random() < 0.5 else rng.choices(vocabulary, k=rng.randint(30, 200))
        for _ in range(rng.choice([0, 0, 1, 2, 4, 8])):
            words[rng.randrange(len(words))] = rng.choice(vocabulary)
        texts.append(" ".join(words))
    for k in range(3):
        lines = [json.dumps({"text": text}) for text in texts[80 * k : 80 * k + 80]]
        odd = ["{oops", *(json.dumps(x) for x in ({"text": ""}, {"body": "no text"}, {"text": "   "}, {"text": "too short"},
               {"text": "\ud800 x"}, {"text": f"without a shingle {k}"}))]  # fmt: skip
        for line in odd:
            lines.insert(rng.randrange(len(lines)), line)
        if k == 1:
            lines.insert(40, json.dumps({"text": "z" * 1_100_000}))
        (folder / f"{k}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def config(source: Path, output: Path, **minhash: Any) -> CorpusConfig:
    return CorpusConfig(input=str(source), output=str(output), dedup="fineweb", minhash=MinHashConfig(**minhash), tokenizer="byte",
                        min_chars=12, shard_mb=1, workers=1)  # fmt: skip


def graph(cfg: CorpusConfig, work: Path) -> Graph:
    work.mkdir(parents=True, exist_ok=True)
    return Graph(cfg, find_files(cfg.input), work, Local(cfg, work, print, None), [], lambda line: None)  # type: ignore[arg-type]


Place = tuple[str, int]  # file, line


def places(g: Graph) -> list[Place]:
    """Where each document came from."""
    found = []
    for s in range(len(g.documents.stems)):
        for row in g.documents.shard(s).rows:
            raw = Path(g.files[row["source"]].url).read_bytes()
            found.append((Path(g.files[row["source"]].url).name, raw[: row["place"]].count(b"\n")))
    return found


def clusters(pairs: list[tuple[Place, Place]]) -> set[frozenset[Place]]:
    """The connected components of pairs."""
    of: dict[Place, set[Place]] = {}
    for a, b in pairs:
        joined = of.get(a, {a}) | of.get(b, {b})
        for place in joined:
            of[place] = joined
    return {frozenset(cluster) for cluster in of.values()}


def our_clusters(g: Graph) -> set[frozenset[Place]]:
    """Documents joined by a pair of ours, exact copies by their removal."""
    where, pairs = places(g), []
    for path in g.paired.paths("0.pairs.npy"):  # type: ignore[union-attr]
        if Path(path).exists():
            pairs += [(where[a], where[b]) for a, b in zip(*(number_of(x) for x in np.load(path)), strict=True)]
    for path in g.exact.paths("removed.npy"):  # type: ignore[union-attr]
        pairs += [(where[row["document"]], where[row["kept"]]) for row in np.load(path)]
    return clusters(pairs)


# without it


def bytes_of(output: Path) -> dict[str, bytes]:
    return {name: (output / name).read_bytes() for name in ("train.bin", "train.idx", "valid.bin", "removed.jsonl")}


@pytest.fixture(scope="module")
def exported(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output, and its signatures in a folder beside it."""
    folder = tmp_path_factory.mktemp("exported")
    prepare(config(source, folder / "out", export=str(folder / "signatures")))
    return folder


def test_a_round_trip(source: Path, exported: Path, tmp_path: Path) -> None:
    """Our signatures as datatrove's, taken for datatrove's: the same documents go, and the datasets are the same bytes."""
    files = sorted(p.relative_to(exported) for p in (exported / "signatures").rglob("*.minhash.sig"))
    assert [str(f) for f in files] == [f"signatures/bucket_{b:03d}/{r:05d}.minhash.sig" for b in range(BANDS) for r in range(3)]
    told = prepare(config(source, tmp_path / "out", signatures=str(exported / "signatures")))
    assert bytes_of(tmp_path / "out") == bytes_of(exported / "out")
    assert told["stages"]["star"]["removed"] > 20 and told["stages"]["exact"]["removed"] > 20


def test_records_are_sorted_as_numpy_sorts_records(exported: Path) -> None:
    """By the hashes from the first on, then by the number: what datatrove's heap of files relies on."""
    kind = np.dtype([(f"field{i}", "<u8") for i in range(ROWS)] + [("number", "<u4")])
    for path in sorted((exported / "signatures").rglob("*.minhash.sig")):
        records = np.fromfile(path, kind)
        assert len(records) > 70 and np.array_equal(records, np.sort(records, order=kind.names))


def broken(exported: Path, to: Path, how: str) -> Path:
    shutil.copytree(exported / "signatures", to)
    first = to / "bucket_000" / "00001.minhash.sig"
    if how == "a bucket is gone":
        shutil.rmtree(to / "bucket_013")
    elif how == "cut":
        first.write_bytes(first.read_bytes()[:-68])
    elif how == "a rank is gone":
        for path in to.rglob("00000.minhash.sig"):
            path.unlink()
    elif how == "not sorted":
        for path in to.rglob("0000?.minhash.sig"):
            path.write_bytes(np.fromfile(path, record(64, ROWS))[::-1].tobytes())
    elif how == "other documents":
        for path in to.rglob("00001.minhash.sig"):
            records = np.fromfile(path, record(64, ROWS))
            records["document"] += 50
            path.write_bytes(records.tobytes())
    return to


@pytest.mark.parametrize(("how", "words"), [("a bucket is gone", "13 folders"), ("cut", "number and size"), ("not sorted", "sort"),
                                            ("a rank is gone", "each rank"), ("other documents", "the same order")])  # fmt: skip
def test_signatures_that_are_not_whole(how: str, words: str, source: Path, exported: Path, tmp_path: Path) -> None:
    folder = broken(exported, tmp_path / "signatures", how)
    with pytest.raises(UserError, match=words):
        prepare(config(source, tmp_path / "out", signatures=str(folder)))


def test_other_settings_than_those_of_the_signatures(source: Path, exported: Path, tmp_path: Path) -> None:
    given = str(exported / "signatures")
    for more, words in (
        ({"bands": 7}, "14 folders"),
        ({"rows": 4}, "rows=4"),
        ({"seed": 3}, "seed=3"),
        ({"export": "x"}, "export=x"),
    ):
        with pytest.raises(UserError, match=words):
            prepare(config(source, tmp_path / "out", signatures=given, **more))
    with pytest.raises(UserError, match="is no folder"):
        prepare(config(source, tmp_path / "out", signatures="nowhere"))


# with it


@pytest.fixture
def theirs() -> Iterator[Any]:
    """datatrove's stages, run here."""
    pytest.importorskip("datatrove", reason="datatrove is not installed: pip install datatrove==0.10.1")
    pytest.importorskip("orjson", reason="datatrove's reader needs orjson")
    from datatrove.utils.logging import logger

    logger.remove()
    yield Theirs()


class Theirs:
    def reader(self, source: Path) -> Any:
        from datatrove.pipeline.readers import JsonlReader

        return JsonlReader(str(source), id_key="no such field")  # so an id is FILE/LINE

    def config(self, bits: int = 64) -> Any:
        from datatrove.pipeline.dedup.minhash import MinhashConfig
        from datatrove.utils.hashing import HashConfig

        return MinhashConfig(num_buckets=BANDS, hashes_per_bucket=ROWS, hash_config=HashConfig(precision=bits, hash_fc="sha1"))

    def sign(self, source: Path, folder: Path, ranks: int, bits: int = 64) -> None:
        """Its signatures, of words as ours: its own tokenizer is spaCy's, a package of 500 MB."""
        from datatrove.pipeline.dedup import minhash

        class Words:
            def word_tokenize(self, text: str) -> list[str]:
                return re.findall(r"\w+", text)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(minhash, "load_word_tokenizer", lambda language: Words())
            patch.setattr(minhash, "simplify_text", lambda text, config: text.lower())
            for rank in range(ranks):
                stage = minhash.MinhashDedupSignature(str(folder), self.config(bits))
                stage.run(self.reader(source).run(None, rank, ranks), rank, ranks)

    def cluster(self, signatures: Path, folder: Path, bits: int = 64) -> None:
        """Its buckets, two tasks for each, and its clusters."""
        from datatrove.pipeline.dedup.minhash import MinhashDedupBuckets, MinhashDedupCluster

        for rank in range(2 * BANDS):
            MinhashDedupBuckets(str(signatures), str(folder / "buckets"), config=self.config(bits)).run(None, rank, 2 * BANDS)
        MinhashDedupCluster(str(folder / "buckets"), str(folder / "remove"), self.config(bits), save_cluster_id=True).run(
            None, 0, 1
        )

    def clusters(self, source: Path, folder: Path, ranks: int) -> tuple[set[frozenset[Place]], set[Place]]:
        """(its clusters, the documents that its filter drops), by file and line."""
        from datatrove.pipeline.dedup.minhash import MinhashDedupFilter

        found: dict[int, set[Place]] = {}
        dropped: set[Place] = set()
        for rank in range(ranks):
            numbered = [self.place(document) for document in self.reader(source).run(None, rank, ranks)]
            file = folder / "remove" / f"{rank:06d}.clusters"
            for number, cluster in np.fromfile(file, "<u4").reshape(-1, 2).tolist() if file.exists() else []:
                found.setdefault(cluster, set()).add(numbered[number])
            left = MinhashDedupFilter(str(folder / "remove")).run(self.reader(source).run(None, rank, ranks), rank, ranks)
            dropped |= set(numbered) - {self.place(document) for document in left}
        return {frozenset(cluster) for cluster in found.values()}, dropped

    def place(self, document: Any) -> Place:
        file, _, line = document.id.rpartition("/")
        return Path(file).name, int(line)


def test_its_stages_on_our_signatures(theirs: Theirs, source: Path, tmp_path: Path) -> None:
    """Its clusters are those of our pairs, and its filter leaves one of each."""
    cfg = config(source, tmp_path / "out", export=str(tmp_path / "signatures"))
    g = graph(cfg, tmp_path / "work")
    ours = our_clusters(g)
    assert g.exported is not None and len(ours) > 20 and max(map(len, ours)) > 3
    theirs.cluster(tmp_path / "signatures", tmp_path)
    found, dropped = theirs.clusters(source, tmp_path, 3)
    assert found == ours and len(dropped) == sum(len(cluster) - 1 for cluster in ours)
    assert all(len(cluster - dropped) == 1 for cluster in ours)


@pytest.mark.parametrize(("ranks", "bits"), [(3, 64), (2, 64), (5, 32)])
def test_our_stages_on_its_signatures(ranks: int, bits: int, theirs: Theirs, source: Path, tmp_path: Path) -> None:
    """Ours pairs what its own buckets pair; with more ranks than files and with fewer; exact copies are ours to see."""
    theirs.sign(source, tmp_path / "signatures", ranks, bits)
    theirs.cluster(tmp_path / "signatures", tmp_path, bits)
    g = graph(config(source, tmp_path / "out", signatures=str(tmp_path / "signatures")), tmp_path / "work")
    ours = our_clusters(g)
    assert ours == theirs.clusters(source, tmp_path, ranks)[0] and len(ours) > 20
    assert len(g.documents.stems) == 2 and g.signed is not None and g.signed.total("signed") < g.documents.documents
