"""Raw text to a dataset: what is read, what is dropped, what comes out, and that it comes out the same."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_scratch.config.corpus import CorpusConfig
from megatron_scratch.config.data import DataConfig
from megatron_scratch.corpus import graph, inspect, prepare
from megatron_scratch.corpus.engines import local
from megatron_scratch.corpus.formats import Bad, Keys, Record, reader_of
from megatron_scratch.corpus.sources import find_files
from megatron_scratch.corpus.stages import Stage
from megatron_scratch.data.indexed import IndexedDataset
from megatron_scratch.data.loader import open_data
from megatron_scratch.data.tokenizer import load_tokenizer
from megatron_scratch.util.errors import UserError
from megatron_scratch.util.files import sha256_file

WORDS = "the quick brown fox jumps over a lazy dog while many small birds sing near old rivers".split()


def sentence(i: int) -> str:
    rng = np.random.default_rng(i)
    return " ".join(rng.choice(WORDS, size=rng.integers(5, 40)).tolist()) + f".\nNumber {i}\u00e9\n"


def jsonl(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps({"text": sentence(i)}) + "\n" for i in range(count)))
    return path


def config(source: Path | str | list[str], output: Path, **changes: object) -> CorpusConfig:
    given = str(source) if isinstance(source, Path) else source
    return replace(CorpusConfig(input=given, output=str(output), vocab_size=320, valid_fraction=0.1), **changes)


def decoded(folder: Path, split: str) -> list[str]:
    x, tokenizer = IndexedDataset(folder / split), load_tokenizer(folder)
    return [tokenizer.decode(x.document(i).tolist()) for i in range(len(x))]


def content(folder: Path) -> dict[str, str]:
    """Every file but the page of the report, which tells times."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in ("report.html", ".lock")]
    return {str(p.relative_to(folder)): sha256_file(p) for p in files}


def read(given: str | list[str]) -> tuple[list[Record], Counter[str], dict[str, list[str]]]:
    """Records, reasons, and places by reason."""
    records, reasons, places = [], Counter(), {}
    for file in find_files(given):
        for record in reader_of(file)(file, 0, None, Keys("text", "id", 1 << 20)):
            if isinstance(record, Record):
                records.append(record)
            elif isinstance(record, Bad):
                reasons[record.reason] += 1
                places.setdefault(record.reason, []).append(f"{file.name}:{record.line}")
    return records, reasons, places


def test_read_files_folders_globs_and_json_lines(tmp_path: Path) -> None:
    (tmp_path / "sub" / ".git").mkdir(parents=True)
    (tmp_path / "sub" / ".git" / "x.txt").write_text("hidden")
    (tmp_path / "sub" / "b.py").write_text("b = 1\n")
    (tmp_path / "sub" / "a.md").write_text("# a\n")
    (tmp_path / "sub" / "bad.bin").write_bytes(b"ab\0cd")
    (tmp_path / "sub" / "latin.txt").write_bytes(b"caf\xe9")
    lines = [b'{"text": "one"}', b"", b"{broken", b'{"body": "x"}', b'{"text": 3}', b'{"text": "\xff"}',
             "{\"text\": \"zw\u00f6lf\"}".encode(), b'{"text": "last"}']  # fmt: skip
    raw = b"\n".join(lines)
    (tmp_path / "x.jsonl").write_bytes(raw)
    with gzip.open(tmp_path / "y.jsonl.gz", "wb") as f:
        f.write(raw)
    given = [str(tmp_path / "y.jsonl.gz"), str(tmp_path / "sub"), str(tmp_path / "*.jsonl"), str(tmp_path / "sub" / "a.md")]
    found, reasons, places = read(given)
    assert [d.text for d in found] == [*("one", "zw\u00f6lf", "last"), "# a\n", "b = 1\n", *("one", "zw\u00f6lf", "last")]
    for d in found[-3:]:
        assert d.text.encode() in raw[d.place :].split(b"\n")[0]
    assert reasons == {"binary file": 1, "not UTF-8": 3, "not JSON": 2, "no field 'text'": 2, "field 'text' is not text": 2}
    assert places["not JSON"] == [f"{tmp_path}/y.jsonl.gz:3", f"{tmp_path}/x.jsonl:3"]


