"""`data clean | dedup | tokenizer | tokenize`: parts of `data prepare` that share its stages, and the words that each refuses."""

from __future__ import annotations

import io
import json
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from megatron_scratch.cli import main
from megatron_scratch.cli.progress import Progress
from megatron_scratch.config.corpus import CorpusConfig
from megatron_scratch.config.data import DataConfig
from megatron_scratch.corpus import export, pipeline, verbs
from megatron_scratch.corpus.engines import local
from megatron_scratch.corpus.report_page import read_report
from megatron_scratch.corpus.write import listing
from megatron_scratch.data.indexed import IndexedDataset
from megatron_scratch.data.loader import open_data
from megatron_scratch.data.tokenizer import load_tokenizer
from megatron_scratch.util.errors import UserError
from megatron_scratch.util.files import sha256_file

WORDS = "the quick brown fox jumps over a lazy dog while many small birds sing near old rivers".split()


def text(i: int) -> str:
    rng = np.random.default_rng(i)
    return f"Number {i}: " + " ".join(rng.choice(WORDS, size=rng.integers(20, 60)).tolist()) + " \u00e9\u2028.\n"


def texts(count: int) -> list[str]:
    """Different ones, an exact copy of the third, a near copy of the fourth (one word of many), one too short."""
    long = text(3).rstrip() + " " + " ".join(text(1000 + i) for i in range(4))
    return [*map(text, range(count)), text(2), long, long + " more", "tiny"]


def source(folder: Path, count: int = 40) -> Path:
    lines = [json.dumps({"text": t, "id": f"doc-{i}"} if i % 2 else {"text": t}) for i, t in enumerate(texts(count))]
    (folder / "x.jsonl").write_text("\n".join([*lines[:7], "{oops", *lines[7:], ""]))
    return folder / "x.jsonl"


def config(given: Path | str, output: Path, **changes: Any) -> CorpusConfig:
    return replace(
        CorpusConfig(input=str(given), output=str(output), vocab_size=320, valid_fraction=0.1, min_chars=10, workers=1), **changes
    )


def records(folder: Path) -> list[dict[str, Any]]:
    raw = b""
    for path in sorted((folder / "documents").iterdir()):
        whole = path.read_bytes()
        raw += (
            zstandard.ZstdDecompressor().decompressobj().decompress(whole) if path.suffix == ".zst" else zlib.decompress(whole, 31)
        )
    return [json.loads(line) for line in raw.split(b"\n") if line]


def content(folder: Path) -> dict[str, str]:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in ("report.html", ".lock")]
    return {str(p.relative_to(folder)): sha256_file(p) for p in files}


def test_clean_writes_what_passes_the_cleaners_with_its_origin(tmp_path: Path) -> None:
    path = source(tmp_path)
    manifest = verbs.clean(config(path, tmp_path / "out"))
    found, raw = records(tmp_path / "out"), path.read_bytes()
    assert [r["text"] for r in found] == [t for t in texts(40) if t != "tiny"]  # all, in their order, copies too
    for record in found:
        line = json.loads(raw[record["place"] :].split(b"\n")[0])
        assert line["text"] == record["text"] and record["source"] == str(path) and ("id" in record) == ("id" in line)
    assert len({r["id"] for r in found if "id" in r}) == sum("id" in r for r in found) > 10
    assert {r: d["count"] for r, d in manifest["dropped"].items()} == {"not JSON": 1, "shorter than 10 characters": 1}
    assert manifest["documents"] == {"documents": len(found), "characters": sum(len(r["text"]) for r in found), "files": 1,
                                     "bytes": sum(len(r["text"].encode()) for r in found)}  # fmt: skip
    assert "tokenizer" not in manifest and "vocab_size" not in manifest["config"] and "minhash" not in manifest["config"]
    assert sorted(content(tmp_path / "out")) == ["documents/00000.jsonl.zst", "manifest.json", "removed.jsonl"]


