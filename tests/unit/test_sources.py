"""What `corpus.input` names: files, folders, globs, URLs; each file once, always in the same order, and whether it changed."""

from __future__ import annotations

import gzip
import io
import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faulty_storage
import pytest
from faulty_storage import FaultyStorage

from megatron_scratch.corpus import tables
from megatron_scratch.corpus.formats import Bad, Keys, Record, reader_of, splits
from megatron_scratch.corpus.sources import SourceFile, find_files
from megatron_scratch.util.errors import RunFailed, UserError

KEYS = Keys("text", "id", 1 << 20)


def found(given: object, root: Path, exclude: Path | None = None) -> list[str]:
    return [os.path.relpath(f.url, root) for f in find_files(given, exclude)]


def texts(file: SourceFile) -> list[str]:
    out = []
    for record in reader_of(file)(file, 0, None, KEYS):
        assert not isinstance(record, Bad), record
        out += [record.text] if isinstance(record, Record) else []
    return out


def write(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"the text of {name}")


# paths


def test_folders_globs_and_files_in_one_order(tmp_path: Path) -> None:
    write(tmp_path, "b/2.txt", "b/10.txt", "a/x.txt", "a/.hidden.txt", "a/.git/x.txt", "a/sub/y.txt", "a.txt", "c[1].txt", "c1.txt")
    everything = ["a/sub/y.txt", "a/x.txt", "a.txt", "b/10.txt", "b/2.txt", "c1.txt", "c[1].txt"]
    assert found(str(tmp_path), tmp_path) == everything
    assert found([str(tmp_path / "b"), str(tmp_path)], tmp_path) == ["b/10.txt", "b/2.txt", *everything[:3], *everything[5:]]
    assert found(str(tmp_path / "*.txt"), tmp_path) == ["a.txt", "c1.txt", "c[1].txt"]
    assert found(str(tmp_path / "**" / "*.txt"), tmp_path) == everything
    assert found(str(tmp_path / "[ab]"), tmp_path) == ["a/sub/y.txt", "a/x.txt", "b/10.txt", "b/2.txt"], "folders of a glob"
    assert found(str(tmp_path / "c[1].txt"), tmp_path) == ["c[1].txt"], "a file that is there is itself, not a glob"
    assert found(str(tmp_path / "a" / ".hidden.txt"), tmp_path) == ["a/.hidden.txt"], "what is named itself is meant"
    assert found([tmp_path / "a.txt", Path(tmp_path, "a.txt")], tmp_path) == ["a.txt"]


def test_each_file_once_whatever_it_is_called(tmp_path: Path) -> None:
    write(tmp_path, "in/a.txt", "in/b.txt", "else/a.txt")
    (tmp_path / "in" / "link.txt").symlink_to("a.txt")
    given = [str(tmp_path / "in" / "." / "b.txt"), str(tmp_path / "else" / ".." / "in"), f"file://{tmp_path}/in/a.txt"]
    assert [(Path(f.name).name, f.entry) for f in find_files(given)] == [("b.txt", given[0]), ("a.txt", given[1])]
    two = find_files([str(tmp_path / "in" / "a.txt"), str(tmp_path / "else" / "a.txt")])
    assert len(two) == 2 and len({f.name for f in two}) == 2, "two files of one name are two files"


def test_links_are_followed_and_may_make_a_circle(tmp_path: Path) -> None:
    write(tmp_path, "in/a/1.txt", "far/away/2.txt")
    (tmp_path / "in" / "z").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "back").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "a" / "self").symlink_to(tmp_path / "in" / "a")
    assert found(str(tmp_path / "in"), tmp_path) == ["in/a/1.txt", "in/z/away/2.txt"]


def test_the_output_is_no_input(tmp_path: Path) -> None:
    write(tmp_path, "in/a.txt", "in/out/train.bin", "in/out.txt")
    assert found(str(tmp_path / "in"), tmp_path, exclude=tmp_path / "in" / "out") == ["in/a.txt", "in/out.txt"]
    (tmp_path / "alias").symlink_to(tmp_path / "in" / "out")
    assert found(f"file://{tmp_path}/in", tmp_path, exclude=tmp_path / "alias") == ["in/a.txt", "in/out.txt"]
    with pytest.raises(UserError, match="holds no file that is not in the output"):
        find_files(str(tmp_path / "in"), exclude=tmp_path / "in")


def test_names_of_any_bytes(tmp_path: Path) -> None:
    """They go through JSON, and can be shown."""
    for name in (b"latin \xe9.txt", b"line\nend.txt", "z\u00f6lf \U0001f600.txt".encode()):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_text("x")
    files = find_files(str(tmp_path))
    for file in files:
        assert file.name.encode("utf-8") and texts(SourceFile(file.name, json.loads(json.dumps(file.url)), "")) == ["x"]
    assert {Path(f.name).name for f in files} == {r"latin \xe9.txt", "line\nend.txt", "z\u00f6lf \U0001f600.txt"}


