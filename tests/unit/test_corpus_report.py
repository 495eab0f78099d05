"""What a prepared folder tells about itself: the report, `data inspect`, `data verify`."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_scratch.cli import main
from megatron_scratch.config.corpus import CorpusConfig
from megatron_scratch.corpus import clock, inspect, pipeline, read, stages, verbs
from megatron_scratch.corpus.lengths import described, document_lengths
from megatron_scratch.corpus.report_page import page, read_report, whole
from megatron_scratch.corpus.verify import verify
from megatron_scratch.data import sidecar, writer
from megatron_scratch.data.dataset import GPTDataset
from megatron_scratch.data.indexed import IndexedDataset
from megatron_scratch.data.sidecar import Sidecar
from megatron_scratch.data.tokenizer import load_tokenizer
from megatron_scratch.data.writer import IndexedWriter
from megatron_scratch.util.errors import UserError
from megatron_scratch.util.sealed import changed, sealed, write_sealed

EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)></pre></details>\"'&amp;<!-- "
WORDS = "the quick brown fox jumps over a lazy dog while many small birds sing near old rivers".split()


def text(i: int, words: int = 40) -> str:
    return f"Number {i} " + " ".join(np.random.default_rng(i).choice(WORDS, size=words).tolist()) + " \u00e9.\n"


def lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path


LONG = text(900, 60)
FIRST = [*(text(i) for i in range(30)), text(4), text(4), LONG]  # two exact copies of document 4
SECOND = [LONG + "more", EVIL + text(500), EVIL, "tiny", text(4), *(text(i) for i in range(100, 120))]  # a near copy, two too short


def config(tmp_path: Path, output: str, **changes: Any) -> CorpusConfig:
    given = [str(lines(tmp_path / "a.jsonl", FIRST)), str(lines(tmp_path / "b.jsonl", SECOND))]
    plain = CorpusConfig(input=given, output=str(tmp_path / output), vocab_size=320, valid_fraction=0.1, min_chars=100, workers=1)
    return replace(plain, **changes)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    cfg = config(folder, "out")
    pipeline.prepare(cfg)
    return folder / "out"


def size(texts: list[str]) -> int:
    return sum(len(t.encode()) for t in texts)


def test_each_step_is_accounted_for(prepared: Path) -> None:
    report = read_report(prepared / "report.html")
    assert report is not None
    passed = [t for t in FIRST + SECOND if len(t) >= 100]
    unique = list(dict.fromkeys(passed))
    left = [t for t in unique if t != LONG + "more"]
    seen = {s["name"]: (s["documents_in"], s["documents_out"], s["bytes_in"], s["bytes_out"]) for s in report["steps"]}
    disk = sum((prepared.parent / f"{name}.jsonl").stat().st_size for name in "ab")
    assert seen["read"] == (len(FIRST + SECOND), len(passed), disk, size(passed))
    assert seen["exact"] == (len(passed), len(unique), size(passed), size(unique))
    assert seen["near"] == (len(unique), len(left), size(unique), size(left))
    assert seen["encode"] == (len(left), len(left), size(left), size(left))
    splits = report["splits"]
    assert (len(left), size(left)) == tuple(sum(splits[side][k] for side in ("train", "valid")) for k in ("documents", "bytes"))
    assert {s["input"][-7:]: (s["documents_left"], s["bytes_left"]) for s in report["sources"]} == {
        "a.jsonl": (31, size([t for t in left if t in FIRST])),
        "b.jsonl": (21, size([t for t in left if t not in FIRST])),
    }
    assert sum(b[2] for b in report["near"]["bins"]) == 1 and report["near"]["threshold"] == 0.8
    (pair,) = report["near"]["least"]
    assert pair["gone"]["head"] == LONG + "more" and pair["kept"]["head"] == LONG and 0.8 <= pair["similarity"] < 1
    assert report["copies"]["bins"] == [[2, 2, 1], [3, 4, 1]]  # the near copy's group, and the four copies of one text
    assert [(c["documents"], c["head"]) for c in report["copies"]["largest"]] == [(4, text(4)), (2, LONG)]
    assert {d["reason"]: (d["count"], d["step"]) for d in report["dropped"]} == {
        "shorter than 100 characters": (2, "read and clean"),
        "exact copy": (3, "exact copies"),
        "near copy": (1, "near copies"),
    }
    tokens = sum(told["documents"] for told in report["lengths"].values())
    assert tokens == len(left) and sum(b[2] for b in report["lengths"]["train, tokens"]["bins"]) == splits["train"]["documents"]
    assert all(s["seconds"] >= 0 and s["cpu_seconds"] >= 0 for s in report["steps"]) and report["total"]["cpu_seconds"] > 0
    assert max(s["seconds"] for s in report["steps"]) <= report["total"]["seconds"]


def test_repeated_pieces_and_evaluation_sets_are_accounted_for(tmp_path: Path) -> None:
    menu = "This menu stands at the beginning of every page of the site, again and again and again.\n\n"
    held = " ".join(f"question{i}" for i in range(20))
    texts = [menu + text(i) for i in range(10)] + [menu, text(50) + held, menu + text(3)]
    given, asked = lines(tmp_path / "x.jsonl", texts), lines(tmp_path / "eval.jsonl", [held])
    verbs.dedup(
        CorpusConfig(input=str(given), output=str(tmp_path / "out"), spans="paragraph", decontaminate=[str(asked)], workers=1)
    )
    report = read_report(tmp_path / "out" / "report.html")
    assert report is not None
    seen = {s["name"]: (s["documents_in"], s["documents_out"], s["bytes_out"]) for s in report["steps"]}
    unique = size(texts[:-1])
    cut = unique - 10 * len(menu)
    assert seen["exact"] == (13, 12, unique) and seen["spans"] == (12, 11, cut)
    assert seen["contaminated"] == (11, 10, cut - size(texts[-2:-1]))
    assert report["lengths"]["characters"]["documents"] == 10 and report["tokenizer"] is None
    assert '"characters"' in (tmp_path / "out" / "report.html").read_text()


def test_the_numbers_do_not_depend_on_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the least alike are not the first
    near = [text(i, 60) + " more" * k for i, k in ((700, 1), (701, 4), (702, 2), (703, 8), (704, 3))]
    given = lines(tmp_path / "c.jsonl", [*(text(i, 60) for i in range(700, 705)), *near])
    cfg = replace(config(tmp_path, "one"), input=[str(tmp_path / "a.jsonl"), str(given)])
    verbs.dedup(cfg)
    real = read.settings
    monkeypatch.setattr(read, "settings", lambda c: real(c) | {"shard": 1000})
    verbs.dedup(replace(cfg, output=str(tmp_path / "many")))
    found = []
    for name in ("one", "many"):
        report = read_report(tmp_path / name / "report.html")
        assert report is not None
        report = {k: v for k, v in report.items() if k not in ("total", "output", "finished")}
        report["steps"] = [{k: v for k, v in s.items() if k not in ("seconds", "cpu_seconds", "tasks")} for s in report["steps"]]
        found.append(report)
    assert found[0] == found[1] and [p["gone"]["head"] for p in found[0]["near"]["least"]] == [near[3], near[1], near[4]]


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: Counter[str] = Counter()
        self.attributes: set[str] = set()
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found[tag] += 1
        self.attributes |= {name for name, _ in attrs}
        if tag not in ("meta", "br", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag != "rect":
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_text_of_documents_stays_text(prepared: Path) -> None:
    """A document, a name of a file and a reason that are markup."""
    raw = (prepared / "report.html").read_text("utf-8")
    report = read_report(prepared / "report.html")
    assert report is not None and any(EVIL in head for d in report["dropped"] for _, head in d["samples"])
    report["sources"][0]["input"] = report["output"] = report["dropped"][0]["reason"] = EVIL
    report["near"]["least"][0]["gone"] = {"place": EVIL, "head": EVIL}
    report["tokenizer"]["encoders_passed_over"] = {EVIL: EVIL}
    before = json.dumps(report)
    for content, least in ((raw, 1), (page(report), 6)):
        tags = Tags()
        tags.feed(content)
        assert tags.open == [] and tags.found["script"] == 1 and not {"img", "iframe", "link", "object"} & set(tags.found)
        assert not [name for name in tags.attributes if name.startswith("on") or name in ("src", "href")]
        assert "".join(tags.text).count(EVIL) >= least
    assert json.loads(re.search(r'id="report">(.*?)</script>', page(report), re.DOTALL)[1]) == json.loads(before)  # type: ignore[index]
    assert json.dumps(report) == before  # the manifest shares its parts


def test_the_page_needs_nothing_from_elsewhere(prepared: Path) -> None:
    content = (prepared / "report.html").read_text("utf-8")
    assert not re.search(r"https?:|url\(|@import|//cdn|<link", content) and "prefers-color-scheme:dark" in content
    assert whole(prepared / "report.html") and "report.html" not in json.loads((prepared / "manifest.json").read_text())["files"]


def test_a_page_of_nothing_dropped(tmp_path: Path) -> None:
    given = lines(tmp_path / "x.jsonl", [text(i) for i in range(4)])
    verbs.clean(CorpusConfig(input=str(given), output=str(tmp_path / "out"), workers=1))
    report = read_report(tmp_path / "out" / "report.html")
    assert report is not None and report["near"] is None and report["copies"] is None and report["dropped"] == []


def test_costs_are_beside_the_results(tmp_path: Path) -> None:
    """What tasks took is in their markers, and changes no digest; times beside each other count once, pauses not at all."""
    stage = stages.Stage("read", "counts:run", [{"x": 1}], {}, "key")
    for folder, seconds in (("a", 1.0), ("b", 2.0)):
        (tmp_path / folder / "read").mkdir(parents=True)
        marker = {"key": "key", "args": {"x": 1}, "result": {"n": 1}, "files": {}, "spent": [0.0, seconds, seconds]}
        (tmp_path / folder / "read" / "00000.done").write_text(json.dumps(marker))
        (tmp_path / folder / "read" / "stage.json").write_text(json.dumps(stage.__dict__))
    done = [stages.execute(tmp_path / folder, stage, None, print) for folder in "ab"]  # type: ignore[arg-type]
    assert done[0].digest == done[1].digest
    assert clock.wall([[10, 5, 1], [12, 1, 1], [14, 3, 1], [100, 2, 9]]) == 9.0 and clock.wall([]) == 0.0
    with clock.clocked(tmp_path, "x"):
        sum(range(200_000))
    ((began, wall, cpu),) = clock.noted(tmp_path)["x"]
    assert began > 1e9 and wall > 0 and 0 < cpu


# inspect


def test_inspect_tells_what_is_there_and_what_went(prepared: Path) -> None:
    shown = inspect(prepared)
    for words in ("made by data prepare", "train: 4", "valid: ", "320 ids", "a.jsonl: 1 files",
                  "step near copies: 53 to 52 documents", "dropped 3: exact copy (e.g. ", "document: median"):  # fmt: skip
        assert words in shown, words
    (prepared / "report.html").rename(prepared / "hidden")
    assert "stage star: 1 removed" in inspect(prepared)
    (prepared / "hidden").rename(prepared / "report.html")


def test_a_document_and_where_it_came_from(prepared: Path) -> None:
    found = 0
    for side in ("train", "valid"):
        for i in range(len(IndexedDataset(prepared / side))):
            title, origin, *rest = inspect(prepared / side, document=i).split("\n", 2)
            told = re.fullmatch(
                r"   from (.*), place (\d+), document (\d+) of the input(?:; (\d+) cop(?:y|ies) went in its favour)?", origin
            )
            assert told and f"document {i} of" in title
            assert json.loads(Path(told[1]).read_bytes()[int(told[2]) :].split(b"\n")[0])["text"] == rest[0]
            copies = {text(4): "3", LONG: "1"}.get(rest[0])
            assert told[4] == copies
            found += 1
    assert found == 52
    with pytest.raises(UserError, match="has no document 999"):
        inspect(prepared, document=999)


@pytest.mark.parametrize("order", ["documents", "contiguous"])
def test_the_pieces_of_a_sample_are_of_the_documents_named(prepared: Path, order: str) -> None:
    """Their tokens, joined, are the sample; each is what stands at that place of that document."""
    x, tokenizer = IndexedDataset(prepared / "train"), load_tokenizer(prepared)
    data = GPTDataset(x, 96, 7, order)
    for k in range(2 * data.samples_per_epoch):
        pieces = data.pieces(k)
        joined = np.concatenate([x.document(i)[a:b] for i, a, b in pieces])
        assert np.array_equal(joined, data[k].tokens) and all(a < b for _, a, b in pieces)
    shown = inspect(prepared, sample=3, seq_len=96, seed=7, order=order)
    places = Sidecar(prepared / "train")
    for i, a, b in data.pieces(3):
        source, place, _ = places.origin(i)
        assert f"-- tokens {a} to {b - 1} of the {len(x.document(i))} of document {i}\n   from {source}, place {place}," in shown
        assert tokenizer.decode(x.document(i)[a:b].tolist()) in shown


def test_a_sample_in_megatrons_order(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, tokenizer = IndexedDataset(prepared / "train"), load_tokenizer(prepared)
    words = ["sample=3", "seq_len=96", "seed=7", "order=megatron", "megatron_samples=60"]
    assert main(["data", "inspect", str(prepared), *words]) == 0
    tokens = GPTDataset(x, 96, 7, "megatron", samples=60)[3].tokens
    assert tokenizer.decode(tokens[:20].tolist()) in capsys.readouterr().out


def test_inspect_of_a_bare_dataset_and_of_text(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "bare", np.dtype("<u2")) as w:
        for n in (3, 0, 5, 4):
            w.add_document(np.arange(n))
    assert "4 documents, 3 sequences, 12 tokens" in inspect(tmp_path / "bare") and "unverified" in inspect(tmp_path / "bare")
    assert inspect(tmp_path / "bare", document=2).endswith("5 tokens\n0 1 2 3 4")
    verbs.clean(config(tmp_path, "out"))
    assert "56 documents" in inspect(tmp_path / "out")
    with pytest.raises(UserError, match="holds no tokens"):
        inspect(tmp_path / "out", document=0)
    with pytest.raises(UserError, match="not a prepared folder"):
        inspect(tmp_path)


@pytest.mark.parametrize(("words", "said"), [
    (["document=1", "sample=2"], "two questions"), (["seq_len=9"], "no sample=K is given"), (["wat=1"], "wat"),
    (["sample=1", "order=docs"], "did you mean"), (["sample=-1"], "must be 0 or more"), (["sample=0", "seq_len=0"], "at least 1"),
    (["x", "y"], "one word too many"), (["sample=1", "megatron_samples=9"], "with order=megatron only"),
])  # fmt: skip
def test_inspect_refuses(prepared: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    assert main(["data", "inspect", str(prepared), *words]) == 2
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1


def test_lengths_against_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of three documents; empty ones; documents of several sequences, as other tools write them."""
    monkeypatch.setattr("megatron_scratch.corpus.lengths.BLOCK", 3)
    sizes = [5, 0, 0, 9, 1, 1, 300, 0, 2, 9, 9]
    with IndexedWriter(tmp_path / "x", np.dtype("<u2")) as w:
        for n in sizes:
            w.add_document(np.zeros(n, np.int64))
    x = IndexedDataset(tmp_path / "x")
    assert document_lengths(x) == Counter(sizes)
    x.document_indices = np.array([0, 2, 2, 5, x.num_sequences])  # sequences 5 9 | | 1 1 300 | 2 9 9
    x.num_documents = 4
    assert document_lengths(x) == Counter([14, 0, 302, 20])
    for some in (sizes, sizes[:4], [7], [2, 3]):
        told = described(Counter(some))
        assert (told["median"], told["longest"], told["documents"]) == (int(np.median(some)), max(some), len(some))
        assert told["mean"] == pytest.approx(np.mean(some))
        assert all(n == sum(a <= s <= b for s in some) for a, b, n in told["bins"]) and sum(b[2] for b in told["bins"]) == len(some)
    assert described(Counter())["bins"] == []


