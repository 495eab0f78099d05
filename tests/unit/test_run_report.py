"""The page about runs, without a browser: the numbers in it, what it makes of broken files, what the verb refuses."""

from __future__ import annotations

import json
import os
import random
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from written_run import BACK, DATA, DOWN, EVAL, EVIL, KILLED, SAVE, STEP, TOKENS, lines, write

from megatron_scratch.cli import main
from megatron_scratch.report import curves, pictures
from megatron_scratch.report.build import write_report
from megatron_scratch.report.collect import collect
from megatron_scratch.report.page import page
from megatron_scratch.report.run import read_run
from megatron_scratch.report.spent import spent
from megatron_scratch.train.plot import plot_loss
from megatron_scratch.train.rundir import RunDir
from megatron_scratch.util.page import DATA as DATA_IN_PAGE
from megatron_scratch.util.page import read_page, whole

PNG = b"\x89PNG"


def numbers(path: Path) -> dict[str, Any]:
    """Of the one run of a page."""
    assert whole(path)
    return strict(path.read_text("utf-8"))


def strict(text: str) -> dict[str, Any]:
    found = DATA_IN_PAGE.search(text)
    assert found
    return json.loads(found[1], parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))["runs"][0]


def reported(run: Path) -> dict[str, Any]:
    return numbers(write_report([run])[0])


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return reported(write(tmp_path_factory.mktemp("full") / "base"))


# what a page holds


def test_a_run_comes_to_these_numbers(full: dict[str, Any]) -> None:
    f = full["facts"]
    assert (f["state"], f["step"], f["steps"], f["tokens"]) == ("finished", 1000, 1000, 1000 * TOKENS)
    assert f["val_loss"] == pytest.approx(2.45, abs=1e-3) and f["sets"] == {"wiki": pytest.approx(2.75, abs=1e-3)}
    assert f["loss"] == pytest.approx(2.4, abs=0.1) and f["flops"] == 1000 * TOKENS * 8.1e8
    assert f["layout"] == {"tp": 2, "pp": 2, "dp": 4, "cp": 1, "ep": 1} and f["hosts"] == ["node-a", "node-b"]
    assert full["axes"] == ["step", "tokens", "wall", "train"] and full["rows"] == 200 and full["notes"] == []
    loss = full["curves"]["loss"]
    assert len(loss["step"]) == 199 and 400 not in loss["step"] and max(loss["loss"][20:]) == 9.5  # 400 was skipped
    assert loss["train"][-1] == pytest.approx(1000 * STEP) and loss["wall"][-1] > loss["train"][-1] + DOWN
    assert full["valid"][""]["step"] == list(range(100, 1001, 100))
    assert [e["event"] for e in full["events"] if e["step"] == BACK] == ["save", "resume", "rewind", "start"]
    assert len(full["layers"]["names"]) == 15 and full["layers"]["step"] == list(range(50, 1001, 50))
    assert full["layers"]["values"]["activation_rms"][0][-2] is None  # the norm has none
    assert len(full["samples"]["shown"]) == 10 and full["config"]["optim.lr"] == "0.0003"


def test_the_time_is_accounted_for(full: dict[str, Any]) -> None:
    """Against how the run was written; a ledger counts whole seconds."""
    told = {part["name"]: part["seconds"] for part in full["spent"]["parts"]}
    assert told["computing"] == pytest.approx(1000 * (STEP - DATA)) and told["waiting for data"] == pytest.approx(1000 * DATA)
    assert told["saving"] == pytest.approx(10 * SAVE) and told["lost in rewinds"] == (KILLED - BACK) * STEP
    assert told["evaluating and sampling"] == pytest.approx(10 * EVAL) and told["down"] == pytest.approx(DOWN, abs=2)
    assert told["starting"] == pytest.approx(4 + 3, abs=2) and told.get("other", 0) < 2
    assert sum(told.values()) == pytest.approx(full["spent"]["total"]) == pytest.approx(sum(told.values()))
    assert full["spent"]["goodput"] == pytest.approx(480 / full["spent"]["total"]) and full["spent"]["starts"] == 2