def test_a_cut_gzip_file_is_reported_and_its_whole_lines_kept(tmp_path: Path) -> None:
    whole = gzip.compress("".join(json.dumps({"text": sentence(i)}) + "\n" for i in range(2000)).encode())
    (tmp_path / "x.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    found, reasons, _ = read(str(tmp_path))
    assert 100 < len(found) < 2000 and list(reasons.values()) == [1]


def test_the_standard_library_is_a_corpus() -> None:
    files = find_files("stdlib")
    names = [f.name for f in files]
    assert names[0] == "stdlib:pydoc_data/topics.py" and names[1:] == sorted(names[1:]) and len(names) > 300
    assert not [n for n in names if "/test/" in n or "site-packages" in n or "_sysconfigdata" in n]


def test_prepare_and_read_back(tmp_path: Path) -> None:
    texts = [sentence(i) for i in range(60)]
    with open(tmp_path / "x.jsonl", "w") as f:
        for text in [*texts, texts[3], texts[3].replace("\n", "\r\n"), "   ", "tiny"]:
            f.write(json.dumps({"text": text}) + "\n")
        f.write("{oops\n")
    lines: list[str] = []
    out = tmp_path / "out"
    manifest = prepare(config(tmp_path / "x.jsonl", out, min_chars=5), lines.append)
    train, valid = decoded(out, "train"), decoded(out, "valid")
    assert sorted(train + valid) == sorted(texts) and valid and train != [t for t in texts if t in train]  # all, once, shuffled
    assert {r: d["count"] for r, d in manifest["dropped"].items()} == {
        "exact copy": 2, "empty": 1, "shorter than 5 characters": 1, "not JSON": 1}  # fmt: skip
    assert manifest["dropped"]["not JSON"]["samples"] == [f"{tmp_path}/x.jsonl:65"]
    x, tokenizer = IndexedDataset(out / "train"), load_tokenizer(out)
    assert all(x.document(i)[-1] == tokenizer.eod_id for i in range(len(x))) and x.dtype == np.uint16
    counts = manifest["splits"]["train"]
    assert (counts["documents"], counts["tokens"]) == (len(train), x.num_tokens)
    assert (counts["characters"], counts["bytes"]) == (len("".join(train)), len("".join(train).encode()))
    read = [*texts, texts[3], texts[3]]  # before copies are left out
    assert manifest["sources"] == [{"input": f"{tmp_path}/x.jsonl", "files": 1, "documents": 62,
                                    "characters": len("".join(read)), "bytes": len("".join(read).encode())}]  # fmt: skip
    assert [n for n in content(out) if "/" not in n] == [
        "manifest.json", "removed.jsonl", "tokenizer.model", "train.bin", "train.idx", "valid.bin", "valid.idx"]  # fmt: skip
    assert {n.split("/")[0] for n in content(out) if "/" in n} == {"train.meta", "valid.meta"}
    assert {n: d["sha256"] for n, d in manifest["files"].items()} == {n: s for n, s in content(out).items() if n != "manifest.json"}
    assert json.loads((out / "manifest.json").read_text()) == manifest and lines
    assert open_data(DataConfig(dir=str(out)), 16, 0).vocab_size == 320


def test_prepare_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "x.jsonl", 80)
    for name in ("a", "b"):
        prepare(config(source, tmp_path / name))
    assert content(tmp_path / "a") == content(tmp_path / "b")
    prepare(config(source, tmp_path / "c", seed=2))
    assert sorted(decoded(tmp_path / "c", "train")) == sorted(decoded(tmp_path / "a", "train"))  # the split is by text
    assert decoded(tmp_path / "c", "train") != decoded(tmp_path / "a", "train")


def test_a_finished_output_is_left_alone(tmp_path: Path) -> None:
    source, lines = jsonl(tmp_path / "x.jsonl", 40), []
    cfg = config(source, tmp_path / "out")
    first = prepare(cfg)
    stamps = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    assert prepare(cfg, lines.append) == first and "up to date" in lines[0] and len(lines) == 1
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == stamps
    with pytest.raises(UserError, match="other inputs or settings; choose another folder, or delete it"):
        prepare(replace(cfg, vocab_size=330))
    with pytest.raises(UserError, match="other inputs or settings"):
        prepare(replace(cfg, seed=9))
    jsonl(source, 41)
    with pytest.raises(UserError, match="other inputs or settings"):
        prepare(cfg)
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == stamps
    jsonl(source, 40)
    (tmp_path / "out" / "train.bin").unlink()
    assert prepare(cfg) == first  # made again


def test_files_of_others_are_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train.bin").write_bytes(b"precious")
    with pytest.raises(UserError, match="train.bin that is not ours"):
        prepare(config(jsonl(tmp_path / "x.jsonl", 40), tmp_path / "out"))
    assert (tmp_path / "out" / "train.bin").read_bytes() == b"precious"


STAGES = ["read", "exact", "sign", "pair", "check", "star", "encode", "parts_train", "parts_valid", "listed"]