# verify


def everything(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.rglob("*")) if p.is_file() and p.stat().st_size]


def found(path: Path) -> list[str]:
    said: list[str] = []
    wrong = verify(path, said.append)
    assert all(line in said for line in wrong) and (wrong or any("whole" in line or "unverified" in line for line in said))
    return wrong


def flip(path: Path, bit: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)


def folders(tmp_path: Path, prepared: Path) -> list[Path]:
    verbs.dedup(config(tmp_path, "text"))
    shutil.copytree(prepared, tmp_path / "tokens")
    return [tmp_path / "tokens", tmp_path / "text"]


def test_a_flipped_bit_anywhere_is_found(tmp_path: Path, prepared: Path) -> None:
    """In every file that a verb writes, at the ends and at random: the file is named."""
    rng = random.Random(7)
    for folder in folders(tmp_path, prepared):
        assert found(folder) == [] and len(everything(folder)) >= 4
        for path in everything(folder):
            raw = path.read_bytes()
            for bit in {0, 8 * len(raw) - 1, *(rng.randrange(8 * len(raw)) for _ in range(5))}:
                flip(path, bit)
                assert any(line.startswith(f"{path}: ") for line in found(folder)), (path, bit)
                path.write_bytes(raw)
        assert found(folder) == []


def test_every_bit_of_the_manifest_counts(tmp_path: Path) -> None:
    """Also one that leaves the JSON's content as it was: the case of a letter in \\u00e9 or in 1e-07, a blank."""
    path = tmp_path / "x.json"
    write_sealed(path, {"a": "\u00e9\U0001f600", "b": [1, 2.5, 1e-07, None, True], "c": {"d": {}}})
    raw = path.read_bytes()
    assert changed(path) is None and sealed(json.loads(raw)) == json.loads(raw)
    for bit in range(8 * len(raw)):
        flip(path, bit)
        assert changed(path), (bit, path.read_bytes())
        path.write_bytes(raw)
    path.write_bytes(raw + b"\n")
    assert changed(path) and changed(tmp_path / "none")