def test_a_rewind_of_a_rollback_is_no_time_between_starts(tmp_path: Path) -> None:
    rows = [{"step": s, "time": 1000.0 + s, "loss": 1.0, "step_seconds": 1.0} for s in range(1, 101)]
    base = [{"event": "start", "time": 1000, "step": 0}]
    resume = [{"event": "resume", "time": 1150, "step": 100}, {"event": "rewind", "time": 1150, "step": 100, "seconds": 30},
              {"event": "start", "time": 1150, "step": 100}]  # fmt: skip
    rollback = [{"event": "rewind", "time": 1150, "seconds": 30}, {"event": "rollback", "time": 1150, "step": 130, "to": 100}]
    again = [{"event": "resume", "time": 1200, "step": 100}, {"event": "start", "time": 1200, "step": 100}]
    lost = [{"event": "rewind", "time": 1200, "seconds": 20}]  # killed soon after the rollback
    came = {}
    for name, events in {"resume": resume, "rollback": rollback + again, "both": rollback + lost + again}.items():
        (tmp_path / name).mkdir()
        lines(tmp_path / name / "metrics.jsonl", rows)
        lines(tmp_path / name / "ledger.jsonl", base + events)
        came[name] = {part["name"]: part["seconds"] for part in spent(read_run(tmp_path / name))["parts"]}
    assert came["resume"] == {"computing": 100, "lost in rewinds": 30, "down": 20}
    assert came["rollback"] == {"computing": 100, "lost in rewinds": 30, "down": 50, "other": 20}
    assert came["both"] == {"computing": 100, "lost in rewinds": 50, "down": 30, "other": 20}


def test_a_long_run_is_thinned_and_loses_no_spike(tmp_path: Path) -> None:
    n, rng = 20_000, np.random.default_rng(0)
    losses = rng.normal(3, 0.01, n)
    losses[[17, 12_345]] = 50, 0.5
    lines(tmp_path / "metrics.jsonl", [{"step": i + 1, "loss": v, "lr": 1.0, "tokens": i} for i, v in enumerate(losses)])
    told = reported(tmp_path)
    loss = told["curves"]["loss"]
    assert len(loss["step"]) <= curves.MOST + 2 and loss["whole"] == n and loss["step"] == sorted(set(loss["step"]))
    assert loss["loss"][loss["step"].index(18)] == 50 and loss["loss"][loss["step"].index(12_346)] == 0.5
    assert loss["step"][0] < 20 and loss["step"][-1] > n - 20
    calm = [m for step, m in zip(loss["step"], loss["mean"], strict=True) if abs(step - 18) > 50 and abs(step - 12_346) > 50]
    assert np.mean(calm) == pytest.approx(3, abs=0.002) and np.std(calm) < 0.006  # of means, not of lowest and highest
    text = (tmp_path / "report" / "report.html").read_text()
    assert "Of 20&#8239;000 logged steps" in text and len(text) < 2_000_000


def test_named_sets_bits_and_several_runs_side_by_side(tmp_path: Path) -> None:
    paths = [write(tmp_path / "a" / "run", lr=1e-3), write(tmp_path / "b" / "run", lr=2e-3, steps=300), write(tmp_path / "c")]
    out = tmp_path / "out"
    made = write_report(paths, out)
    assert [path.name for path in made] == [
        "report.html",
        *(f"{n}.png" for n in ("loss", "throughput", "time", "memory", "optimisation")),
    ]
    assert all(path.read_bytes().startswith(PNG) for path in made[1:])
    report = read_page(made[0])
    assert report is not None and [run["name"] for run in report["runs"]] == ["a/run", "b/run", f"{tmp_path.name}/c"]
    text = made[0].read_text("utf-8")
    assert "<code>optim.lr</code>" in text.split("What their configs differ in")[1].split("</table>")[0]
    assert text.startswith(page(report, made[1]))  # all is drawn from the numbers


def test_the_mix_tells_weights_tokens_and_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, tokens in (("web", 1000), ("code", 500)):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        manifest = {
            "splits": {"train": {"documents": 7, "tokens": tokens}},
            "sources": [{"input": name, "documents": 9, "bytes": 5}],
        }
        (folder / "manifest.json").write_text(json.dumps(manifest))
    run = tmp_path / "runs" / "x"
    run.mkdir(parents=True)
    config = {"dir": "runs/x", "data": {"blend": ["data/web:3", "data/code/train:1", "data/none:1", "no weight"]}}
    (run / "config.yaml").write_text(json.dumps(config))
    lines(run / "metrics.jsonl", [{"step": 10, "tokens": 5000, "loss": 1.0}])
    monkeypatch.chdir("/")  # the paths are relative to where the run was started
    web, code, none = reported(run)["mix"]
    assert (web["weight"], web["tokens"], web["trained"], web["epochs"]) == (0.6, 1000, 3000, 3.0)
    assert (code["weight"], code["tokens"], code["epochs"], code["sources"][0]["input"]) == (0.2, 500, 2.0, "code")
    assert (none["weight"], none["tokens"], none["readable"]) == (0.2, None, False)