@pytest.mark.parametrize("given,words", [
    ("", "names nothing"), ([], "names nothing"), (["a", ""], "names nothing"), (None, "names nothing"),
    ("no/such", "does not exist"), ("no/such/*.txt", "does not exist"), ("a\0b", "does not exist"),
    ("ftpx://h/x", "ftpx://"), ("s3://key:pw@b/x", "credentials"), ("file://host/x", "three slashes"),
    ("zip://a::file:///b.zip", "is not a URL"), ("memory://x/y", "keeps no files"),
])  # fmt: skip
def test_an_input_that_cannot_be_is_refused_in_one_line(given: Any, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        find_files(given)
    assert "\n" not in str(caught.value) and "pw@" not in str(caught.value)


def test_a_folder_without_files(tmp_path: Path) -> None:
    (tmp_path / ".hidden").write_text("x")
    with pytest.raises(UserError, match="holds no file"):
        find_files(str(tmp_path))


# what is no file, and what may not be read


def test_pipes_sockets_and_links_to_nothing_never_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.jsonl")
    (tmp_path / "gone.txt").symlink_to("nothing")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    listener = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(tmp_path)  # the name of a socket has 108 bytes at most
    try:
        listener.bind("socket.txt")
    finally:
        os.chdir(here)
        listener.close()
    reasons = {}
    for file in find_files(str(tmp_path)):
        assert splits(file, 1) == [(0, None)] and file.size() == 0 and file.probe() and file.stamp() == file.stamp()
        (record,) = (r for r in reader_of(file)(file, 0, None, KEYS) if isinstance(r, Bad))
        reasons[Path(file.url).name] = record.reason
    assert reasons == {"fifo.jsonl": "unreadable file (NotAFile)", "gone.txt": "unreadable file (FileNotFoundError)",
                       "loop.txt": "unreadable file (OSError)", "socket.txt": "unreadable file (NotAFile)"}  # fmt: skip
    with pytest.raises(UserError, match="is a pipe, a socket or a device"):
        find_files(str(tmp_path / "fifo.jsonl"))


@pytest.fixture
def nobody() -> Iterator[None]:
    """Permissions say nothing to root."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


def test_a_file_and_a_folder_without_permission(tmp_path_factory: Any, request: pytest.FixtureRequest) -> None:
    root = tmp_path_factory.mktemp("open")
    for folder in (root, *root.parents[:3]):  # pytest's own, one more under xdist
        if folder.owner() == Path.home().owner():
            folder.chmod(folder.stat().st_mode | 0o055)
    write(root, "a.txt", "shut/b.txt", "secret.txt")
    (root / "shut").chmod(0)
    (root / "secret.txt").chmod(0)
    try:
        request.getfixturevalue("nobody")
        files = find_files(str(root))
        assert [Path(f.url).name for f in files] == ["a.txt", "secret.txt", "shut"], "the folder itself: what it holds is not known"
        records = [next(iter(reader_of(f)(f, 0, None, KEYS))) for f in files]
        assert [getattr(r, "reason", "") for r in records] == ["", *["unreadable file (PermissionError)"] * 2]
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        (root / "shut").chmod(0o755)


def test_a_disk_that_fails_is_no_bad_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it holds may be well: it is not left out, the run ends."""
    write(tmp_path, "a.txt")
    file = find_files(str(tmp_path))[0]
    monkeypatch.setattr(SourceFile, "open", lambda self: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(OSError, match="Input/output"):
        list(reader_of(file)(file, 0, None, KEYS))


# change


def test_a_change_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(bytes(300_000))
    file = find_files(str(path))[0]
    probe, stamp = file.probe(), file.stamp()
    old = path.stat()
    os.utime(path, (1, 1))
    assert file.probe() == probe, "the date says nothing of what it holds"
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    file.check(stamp)
    for raw in (bytes(300_001), b"x" + bytes(299_999), bytes(299_999) + b"x"):
        path.write_bytes(raw)
        assert file.probe() != probe
    path.write_bytes(bytes(150_000) + b"x" + bytes(149_999))
    assert file.probe() == probe, "at bounded cost the middle is not seen"
    os.utime(path, (2, 2))
    with pytest.raises(RunFailed, match="changed while it was read; when it is at rest, run the same command again"):
        file.check(stamp)
    path.unlink()
    with pytest.raises(RunFailed, match="changed while it was read"):
        file.check(stamp)


# URLs


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    faulty_storage.install(tmp_path, monkeypatch)
    write(tmp_path, "store/b/2.txt", "store/a.txt", "store/.hidden/x.txt", "store/b/.x", "store/z[1].txt")
    (tmp_path / "store" / "lines.jsonl").write_text("".join(json.dumps({"text": str(i)}) + "\n" for i in range(500)))
    with gzip.open(tmp_path / "store" / "lines.jsonl.gz", "wt") as f:
        f.write("".join(json.dumps({"text": str(i)}) + "\n" for i in range(50_000)))
    return f"faulty://{tmp_path}/store"


def test_a_remote_folder_its_files_and_globs(faulty: str) -> None:
    def names(given: str) -> list[str]:
        return [f.url.partition("store/")[2] for f in find_files(given)]

    assert names(faulty) == ["a.txt", "b/2.txt", "lines.jsonl", "lines.jsonl.gz", "z[1].txt"]
    assert names(f"{faulty}/*.txt") == ["a.txt", "z[1].txt"] and names(f"{faulty}/b") == ["b/2.txt"]
    assert names(f"{faulty}/z[1].txt") == ["z[1].txt"] and names(f"{faulty}/**/*.txt") == ["a.txt", "b/2.txt", "z[1].txt"]
    with pytest.raises(UserError, match="holds no file"):
        find_files(f"{faulty}/nothing/*")


def test_remote_files_are_read_as_local_ones(faulty: str, tmp_path: Path) -> None:
    for file in find_files(faulty):
        local = find_files(file.url.removeprefix("faulty://"))[0]
        assert not file.local and texts(file) == texts(local) and file.probe() == local.probe() and file.size() == local.size()
    lines = next(f for f in find_files(faulty) if f.name.endswith("lines.jsonl"))
    pieces = [r.text for a, b in splits(lines, 999) for r in reader_of(lines)(lines, a, b, KEYS) if isinstance(r, Record)]
    assert pieces == [str(i) for i in range(500)], "ranges of bytes"


@pytest.mark.parametrize("name", ["a.txt", "lines.jsonl", "lines.jsonl.gz"])
def test_a_network_that_fails_is_no_bad_file(name: str, faulty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (file,) = find_files(f"{faulty}/{name}")
    real = FaultyStorage._open

    class Broken:
        def __init__(self, f: Any):
            self.f = f

        def read(self, count: int) -> bytes:
            data = self.f.read(count)
            if not data or self.f.tell() > 100_000:
                raise ConnectionError("the network\nis down")  # no errno, as a damaged stream
            return data  # type: ignore[no-any-return]

        def close(self) -> None:
            self.f.close()

    monkeypatch.setattr(FaultyStorage, "_open", lambda *args, **kwargs: Broken(real(*args, **kwargs)))
    with pytest.raises(RunFailed, match=rf"^faulty://.*/{name} cannot be read: ConnectionError: the network is down$"):
        list(reader_of(file)(file, 0, None, KEYS))


def test_hf_goes_to_its_filesystem(monkeypatch: pytest.MonkeyPatch) -> None:
    """Revisions have an @; the answers of the hub are played."""
    hub = pytest.importorskip("huggingface_hub").HfFileSystem
    monkeypatch.setattr(hub, "exists", lambda self, path: False)
    monkeypatch.setattr(hub, "isfile", lambda self, path: True)
    monkeypatch.setattr(hub, "glob", lambda self, path: [path.replace("*", "x")])
    monkeypatch.setattr(hub, "open", lambda self, path, mode: io.BytesIO(json.dumps({"text": f"{path} {mode}"}).encode()))
    (file,) = find_files("hf://datasets/a/b@main/*.jsonl")
    assert file.name == "hf://datasets/a/b@main/x.jsonl" and texts(file) == ["datasets/a/b@main/x.jsonl rb"]


def test_a_server_that_does_not_tell_sizes(faulty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FaultyStorage, "size", lambda self, path: None)
    with pytest.raises(UserError, match="does not tell its size; fetch it first"):
        find_files(f"{faulty}/a.txt")[0].probe()


# Hugging Face datasets


def test_a_dataset_as_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    rows = [{"text": f"row {i}", "id": i} for i in range(20)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (file,) = find_files(f"datasets://json?data_files={tmp_path}/a.jsonl")
    assert splits(file, 1) == [(0, None)] and file.size() == 0
    records = list(reader_of(file)(file, 0, None, KEYS))
    assert [(r.text, r.place, r.id) for r in records] == [(f"row {i}", i, i) for i in range(20)]  # type: ignore[union-attr]
    assert [r.reason for r in reader_of(file)(file, 0, None, Keys("body", "id", 9)) if isinstance(r, Bad)] == [
        "no field 'body'"
    ] * 20
    (file,) = find_files(f"datasets://json?data_files={tmp_path}/nothing.jsonl")
    with pytest.raises(RunFailed, match="cannot be read after row -1: ") as caught:
        list(reader_of(file)(file, 0, None, KEYS))
    assert "\n" not in str(caught.value)


def test_a_dataset_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr(tables, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package datasets; run: pip install"):
        splits(find_files("datasets://a/b")[0], 1)
    monkeypatch.setattr(tables, "find_spec", lambda name: object())
    for given, words in (("datasets://a/b?spilt=train", "did you mean 'split'"), ("datasets://?split=train", "names no dataset"),
                         ("datasets://a?trust_remote_code=true", "is not known")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            splits(find_files(given)[0], 1)