def test_dedup_writes_the_documents_that_prepare_encodes(tmp_path: Path) -> None:
    path = source(tmp_path)
    dedup, whole = verbs.dedup(config(path, tmp_path / "d")), pipeline.prepare(config(path, tmp_path / "p"))
    tokenizer = load_tokenizer(tmp_path / "p")
    sides = [IndexedDataset(tmp_path / "p" / side) for side in ("train", "valid")]
    encoded = sorted(tokenizer.decode(x.document(i).tolist()) for x in sides for i in range(len(x)))
    assert sorted(r["text"] for r in records(tmp_path / "d")) == encoded
    assert dedup["dropped"] == whole["dropped"] and {listing.EXACT, listing.NEAR} < set(dedup["dropped"])
    assert content(tmp_path / "d")["removed.jsonl"] == content(tmp_path / "p")["removed.jsonl"]


def test_files_of_documents_are_cut_by_documents_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 4 KB by two workers against one shard by one; a file ends before the document that begins beyond it."""
    path = source(tmp_path, 120)
    monkeypatch.setattr(export, "FILE", 3000)
    one = verbs.dedup(config(path, tmp_path / "one"))
    from megatron_scratch.corpus import read

    real = read.settings
    monkeypatch.setattr(read, "settings", lambda c: real(c) | {"shard": 4096})
    two = verbs.dedup(config(path, tmp_path / "two", workers=2))
    assert content(tmp_path / "one") == content(tmp_path / "two") and one == two and one["documents"]["files"] > 5
    kept = [len(r["text"].encode()) for r in records(tmp_path / "one")]
    files = ((np.cumsum(kept) - kept) // 3000).tolist()  # of the first byte of each document
    assert [len(_lines(p)) for p in sorted((tmp_path / "one/documents").iterdir())] == [
        files.count(f) for f in dict.fromkeys(files)
    ]


def _lines(path: Path) -> list[bytes]:
    return zstandard.ZstdDecompressor().decompressobj().decompress(path.read_bytes()).split(b"\n")[:-1]


def test_a_removed_document_at_a_cut_makes_no_empty_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same = "x" * 50
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in (same, "y" * 50, same, same, "z" * 50, same)))
    monkeypatch.setattr(export, "FILE", 50)
    manifest = verbs.dedup(config(tmp_path / "x.jsonl", tmp_path / "out", dedup="exact"))
    assert manifest["documents"]["files"] == 3 and [r["text"][0] for r in records(tmp_path / "out")] == ["x", "y", "z"]
    assert [len(_lines(p)) for p in sorted((tmp_path / "out/documents").iterdir())] == [1, 1, 1]


def test_without_zstandard_files_are_gzipped_the_same_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    path = source(tmp_path)
    for name in ("a", "b"):
        verbs.clean(config(path, tmp_path / name))
    assert content(tmp_path / "a") == content(tmp_path / "b") and "documents/00000.jsonl.gz" in content(tmp_path / "a")
    assert [r["text"] for r in records(tmp_path / "a")] == texts(40)[:-1]


def test_what_dedup_wrote_is_an_input(tmp_path: Path) -> None:
    path = source(tmp_path)
    verbs.dedup(config(path, tmp_path / "d"))
    direct = pipeline.prepare(config(path, tmp_path / "p"))
    again = pipeline.prepare(config(tmp_path / "d" / "documents", tmp_path / "q"))
    assert again["dropped"] == {} and again["splits"]["train"] == direct["splits"]["train"]
    assert content(tmp_path / "p")["train.bin"] == content(tmp_path / "q")["train.bin"]


def test_tokenize_is_every_document_in_its_order_each_ended(tmp_path: Path) -> None:
    path = source(tmp_path)
    pipeline.prepare(config(path, tmp_path / "p"))
    given = tmp_path / "p" / "tokenizer.model"
    manifest = verbs.tokenize(config(path, tmp_path / "t", tokenizer=str(given), dedup="none"))
    x, tokenizer = IndexedDataset(tmp_path / "t" / "train"), load_tokenizer(given)
    assert [x.document(i).tolist() for i in range(len(x))] == [[*tokenizer.encode(t), tokenizer.eod_id] for t in texts(40)[:-1]]
    assert manifest["splits"]["split"] == "none" and "valid" not in manifest["splits"]
    assert open_data(DataConfig(dir=str(tmp_path / "t")), 16, 0).valid is None
    fewer = verbs.tokenize(config(path, tmp_path / "u", tokenizer=str(given)))
    assert fewer["splits"]["train"]["documents"] == len(x) - 2  # asked to deduplicate, it does


def test_tokenizer_is_the_one_that_prepare_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = source(tmp_path)
    pipeline.prepare(config(path, tmp_path / "p"))
    words = [f"corpus.input={path}", f"corpus.output={tmp_path / 't'}", "corpus.vocab_size=320", "corpus.min_chars=10"]
    assert main(["data", "tokenizer", *words]) == 0
    assert content(tmp_path / "t")["tokenizer.model"] == content(tmp_path / "p")["tokenizer.model"]
    out = capsys.readouterr().out
    assert "vocab size: 320" in out and "encoder: " in out
    assert main(["data", "tokenize", "corpus.dedup=minhash", *words]) == 2  # the same settings, another verb
    assert "prepared from other inputs or settings" in capsys.readouterr().err
    with pytest.raises(UserError, match="corpus.tokenizer=.*tokenizer.model is not to be trained; allowed: .*sentencepiece_bpe"):
        verbs.tokenizer(config(path, tmp_path / "n", tokenizer=str(tmp_path / "p" / "tokenizer.model")))


def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages of which a task runs from now on."""
    seen, real = [], local.run_task
    monkeypatch.setattr(local, "run_task", lambda folder, index: seen.append(folder.name) or real(folder, index))
    return seen