def test_a_run_that_goes_on_and_one_that_ended_without_a_word(tmp_path: Path) -> None:
    for age, state in ((5, "running"), (86_400, "no end recorded")):
        lines(tmp_path / "ledger.jsonl", [{"event": "start", "time": time.time() - age, "step": 0}])
        assert reported(tmp_path)["facts"]["state"] == state
    lines(tmp_path / "ledger.jsonl", [{"event": "start", "step": 0}, {"event": "failed", "reason": "no memory"}])
    with open(tmp_path / "metrics.jsonl", "w") as f:
        f.write('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')  # half a line is not broken: it is being written
    told = reported(tmp_path)
    assert told["facts"]["state"] == "failed" and told["rows"] == 1 and told["notes"] == []


# what is not as it should be


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]


def test_texts_of_a_run_are_no_markup(tmp_path: Path) -> None:
    run = write(tmp_path / EVIL.replace("/", "_"), text=EVIL)
    text = write_report([run, write(tmp_path / "other")], tmp_path / "out")[0].read_text("utf-8")
    tags = Tags()
    tags.feed(text)
    assert tags.tags.count("script") == 4 and tags.tags.count("img") == 1  # the picture for browsers without scripts
    assert not {"iframe", "link", "object", "base"} & set(tags.tags)
    assert not [name for name in tags.attributes if name.startswith("on") or name == "href"]
    assert "default-src 'none'" in text and "http" not in text.split("<script")[0].replace("http-equiv", "")


JUNK = [None, True, False, -1, 0, 3, 1e308, -1e308, 10**400, 2**63, 0.5, "", "x", "NaN", EVIL, "\ud800", [], [1], [[]], {},
        {"a": {}}, float("nan"), float("inf"), -float("inf"), "2025-01-01T00:00:00+0000", "9999-99-99T00:00:00+0000"]  # fmt: skip


def spoiled(rng: random.Random, row: dict[str, Any]) -> Any:
    """A row with some of its values, or all of itself, replaced."""
    if rng.random() < 0.05:
        return rng.choice(JUNK)
    return {key: spoiled(rng, value) if isinstance(value, dict) else rng.choice(JUNK) if rng.random() < 0.15 else value
            for key, value in row.items()}  # fmt: skip


@pytest.mark.parametrize("seed", range(12))
def test_whatever_stands_in_the_files_there_is_a_page(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    run = write(tmp_path / "run", steps=700, every=10)
    for name in ("metrics", "ledger", "layers", "samples"):
        file = run / f"{name}.jsonl"
        rows = [spoiled(rng, json.loads(line)) for line in file.read_text().splitlines()]
        raw = [json.dumps(row).encode() for row in rows]
        for _ in range(3):
            raw.insert(
                rng.randrange(len(raw)), rng.choice([b"\xff\xfe{", b"", b"[" * 100_000, b"{}", rng.randbytes(50), b'{"step": 7'])
            )
        file.write_bytes(b"\n".join(raw))
    config = json.dumps(
        spoiled(rng, {"data": {"blend": rng.choice(JUNK), "dir": rng.choice(JUNK)}, "train": {"steps": 1}, "dir": "x"})
    )
    (run / "config.yaml").write_bytes(rng.choice([config.encode(), b"a: [", b"\x00", b"a: &a [*a]", b"a: &a {b: *a}", b"- 1"]))
    report = collect([run])
    told = strict(page(report))
    assert told["rows"] > 20 and any("metrics.jsonl" in note for note in told["notes"])
    assert seed % 4 or len(pictures.pictures(tmp_path, report["runs"])) == 5


def test_numbers_that_are_none_are_gaps(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 3.0, "grad_norm": NaN, "lr": 0.1}\n{"step": 2, "loss": NaN, "lr": 0.1}\n'
        '{"step": 3, "loss": 2.0, "lr": Infinity}\n{"step": 3, "val_loss": NaN}\n{"step": 4, "loss": 1e999, "lr": 0.1}\n'
    )
    told = reported(tmp_path)
    assert (
        told["curves"]["loss"]["step"] == [1, 3] and "grad_norm" not in told["curves"] and told["curves"]["lr"]["step"] == [1, 2, 4]
    )
    assert told["rows"] == 4 and told["valid"] == {} and told["facts"]["val_loss"] is None


def test_what_is_no_file_is_said_and_not_waited_for(tmp_path: Path) -> None:
    lines(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 1.0}])
    os.mkfifo(tmp_path / "ledger.jsonl")
    (tmp_path / "layers.jsonl").mkdir()
    os.mkfifo(tmp_path / "config.yaml")
    told = reported(tmp_path)
    assert told["notes"] == ["ledger.jsonl is no file", "layers.jsonl is no file"] and told["rows"] == 1