def test_missing_and_cut_files_are_found(tmp_path: Path, prepared: Path) -> None:
    for folder in folders(tmp_path, prepared):
        for path in everything(folder):
            if path.name == "report.html":
                continue
            raw = path.read_bytes()
            path.write_bytes(raw[:-1])
            assert any(line.startswith(f"{path}: ") for line in found(folder)), path
            path.unlink()
            if path.name != "manifest.json":
                assert any(line.startswith(f"{path}: ") for line in found(folder)), path
            path.write_bytes(raw)


def test_the_changed_bytes_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for module in (writer, sidecar):
        monkeypatch.setattr(module, "BLOCK", 256)
    pipeline.prepare(config(tmp_path, "out"))
    path = tmp_path / "out" / "train.bin"
    flip(path, 8 * 1000)
    assert main(["data", "verify", str(tmp_path / "out")]) == 1
    out, err = capsys.readouterr()
    assert f"{path}: bytes 768 to 1023 changed\n" in out and out.count(" changed") == 1
    assert "is not as it was written" in err and err.count("\n") == 1
    assert f"{path}: bytes 768 to 1023 changed" in found(tmp_path / "out" / "train")
    assert found(tmp_path / "out" / "valid") == []


def test_a_dataset_without_a_manifest_is_compared_with_its_sidecar(tmp_path: Path, prepared: Path) -> None:
    for name in ("train.bin", "train.idx"):
        shutil.copy(prepared / name, tmp_path / name)
    said: list[str] = []
    assert verify(tmp_path / "train", said.append) == [] and "unverified" in said[0]
    flip(tmp_path / "train.idx", 8 * 40)  # nothing to compare with: only the structure can tell
    verify(tmp_path / "train", said.append)
    shutil.copytree(prepared / "train.meta", tmp_path / "train.meta")
    assert any(line.startswith(f"{tmp_path / 'train.idx'}: ") for line in found(tmp_path / "train"))
    shutil.copy(prepared / "train.idx", tmp_path / "train.idx")
    assert found(tmp_path) == []
    for path in everything(tmp_path / "train.meta"):
        raw = path.read_bytes()
        flip(path, 8 * len(raw) - 3)
        assert found(tmp_path / "train"), path
        path.write_bytes(raw)
    meta = tmp_path / "train.meta" / "meta.json"
    raw = meta.read_bytes()
    flip(meta, 8 * (raw.index(b'"key": "') + 12))  # of the lineage: all files are as it says, and it is still JSON
    assert found(tmp_path / "train") == [f"{meta}: its content has another checksum than it names"]
    meta.write_bytes(raw)
    (tmp_path / "train.bin").unlink()
    assert found(tmp_path / "train") == [f"{tmp_path / 'train.bin'}: is missing"]


def test_verify_and_nothing_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], [str(tmp_path)], [str(tmp_path / "no")], ["a", "b"], ["data=x", "wat=1"]):
        assert main(["data", "verify", *words]) == 2
        assert capsys.readouterr().err.count("\n") == 1