def test_prepare_goes_on_where_dedup_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = source(tmp_path), export.place

    def dies(*args: Any) -> Any:
        raise KeyboardInterrupt

    for _ in range(2):
        monkeypatch.setattr(export, "place", dies)
        with pytest.raises(KeyboardInterrupt):
            verbs.dedup(config(path, tmp_path / "cut"))
    monkeypatch.setattr(export, "place", real)
    seen = ran(monkeypatch)
    pipeline.prepare(config(path, tmp_path / "cut"))
    assert "encode" in seen and not {"read", "exact", "sign", "pair", "check", "star"} & set(seen)
    pipeline.prepare(config(path, tmp_path / "whole"))
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


def test_a_stopped_dedup_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after the files have their place and before the manifest: the folder is not taken for somebody else's."""
    path, real = source(tmp_path), pipeline.all_files
    verbs.dedup(config(path, tmp_path / "whole"))
    monkeypatch.setattr(pipeline, "all_files", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        verbs.dedup(config(path, tmp_path / "cut"))
    assert (tmp_path / "cut" / "documents").is_dir()
    monkeypatch.setattr(pipeline, "all_files", real)
    seen = ran(monkeypatch)
    verbs.dedup(config(path, tmp_path / "cut"))
    assert "documents" not in seen and content(tmp_path / "cut") == content(tmp_path / "whole")
    told = [read_report(tmp_path / name / "report.html") for name in ("whole", "cut")]  # what the first start did counts
    assert [[(s["name"], s["tasks"]) for s in r["steps"][:3]] for r in told if r] == [[("read", 1), ("exact", 1), ("near", 4)]] * 2
    lines: list[str] = []
    (tmp_path / "cut" / ".prepare").mkdir()  # killed after the manifest
    verbs.dedup(config(path, tmp_path / "cut"), progress=lines.append)
    assert len(lines) == 1 and "up to date" in lines[0] and not (tmp_path / "cut" / ".prepare").exists()
    verbs.dedup(config(path, tmp_path / "cut", vocab_size=400, seed=9))  # not read, so the same output
    with pytest.raises(UserError, match="prepared from other inputs or settings"):
        verbs.clean(config(path, tmp_path / "cut"))
    (tmp_path / "foreign" / "documents").mkdir(parents=True)
    with pytest.raises(UserError, match="holds a documents that is not ours"):
        verbs.clean(config(path, tmp_path / "foreign"))


@pytest.mark.parametrize(("verb", "word", "said"), [
    ("clean", "corpus.dedup=exact", "data clean does not read corpus.dedup"),
    ("clean", "corpus.spans=line", "does not read corpus.spans"),
    ("clean", "corpus.vocab_size=99", "does not read corpus.vocab_size"),
    ("dedup", "corpus.seed=3", "data dedup does not read corpus.seed"),
    ("dedup", "corpus.minhash.band=3", "corpus.minhash.band is not a key"),
    ("dedup", "corpus.dedup=none", "has nothing to do"),
    ("tokenizer", "corpus.valid_fraction=0", "does not read corpus.valid_fraction"),
    ("tokenize", "corpus.split=tail", "does not read corpus.split"),
    ("tokenize", "corpus.minhash.bands=14", "corpus.minhash is given and corpus.dedup=none does not read it"),
    ("clean", "corpus.claen=[]", "corpus.claen is not a key"),
    ("clean", "what", "what"),
    ("clean", "--wat", "--wat is not an option"),
])  # fmt: skip
def test_words_without_effect_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str, word: str, said: str
) -> None:
    path = source(tmp_path)
    assert main(["data", verb, f"corpus.input={path}", f"corpus.output={tmp_path / 'out'}", word]) == 2
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_given_tokenizer_leaves_nothing_to_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = source(tmp_path)
    words = [f"corpus.input={path}", f"corpus.output={tmp_path / 'out'}", "corpus.tokenizer=x.model", "corpus.vocab_size=300"]
    for verb in ("prepare", "tokenize"):
        assert main(["data", verb, *words]) == 2 and "is for a tokenizer to train" in capsys.readouterr().err