def test_rows_that_were_computed_again_count_once(tmp_path: Path) -> None:
    lines(tmp_path / "metrics.jsonl", [{"step": s, "loss": float(v)} for v, s in enumerate([1, 2, 3, 2, 3, 4])])
    assert reported(tmp_path)["curves"]["loss"] == {"step": [1, 2, 3, 4], "loss": [0.0, 3.0, 4.0, 5.0]}


def test_a_run_of_an_old_version(tmp_path: Path) -> None:
    """Without times, tokens, parts and layers."""
    rows = [{"step": s, "loss": 5 - s / 100, "lr": 0.1, "grad_norm": 1.0, "step_seconds": 0.5} for s in range(1, 101)]
    lines(tmp_path / "metrics.jsonl", [*rows, {"step": 100, "val_loss": 3.5}])
    began = {"event": "start", "time": "2025-01-01T00:00:00+0000", "step": 0, "world": 2, "tp": 2, "pp": 1}
    lines(tmp_path / "ledger.jsonl", [began, {"event": "finish", "time": "2025-01-01T00:01:00+0000", "step": 100}])
    told = reported(tmp_path)
    assert told["axes"] == ["step", "train"] and told["facts"]["layout"] == {"tp": 2, "pp": 1, "dp": 1}
    assert told["spent"]["total"] == 60 and told["spent"]["goodput"] == pytest.approx(50 / 60)


# pictures


@pytest.mark.parametrize("name", ["_x", "$\\frac$", "日本語 🙂", EVIL.replace("/", "_")[:60], "a\tb"])
def test_pictures_take_any_name(tmp_path: Path, name: str) -> None:
    runs = [write(tmp_path / name, steps=200), write(tmp_path / ("2" + name), steps=200)]
    assert len(write_report(runs, tmp_path / "two")) == 6 and len(write_report(runs[:1])) == 6


def test_the_run_s_own_picture(tmp_path: Path) -> None:
    run = write(tmp_path / "run", steps=200)
    assert plot_loss(RunDir(run)) == run / "loss.png" and (run / "loss.png").read_bytes().startswith(PNG)
    (run / "metrics.jsonl").write_text("")
    assert plot_loss(RunDir(run)) is None


def test_smoothing_knows_how_far_apart_steps_are() -> None:
    even = pictures.smooth([0, 10, 20], [0.0, 1.0, 1.0], 10)
    assert even == pytest.approx([0, 1 / 1.5, 1.5 / 1.75])
    assert pictures.smooth([0, 1000], [0.0, 1.0], 10) == pytest.approx([0, 1]) and pictures.smooth([], [], 1) == []


# the verb


def test_the_verb_writes_where_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one", "lr=0.1"):  # a folder of a sweep may be called so
        write(tmp_path / name, steps=100)
    assert main(["report", "one"]) == 0 and "one/report/report.html" in capsys.readouterr().out
    assert main(["report", "lr=0.1", "out=there/deep"]) == 0 and (tmp_path / "there" / "deep" / "report.html").is_file()
    assert main(["report", "one", "lr=0.1"]) == 0 and "report/report.html" in capsys.readouterr().out.splitlines()[2]
    assert (tmp_path / "report" / "loss.png").is_file()


REFUSED = [
    ([], "give the folder"), (["nothing"], "is not there"), (["file"], "is a file"), (["empty"], "is no run"),
    (["sweep"], "report --sweep sweep"), (["run", "run"], "given twice"), (["run", "empty/../run"], "given twice"),
    (["run", "--sweep", "sweep"], "two reports"), (["run", "sweep=sweep"], "two reports"), (["run", "json=true"], "of --sweep"),
    (["--sweep", "sweep", "out=x"], "none is given"), (["out=x"], "none is given"), (["run", "out="], "names no folder"),
    (["run", "out=file"], "cannot be written"), (["run", "out=file/x"], "cannot be written"), (["run", "wat=1"], "allowed"),
    (["run", "--fast"], "--fast"), (["--sweep"], "give the folder"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "said"), REFUSED, ids=[" ".join(words)[:40] for words, _ in REFUSED])
def test_other_words_are_refused_in_one_line(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("run", "empty", "sweep"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    lines(tmp_path / "run" / "metrics.jsonl", [{"step": 1, "loss": 1.0}])
    assert main(["report", *words]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and said in err and not out
    assert not (tmp_path / "run" / "report").exists() and not (tmp_path / "report").exists()
