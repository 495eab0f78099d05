"""`data prepare` on hostile input: what cannot be read is named, counted, left out or stops the run as corpus.on_bad says; nothing
good is lost; memory stays within its bounds."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import prepared
import pytest
from prepared import content, make_corpus

from megatron_scratch.config.corpus import CorpusConfig
from megatron_scratch.corpus import decontaminate, graph, pipeline, read, stages
from megatron_scratch.corpus.dedup import exact, minhash, spans
from megatron_scratch.corpus.engines import local
from megatron_scratch.corpus.write import encode, parts
from megatron_scratch.data.indexed import IndexedDataset
from megatron_scratch.util.errors import RunFailed, UserError


def config(given: Any, output: Path, **changes: Any) -> CorpusConfig:
    return CorpusConfig(input=given, output=str(output), tokenizer="byte", workers=1, dedup="none", valid_fraction=0.0,
                        **changes)  # fmt: skip


def documents(folder: Path) -> list[str]:
    x = IndexedDataset(folder / "train")
    return sorted(bytes(x.document(i)[:-1].tolist()).decode() for i in range(len(x)))


def line(text: str) -> bytes:
    return json.dumps({"text": text}).encode() + b"\n"


def hostile(folder: Path) -> dict[str, list[str]]:
    """Files with good documents between bad ones; (reason -> places) of what is bad."""
    folder.mkdir()
    cut = gzip.compress(b"".join(line(f"packed {i} {os.urandom(30).hex()}") for i in range(200)))
    files = {
        "a.jsonl": line("good a1") + b"{oops\n" + line("good a2") + b"[" * 50_000 + b"\n" + b'{"text": "\xff"}\n' + line("good a3"),
        "b.jsonl": b'{"body": 1}\n' + line("good b1") + b'{"text": 7}\n\n\n{"text": "\\ud800"}\n' + line("good b2")[:-1],
        "c.jsonl": b"",
        "d.txt": b"",
        "e.bin": b"\x89PNG\0\0",
        "f.txt": b"caf\xe9",
        "g.jsonl": b'{"text": "' + b"x" * (2 << 20) + b'"}\n' + line("good g1"),
        "h.jsonl.gz": cut[: len(cut) // 2],
        "i.jsonl": b'{"text": "one", "text": "two"}\n' + b"\0\0\0\n" + line("  ") + line("good i1"),
        "j.jsonl.gz": line("this is no gzip"),
        "sub/a.jsonl": line("good s1") + b"nonsense\n",  # another file of that name
    }
    for name, raw in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(raw)
    (folder / "k.txt").symlink_to("nothing")
    os.mkfifo(folder / "l.jsonl")
    told = {
        "not JSON": ["a.jsonl:2", "a.jsonl:4", "i.jsonl:2", "sub/a.jsonl:2"], "not UTF-8": ["a.jsonl:5", "b.jsonl:6", "f.txt"],
        "no field 'text'": ["b.jsonl:1"], "field 'text' is not text": ["b.jsonl:3"], "empty file": ["c.jsonl", "d.txt"],
        "binary file": ["e.bin"], "larger than corpus.max_record_mb=1": ["g.jsonl:1"], "empty": ["i.jsonl:3"],
        "field 'text' is there twice": ["i.jsonl:1"], "unreadable file (BadGzipFile)": ["j.jsonl.gz:1"],
        "unreadable file (FileNotFoundError)": ["k.txt"], "unreadable file (NotAFile)": ["l.jsonl:1"],
    }  # fmt: skip
    return {why: [f"{folder}/{place}" for place in places] for why, places in told.items()}


def test_everything_that_is_bad_is_named_and_nothing_good_is_lost(tmp_path: Path) -> None:
    wanted = hostile(tmp_path / "in")
    manifest = pipeline.prepare(config(str(tmp_path / "in"), tmp_path / "out", max_record_mb=1))
    dropped = manifest["dropped"]
    packed = dropped.pop("unreadable file (EOFError)")
    assert packed["count"] == 1 and re.fullmatch(r".*/h\.jsonl\.gz:\d+", packed["samples"][0])
    assert {why: told["samples"] for why, told in dropped.items()} == wanted
    assert {why: told["count"] for why, told in dropped.items()} == {why: len(places) for why, places in wanted.items()}
    found = documents(tmp_path / "out")
    assert [t for t in found if t.startswith("good")] == [f"good {x}" for x in ("a1", "a2", "a3", "b1", "b2", "g1", "i1", "s1")]
    whole = int(packed["samples"][0].rpartition(":")[2]) - 1
    assert len(found) - 8 == whole > 20, "the whole lines of a cut file"
    lines = [json.loads(raw) for raw in (tmp_path / "out" / "removed.jsonl").read_text().splitlines()]
    assert len(lines) == 1 + sum(map(len, wanted.values()))


def test_the_same_bytes_however_it_is_cut(tmp_path: Path) -> None:
    hostile(tmp_path / "in")
    with open(tmp_path / "in" / "a.jsonl", "ab") as f:  # lines that span ranges, and bad ones behind them
        f.write(b"".join(line(f"{i} " + "x" * (i * 7919 % 300_000)) + b"bad\n" for i in range(40)))
    found = []
    for shard_mb, workers in ((1, 2), (3, 1), (64, 1)):
        output = tmp_path / f"out{shard_mb}"
        cfg = config(str(tmp_path / "in"), output, max_record_mb=1, shard_mb=shard_mb)
        cfg.workers = workers
        pipeline.prepare(cfg)
        found.append(content(output))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("name,raw,told", [
    ("a.jsonl", line("x") + b"\n\n{oops\n", "a.jsonl:4: not JSON"),
    ("a.jsonl", line("x" * 700_000) * 3 + line("x") * 2 + b"{oops\n" + line("x" * 700_000), "a.jsonl:6: not JSON"),  # cut lines
    ("a.jsonl", line("x") + b'{"text": "\\udfff"}\n', "a.jsonl:2: not UTF-8"),
    ("a.jsonl.gz", gzip.compress(line("x") * 3 + b"[]\n", mtime=0), "a.jsonl.gz:4: no field 'text'"),
    ("a.jsonl.gz", gzip.compress(line("x") * 3, mtime=0)[:-9], "a.jsonl.gz:4: unreadable file (EOFError)"),
    ("a.txt", b"a\0", "a.txt (record 0): binary file"), ("a.jsonl", b"", "a.jsonl (record 0): empty file"),
])  # fmt: skip
@pytest.mark.parametrize("workers", [1, 2])
def test_on_bad_stop(name: str, raw: bytes, told: str, workers: int, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.txt").write_text("good")
    (tmp_path / "in" / name).write_bytes(raw)
    done = prepared.prepare(tmp_path / "out", f"corpus.input={tmp_path}/in", "corpus.on_bad=stop", "corpus.shard_mb=1",
                            f"corpus.workers={workers}", "corpus.tokenizer=byte")  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"error: {tmp_path}/in/{told}; mend it, or leave such records out with corpus.on_bad=skip")


def test_nothing_but_bad_input(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"{oops\n" * 3)
    (tmp_path / "b.txt").write_bytes(b"")
    with pytest.raises(UserError, match=r"gives no document \(1 empty file, 3 not JSON\)"):
        pipeline.prepare(config(str(tmp_path / "*.*"), tmp_path / "out"))


# change


def rewrite(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"document 150 ", b"DOCUMENT 150 "))


CHANGES: dict[str, Callable[[Path], None]] = {
    "in place": rewrite,
    "longer": lambda path: path.write_bytes(path.read_bytes() + line("another")),
    "shorter": lambda path: os.truncate(path, path.stat().st_size // 2),
    "gone": lambda path: path.unlink(),
    "replaced": lambda path: os.replace(path.with_suffix(".new"), path),
}


@pytest.mark.parametrize("on_bad", ["skip", "stop"])
@pytest.mark.parametrize("kind", CHANGES)
def test_a_file_that_changes_while_it_is_read(kind: str, on_bad: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two states of it are never mixed: the run ends, and the same command reads what is there then."""
    path = tmp_path / "a.jsonl"
    raw = b"".join(line(f"document {i} " + "x" * 20_000) for i in range(200))
    path.write_bytes(raw)
    path.with_suffix(".new").write_bytes(raw.replace(b"document", b"DOCUMENT"))
    (tmp_path / "b.txt").write_text("another file, which stays")
    taken, real = [0], read._take

    def take(*args: Any) -> None:
        taken[0] += 1
        if taken[0] == 100:
            CHANGES[kind](path)
        real(*args)

    monkeypatch.setattr(read, "_take", take)
    given = [str(path), str(tmp_path / "b.txt")]
    with pytest.raises(RunFailed, match=rf"^{path} changed while it was read; when it is at rest, run the same command again"):
        pipeline.prepare(config(given, tmp_path / "out", shard_mb=1, on_bad=on_bad))
    monkeypatch.undo()
    given = [str(p) for p in (path, tmp_path / "b.txt") if p.exists()]
    if kind == "shorter":
        path.write_bytes(raw[: raw.index(b"\n", len(raw) // 2) + 1])
    pipeline.prepare(config(given, tmp_path / "out", shard_mb=1, on_bad=on_bad))
    pipeline.prepare(config(given, tmp_path / "fresh", on_bad=on_bad))
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


@pytest.mark.parametrize("becomes", [b"NINE", b'"'], ids=["other text", "no JSON"])
def test_an_evaluation_set_that_changes_while_it_is_read(becomes: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a change breaks is not the user's to mend."""
    (tmp_path / "a.txt").write_text("a corpus")
    path = tmp_path / "exam.jsonl"
    path.write_bytes(line("one two three four five six seven eight nine"))
    real = decontaminate.reader_of

    def reader(file: Any) -> Any:
        path.write_bytes(path.read_bytes().replace(b"nine", becomes))
        return real(file)

    monkeypatch.setattr(decontaminate, "reader_of", reader)
    with pytest.raises(RunFailed, match=rf"^{path} changed while it was read"):
        pipeline.prepare(config(str(tmp_path / "a.txt"), tmp_path / "out", decontaminate=[str(path)]))


def test_a_file_that_changed_between_two_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what it had is read again."""
    for i in range(4):
        (tmp_path / f"{i}.jsonl").write_bytes(line(f"file {i} " + "x" * 900_000))

    def dies(made: graph.Graph, *args: Any) -> None:
        raise RunFailed(f"it dies after {made.read.total('documents')} documents")

    monkeypatch.setattr(pipeline, "_prepare", dies)
    with pytest.raises(RunFailed, match="it dies after 4 documents"):
        pipeline.prepare(config(str(tmp_path / "*.jsonl"), tmp_path / "out", shard_mb=1))
    monkeypatch.undo()
    (tmp_path / "2.jsonl").write_bytes(line("file 2 " + "y" * 900_000))
    ran: list[int] = []
    real = local.run_task

    def run_task(folder: Path, index: int) -> None:
        ran.extend([index] if folder.name == "read" else [])
        real(folder, index)

    monkeypatch.setattr(local, "run_task", run_task)
    pipeline.prepare(config(str(tmp_path / "*.jsonl"), tmp_path / "out", shard_mb=1))
    assert ran == [2]
    assert [text[:8] for text in documents(tmp_path / "out")] == [f"file {i} {'xxyx'[i]}" for i in range(4)]


# memory


PEAKS = """
import re, sys
from pathlib import Path
from megatron_scratch.config.corpus import CorpusConfig
from megatron_scratch.corpus import pipeline
from megatron_scratch.corpus.engines import local

def peak(pid):
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path(f"/proc/{pid}/status").read_text())[1]) >> 10

peaks, end = [], local._Worker.end
def look(self):
    peaks.append(peak(self.process.pid))
    end(self)

local._Worker.end = look
pipeline.prepare(CorpusConfig(input=sys.argv[1], output=sys.argv[2], tokenizer="byte", workers=2, dedup="none", shard_mb=4,
                              max_record_mb=int(sys.argv[3])))
print(peak("self"), *peaks)
"""


def peaks(given: Path, output: Path, max_record_mb: int) -> tuple[int, int]:
    """Peak resident MiB of (the coordinator, its largest worker)."""
    words = [sys.executable, "-c", PEAKS, str(given), str(output), str(max_record_mb)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=prepared.WAIT)
    assert done.returncode == 0, done.stderr
    mine, *workers = map(int, done.stdout.split())
    return mine, max(workers)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_line_of_200_mb(suffix: str, tmp_path: Path) -> None:
    """Above the limit it costs a few times the limit, whatever its own size."""
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / f"a.jsonl{suffix}"
    with gzip.open(path, "wb", 1) if suffix else open(path, "wb") as f:
        f.write(line("before") + b'{"text": "')
        f.seek(200 << 20, os.SEEK_CUR)  # a hole, or zeros
        f.write(b'"}\n' + line("after"))
    (tmp_path / "in" / "b.jsonl").write_bytes(line("y" * (1 << 20)) * 12)  # so that there is work for two
    base = peaks(tmp_path / "in" / "b.jsonl", tmp_path / "base", 8)[1]
    _, small = peaks(tmp_path / "in", tmp_path / "out", 8)
    assert small - base < 4 * 8, f"{small} MiB with the line, {base} without"
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["dropped"] == {"larger than corpus.max_record_mb=8": {
        "count": 1, "samples": [f"{path}:2"], "heads": ['{"text": "' + "\0" * 190]}}  # fmt: skip
    assert sum(manifest["splits"][side]["documents"] for side in ("train", "valid")) == 14


def scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a stage holds at once, an eighth of a megabyte of text instead of 64, and the rest in proportion."""
    for module, name, value in ((minhash, "KEYS", 1 << 13), (minhash, "PAIRS", 1 << 12), (minhash, "CACHE", 1 << 6),
                                (spans, "TASK", 1 << 12), (exact, "TASK", 1 << 10), (parts, "PART", 1 << 17),
                                (encode, "BATCH", 1 << 17)):  # fmt: skip
        assert getattr(module, name) > value
        monkeypatch.setattr(module, name, value)
    real = read.settings
    monkeypatch.setattr(read, "settings", lambda c: {**real(c), "shard": 1 << 17})


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Python and numpy hold at most in each stage, at 1 and at 16 times the corpus; a whole column would be megabytes more."""
    scaled(monkeypatch)
    held: dict[str, int] = {}
    real = stages.execute

    def execute(work: Path, stage: stages.Stage, *args: Any) -> stages.Done:
        tracemalloc.reset_peak()  # nothing, while it is not traced
        before = tracemalloc.get_traced_memory()[0]
        done = real(work, stage, *args)
        held[stage.name] = tracemalloc.get_traced_memory()[1] - before
        return done

    monkeypatch.setattr(graph, "execute", execute)
    found = []
    for times in (1, 1, 16):  # the first time things are imported and compiled
        given = tmp_path / f"in{times}"
        if not given.exists():
            make_corpus(given, files=times, documents=100, words=300)
        cfg = config(f"{given}/part_*.jsonl", tmp_path / f"out{len(found)}", spans="line", span_chars=10)
        cfg.dedup = "minhash"
        if found:
            tracemalloc.start()
        pipeline.prepare(cfg)
        tracemalloc.stop()
        found.append(dict(held))
    size = sum(p.stat().st_size for p in (tmp_path / "in16").iterdir())
    grown = {name: found[2][name] - found[1][name] for name in found[2]}
    assert size > 3 << 20 and max(grown.values()) < 1 << 20, {k: f"{found[1][k]} + {v}" for k, v in grown.items() if v > 1 << 19}