def test_print_shows_the_config_of_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "tokenize", "corpus.input=nowhere", f"corpus.output={tmp_path / 'out'}", "--print"]) == 0
    assert "dedup: none" in capsys.readouterr().out and not (tmp_path / "out").exists()
    assert main(["data", "tokenize", "corpus.dedup=exact", "--print"]) == 0 and "dedup: exact" in capsys.readouterr().out


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_one_line_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    for stream in (io.StringIO(), Terminal()):
        progress = Progress(stream)
        for line in ("read: 1 of 3 (task 0)", "read: 2 of 3 (task 2)", "read: 3 of 3 (task 1)", "a word", "sign: 1 of 9 (task 1)"):
            now[0] += 2
            progress(line)
        progress.close()
        if not stream.isatty():
            assert stream.getvalue() == "read: 3 of 3, 6.0 s\na word\n"
            now[0] += 31
            progress("sign: 2 of 9 (task 2)")
            assert stream.getvalue().endswith("a word\nsign: 2 of 9\n")
        else:
            shown = stream.getvalue().split("\n")
            assert [line.split("\x1b[K")[-1] for line in shown] == ["read: 3 of 3, 6.0 s", "a word", "sign: 1 of 9", ""]
            assert shown[0].count("\r") == 3


def test_the_table_is_printed_at_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = source(tmp_path)
    words = [f"corpus.input={path}", f"corpus.output={tmp_path / 'out'}", "corpus.min_chars=10"]
    assert main(["data", "dedup", *words]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert next(r for r in rows if r[:3] == ["read", "and", "clean"])[3:8] == ["45", "0.0", "2", "4.44%", "43"]
    assert next(r for r in rows if r[:2] == ["exact", "copies"])[2:7] == ["43", "0.0", "1", "2.33%", "42"]
    assert next(r for r in rows if r[:2] == ["near", "copies"])[2:7] == ["42", "0.0", "1", "2.38%", "41"]


def test_both_writers_of_json_write_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    orjson = pytest.importorskip("orjson")
    letters = "".join(chr(c) for c in [*range(0x3000), *range(0xE000, 0x11000), 0x1F600, 0x10FFFF])
    told = {"text": letters, "source": 'a "b"\\c/d', "place": 2**62, "id": f"{7:016x}"}
    monkeypatch.setattr(export, "import_module", lambda name: (_ for _ in ()).throw(ModuleNotFoundError(name)))
    export._dumps.cache_clear()
    try:
        assert export._dumps()(told) == orjson.dumps(told)
    finally:
        export._dumps.cache_clear()
