"""Weights & Biases at a server, a stand-in for it: a run there goes on with the run here; and whatever the server does, no number
of a run changes, and nothing of it is lost."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from runs import config, kill_after, rows, run
from wandb_runs import check_same, environment, lines, once_followed, recorded, said, sync
from wandb_server import KEY, Server

ONLINE = ["logging=wandb", "train.layers_every=2", "train.eval_every=3", "train.steps=6"]
MISHAPS = {"closed": {}, "silent": {"silent": True}, "closes": {"closes": True}, "500": {"fail": 500}, "401": {"key": "x" * 40}}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, tmp_path / "home")


@pytest.fixture(scope="module")
def losses(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[float, float]]:
    """Of the run that nobody watches."""
    path = tmp_path_factory.mktemp("plain")
    assert run(config(corpus, path, *ONLINE[1:])) == [0]
    return rows(path)


def reach(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)


def spy(server: Server) -> list[str]:
    """Command lines with the key in them, of all processes, while a client is talking to the server."""
    seen: list[str] = []
    whole = server.UpsertBucket

    def upsert(v: dict[str, Any]) -> dict[str, Any]:
        seen.append("")  # the spy was there
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                seen.extend([path.read_text()] if KEY in path.read_text(errors="replace") else [])
            except OSError:  # it has ended
                continue
        return whole(v)

    server.UpsertBucket = upsert  # type: ignore[method-assign]
    return seen


def test_one_run_that_goes_on(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r"
    words = [*ONLINE, "name=tiny", "logging.wandb.project=p", "logging.wandb.tags=[a]", "logging.wandb.group=g",
             "train.samples.every=3", "train.samples.prompts=['def ',if]", "train.samples.tokens=4",
             "checkpoint.every=3"]  # fmt: skip
    with Server(key=KEY) as server:
        reach(monkeypatch, server)
        seen = spy(server)
        assert run(config(corpus, path, *words, world=2), 2) == [0, 0]
        served = server.only()
        check_same(served.rows(), path)
        assert served.exit == 0
        tables = [json.loads(content) for name, content in served.files.items() if name.startswith("media/table/samples")]
        texts = [[row["step"], row["prompt"], row["text"]] for row in lines(path / "samples.jsonl")]
        assert len(texts) == 4 and sorted([row[0], *row[-2:]] for table in tables for row in table["data"]) == sorted(texts)
        for key, value in {"displayName": "tiny", "project": "p", "groupName": "g", "tags": ["a"]}.items():
            assert served.settings(key) == value

        event = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": "spike", "step": 6, "reason": "loss 9 is 7 deviations up"}
        with open(path / "ledger.jsonl", "a") as f:
            f.write(json.dumps(event) + "\n")
        for steps in (8, 9):  # under another layout, too
            assert run(config(corpus, path, *words, f"train.steps={steps}")) == [0]
            state = json.loads((path / "wandb" / "run.json").read_text())
            (path / "wandb" / "run.json").write_text(json.dumps({"id": state["id"]}))  # as if nothing had been sent
        served = server.only()
        check_same(served.rows(), path)
        assert [row["_step"] for row in served.rows()] == [*range(1, 10)]
        assert [(alert["title"], alert["severity"]) for alert in served.alerts] == [("Loss spike", "WARN")], (
            "once, however often it starts"
        )
        assert served.config["train"]["value"]["steps"] == 9 and served.config["start"]["value"]["world"] == 1
        assert "goes on at" in said(path)
        assert "less than the current step" not in (path / "logs" / "wandb.log").read_text(), "nothing is sent in vain"
        assert not server.unknown
        assert seen and not any(seen), "the key is in no command line"
    for file in path.rglob("*"):
        assert file.is_dir() or KEY.encode() not in file.read_bytes(), f"the key is in {file}"


def test_a_killed_run_goes_on(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r"
    with Server() as server:
        reach(monkeypatch, server)
        cfg = config(corpus, path, *ONLINE, "train.steps=8", "checkpoint.every=4")
        kill = kill_after("megatron_scratch.engine.ddp:DDPEngine.update", 7)
        assert run(cfg, 1, once_followed(path, kill)) == [-signal.SIGKILL]
        assert run(cfg) == [0]
        found = server.only().rows()
        check_same(found, path)
        assert [row["step"] for row in found] == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8]
        assert [row["_step"] for row in found] == [*range(1, 11)]
        assert "less than the current step" not in (path / "logs" / "wandb.log").read_text(), "nothing is sent in vain"


def test_checkpoints_by_reference(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r"
    with Server() as server:
        reach(monkeypatch, server)
        assert run(config(corpus, path, *ONLINE, "name=a b", "checkpoint.every=4", "checkpoint.keep_last=0")) == [0]
        served = server.only()
    assert [artifact.name for artifact in served.artifacts] == ["a_b-checkpoint"] * 2
    for step, artifact in zip((4, 6), served.artifacts, strict=True):
        folder = path / "checkpoints" / f"step_{step:08d}"
        manifest = json.loads((folder / "manifest.json").read_text())
        assert artifact.committed and artifact.type == "model" and set(artifact.aliases) == {"latest", f"step_{step}"}
        assert artifact.metadata["manifest_sha256"] == manifest["sha256"]
        assert artifact.metadata["sha256"] == {name: file["sha256"] for name, file in manifest["files"].items()}
        assert {entry["ref"] for entry in artifact.manifest["contents"].values()} == {p.as_uri() for p in folder.iterdir()}
    assert not [what for what in server.requests if what.startswith("PUT /artifact")], "nothing of them is uploaded"


def test_samples_by_reference(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r"
    with Server() as server:
        reach(monkeypatch, server)
        words = ["train.samples.every=3", "train.samples.tokens=4", "checkpoint.every=100"]
        assert run(config(corpus, path, *ONLINE, *words)) == [0]
        served = server.only()
    (artifact,) = [one for one in served.artifacts if one.type == "samples"]
    assert artifact.committed and artifact.name.endswith("-samples")
    assert {entry["ref"] for entry in artifact.manifest["contents"].values()} == {(path / "samples.jsonl").as_uri()}
    assert [row["step"] for row in served.rows() if "samples" in row] == [3, 6], "and as a table of its step"


def test_nothing_but_numbers(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Server() as server:
        reach(monkeypatch, server)
        off = ["logging.wandb.artifacts=false", "logging.wandb.alerts=false"]
        assert run(config(corpus, tmp_path / "r", *ONLINE, *off)) == [0]
        assert not server.only().artifacts and not server.only().alerts
        check_same(server.only().rows(), tmp_path / "r")


@pytest.mark.parametrize("mishap", MISHAPS)
def test_a_server_that_cannot_be_used(
    mishap: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, losses: dict[int, tuple[float, float]]
) -> None:
    path = tmp_path / "r"
    with Server(**MISHAPS[mishap]) as server:
        reach(monkeypatch, server)
        if mishap == "closed":
            server.close()
        assert run(config(corpus, path, *ONLINE)) == [0]
    assert rows(path) == losses, "the same numbers, to the last bit"
    why = "does not accept the key" if mishap == "401" else "cannot be reached"
    assert why in said(path) and f"wandb sync {path / 'wandb'}" in said(path)
    check_same([row for part in recorded(path) for row in part.rows], path)
    with Server() as server:
        sync(path / "wandb", env=server.env)
        check_same(server.only().rows(), path)


def test_no_key(corpus: Path, tmp_path: Path, losses: dict[int, tuple[float, float]]) -> None:
    path = tmp_path / "r"
    assert run(config(corpus, path, *ONLINE)) == [0]
    assert rows(path) == losses
    assert "no key for W&B, give WANDB_API_KEY" in said(path)
    check_same([row for part in recorded(path) for row in part.rows], path)


@pytest.mark.parametrize("mend", ["sync", "start"])
def test_a_server_that_fails_later(
    mend: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, losses: dict[int, tuple[float, float]]
) -> None:
    """It has taken the run, and none of its rows. `wandb sync` brings them there, and so does the next start."""
    path = tmp_path / "r"
    with Server() as server:
        whole = server.UpsertBucket

        def last(v: dict[str, Any]) -> dict[str, Any]:
            server.behaviour.fail = 500
            return whole(v)

        server.UpsertBucket = last  # type: ignore[method-assign]
        reach(monkeypatch, server)
        assert run(config(corpus, path, *ONLINE)) == [0]
        assert rows(path) == losses
        assert not server.only().history
        folder = next((path / "wandb").glob("run-*"))
        assert f"wandb sync --include-online {folder}" in said(path)
        check_same([row for part in recorded(path) for row in part.rows], path)

        server.UpsertBucket = whole  # type: ignore[method-assign]
        server.behaviour.fail = 0
        if mend == "sync":
            sync("--include-online", folder, env=server.env)
        else:
            assert run(config(corpus, path, *ONLINE, "train.steps=8")) == [0]
        check_same(server.only().rows(), path)


def test_an_outage_of_a_whole_start(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What went to disk meanwhile is brought by the next start that finds the server, and is not to be sent again."""
    path = tmp_path / "r"
    with Server() as server:
        reach(monkeypatch, server)
        for steps, fail in ((2, 0), (4, 500), (6, 0)):
            server.behaviour.fail = fail
            assert run(config(corpus, path, *ONLINE, f"train.steps={steps}")) == [0]
        check_same(server.only().rows(), path)
        there = server.only().rows()
        sync(path / "wandb", env=server.env)
        assert server.only().rows() == there