def stop_after(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A preparation ends when this stage is finished."""
    real = graph.execute

    def dies(work: Path, stage: Stage, *rest: Any) -> Any:
        done = real(work, stage, *rest)
        if stage.name == name:
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(graph, "execute", dies)


def tasks_run(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages of the tasks that are run from now on."""
    ran: list[str] = []
    real = local.Local.run

    def noted(self: Any, folder: Path, pending: list[int], *rest: Any) -> Any:
        ran.extend([folder.name] * len(pending))
        return real(self, folder, pending, *rest)

    monkeypatch.setattr(local.Local, "run", noted)
    return ran


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A source, and what an uninterrupted preparation of it gives."""
    folder = tmp_path_factory.mktemp("whole")
    source = jsonl(folder / "x.jsonl", 60)
    prepare(config(source, folder / "out"))
    return source, content(folder / "out")


@pytest.mark.parametrize("stage", STAGES)
def test_killed_after_any_stage_it_goes_on_to_the_same_bytes(
    tmp_path: Path, whole: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, stage)
        with pytest.raises(KeyboardInterrupt):
            prepare(config(whole[0], tmp_path / "cut"))
    assert not (tmp_path / "cut" / "manifest.json").exists()
    ran = tasks_run(monkeypatch)
    prepare(config(whole[0], tmp_path / "cut"))
    assert content(tmp_path / "cut") == whole[1]
    assert stage not in ran and (stage == "read" or "read" not in ran)  # no finished task is run again


def test_other_settings_after_a_kill_start_the_stages_they_touch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = jsonl(tmp_path / "x.jsonl", 60)
    with monkeypatch.context() as patch:
        stop_after(patch, "listed")
        with pytest.raises(KeyboardInterrupt):
            prepare(config(source, tmp_path / "a"))
    ran = tasks_run(monkeypatch)
    prepare(config(source, tmp_path / "a", vocab_size=330, tokenizer="byte"))
    assert "encode" in ran and not {"read", "exact", "sign", "pair", "check", "star"} & set(ran)
    prepare(config(source, tmp_path / "b", vocab_size=330, tokenizer="byte"))
    assert content(tmp_path / "a") == content(tmp_path / "b") and "tokenizer.model" not in content(tmp_path / "a")


def test_other_text_after_a_kill_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the files that are gone is remembered."""
    source = jsonl(tmp_path / "x.jsonl", 60)
    with monkeypatch.context() as patch:
        stop_after(patch, "encode")
        with pytest.raises(KeyboardInterrupt):
            prepare(config(source, tmp_path / "a", tokenizer="byte"))
    source.write_text(source.read_text().replace("quick", "kciuq").replace("lazy", "yzal"))
    for name in ("a", "b"):
        prepare(config(source, tmp_path / name, tokenizer="byte"))
    assert content(tmp_path / "a") == content(tmp_path / "b") and any("kciuq" in text for text in decoded(tmp_path / "a", "train"))


def test_tail_split_of_one_text_is_nanogpts(tmp_path: Path) -> None:
    text = "".join(sentence(i) for i in range(50))
    (tmp_path / "x.txt").write_text(text)
    manifest = prepare(config(tmp_path / "x.txt", tmp_path / "out", tokenizer="sentencepiece_char", split="tail"))
    cut = int(len(text) * (1 - 0.1))
    assert decoded(tmp_path / "out", "train") == [text[:cut]] and decoded(tmp_path / "out", "valid") == [text[cut:]]
    assert manifest["splits"]["train"]["tokens"] == cut  # no EOD in or after one text
    assert manifest["tokenizer"]["vocab_size"] == len(set(text)) + 2 and manifest["splits"]["valid"]["unknown_tokens"] == 0


def test_tail_split_of_several_texts(tmp_path: Path) -> None:
    texts = ["abcdefgh", "ijklmnopqr", "st"]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    prepare(config(f"{tmp_path}/*.txt", tmp_path / "out", tokenizer="byte", split="tail", valid_fraction=0.5))
    sides = [[IndexedDataset(tmp_path / "out" / s).document(i).tolist() for i in range(2)] for s in ("train", "valid")]
    assert sides == [[[*b"abcdefgh", 256], [*b"ij"]], [[*b"klmnopqr", 256], [*b"st"]]]


def test_one_document_is_split_by_its_tail(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("word " * 200)
    lines: list[str] = []
    manifest = prepare(config(tmp_path / "x.txt", tmp_path / "out", tokenizer="byte"), lines.append)
    assert manifest["splits"]["split"] == "tail" and any("one document" in line for line in lines)
    assert manifest["splits"]["valid"]["tokens"] == 100


def test_two_documents_give_one_to_each_side(tmp_path: Path) -> None:
    for fraction in (0.01, 0.99):
        out = tmp_path / f"out{fraction}"
        manifest = prepare(config(jsonl(tmp_path / "x.jsonl", 2), out, tokenizer="byte", valid_fraction=fraction))
        assert [manifest["splits"][s]["documents"] for s in ("train", "valid")] == [1, 1]


def test_no_validation_set(tmp_path: Path) -> None:
    manifest = prepare(config(jsonl(tmp_path / "x.jsonl", 30), tmp_path / "out", tokenizer="byte", valid_fraction=0.0))
    assert "valid" not in manifest["splits"] and not (tmp_path / "out" / "valid.idx").exists()
    assert open_data(DataConfig(dir=str(tmp_path / "out")), 16, 0).valid is None


def test_a_given_tokenizer_is_used_as_it_is(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "x.jsonl", 40)
    first = prepare(config(source, tmp_path / "a"))
    second = prepare(config(source, tmp_path / "b", tokenizer=str(tmp_path / "a" / "tokenizer.model"), dedup=False))
    assert second["tokenizer"]["sha256"] == first["tokenizer"]["sha256"] and second["tokenizer"]["made_by"] == "given"
    assert sha256_file(tmp_path / "a" / "train.bin") == sha256_file(tmp_path / "b" / "train.bin")


def test_max_bytes_and_the_tokenizers_sample(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "x.jsonl", 200)
    manifest = prepare(config(source, tmp_path / "a", max_bytes=1001, tokenizer="byte"))
    assert sum(manifest["splits"][s]["bytes"] for s in ("train", "valid")) in (1000, 1001)  # a character is not cut
    manifest = prepare(config(source, tmp_path / "b", tokenizer_bytes=5000))
    assert sorted(decoded(tmp_path / "b", "train") + decoded(tmp_path / "b", "valid")) == sorted(sentence(i) for i in range(200))
    assert manifest["tokenizer"]["sha256"] != prepare(config(source, tmp_path / "c"))["tokenizer"]["sha256"]


def test_the_output_may_lie_inside_the_input(tmp_path: Path) -> None:
    jsonl(tmp_path / "x.jsonl", 40)
    cfg = config(tmp_path, tmp_path / "out", tokenizer="byte")
    assert prepare(cfg) == prepare(cfg)


def test_what_cannot_be_prepared(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "x.jsonl").write_text('{"body": "x"}\n')
    for source, words in ((tmp_path / "no", "does not exist"), (tmp_path / "empty", "holds no file"), ([], "names nothing"),
                          (tmp_path / "blank.txt", "gives no document .*1 empty"),
                          (tmp_path / "x.jsonl", "1 no field 'text'")):  # fmt: skip
        with pytest.raises(UserError, match=words) as error:
            prepare(config(source, tmp_path / "out"))
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="vocab_size=100000 is too large for this text; allowed: at most"):
        prepare(config(jsonl(tmp_path / "y.jsonl", 30), tmp_path / "out", vocab_size=100_000))
    assert prepare(config(jsonl(tmp_path / "y.jsonl", 30), tmp_path / "out"))["tokenizer"]["vocab_size"] == 320  # mended, goes on


def test_inspect(tmp_path: Path) -> None:
    prepare(config(jsonl(tmp_path / "x.jsonl", 60), tmp_path / "out"))
    text = inspect(tmp_path / "out")
    assert "documents" in text and "320 ids" in text and "#" in text and f"{tmp_path}/x.jsonl: 1 files" in text
    assert decoded(tmp_path / "out", "valid")[0] in inspect(tmp_path / "out" / "valid", document=0)
    shown = inspect(tmp_path / "out", sample=5, seq_len=8)
    assert "sample 5" in shown and "9 tokens" in shown
    with pytest.raises(UserError, match="has no document 999"):
        inspect(tmp_path / "out", document=999)
    with pytest.raises(UserError, match="does not exist"):
        inspect(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dedup": "none", "keep": "longest"}, "corpus.keep=longest is given and nothing reads it with corpus.dedup=none"),
        (
            {"clean": ["newlines"], "min_chars": 10},
            "corpus.min_chars=10 is given and nothing reads it with corpus.clean without length",
        ),
        ({"span_chars": 10}, "corpus.span_chars=10 is given and nothing reads it with corpus.spans=none"),
        ({"decontaminate_ngram": 8}, "nothing reads it with no corpus.decontaminate"),
        ({"decontaminate_keys": ["q"]}, "nothing reads it with no corpus.decontaminate"),
        ({"keep": "source"}, "keep=source needs the priority"),
    ],
)
def test_settings_that_nothing_reads_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        prepare(config("stdlib", tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()
