"""Followers are real processes with a sink of the user's own: what it is given through kills, restarts, hangs and failures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_scratch import registry
from megatron_scratch.config import Config, compose
from megatron_scratch.logs import followers
from megatron_scratch.logs.alerts import ERROR, WARN, alert
from megatron_scratch.logs.followers import Followers
from megatron_scratch.logs.state import read_state, state_file, write_state
from megatron_scratch.train.rundir import RunDir

DEADLINE = 60.0  # seconds in which another process does what it has to; nothing is measured by it

PLUGIN = '''
import json, os, signal, subprocess, sys, threading
from dataclasses import dataclass
from typing import Optional
from megatron_scratch.registry import register
from megatron_scratch.util.errors import UserError

@dataclass
class Settings:
    flush_seconds: float = 0.05
    fails: int = 0  # so many times when it is opened
    refuses: bool = False
    breaks_at: Optional[int] = None  # raises once at this step
    always: bool = False  # and every time
    hangs_at: Optional[int] = None

class Recorder:
    """Writes down each call."""
    def __init__(self, settings, begin, say):
        self.s, self.folder, self.count = settings, begin.run_dir, begin.state.get("count", 0)
        self.note("open", id=begin.state["id"], state=begin.state, start_step=begin.start_step, facts=begin.facts, name=begin.name,
                  seed=begin.config["seed"], nice=os.nice(0), torch="torch" in sys.modules, pid=os.getpid())
        if settings.refuses:
            raise UserError("wrong settings")
        if self.opened() <= settings.fails:
            raise ConnectionError("no route\\nto host")
        print("a package prints")
        say("look here")
    def file(self):
        return self.folder / (NAME + ".calls")
    def opened(self):
        return sum(json.loads(line)["call"] == "open" for line in open(self.file()))
    def note(self, call, **more):
        with open(self.file(), "a") as f:
            f.write(json.dumps({"call": call, **more}) + "\\n")
    def metrics(self, row):
        if row["step"] == self.s.hangs_at:
            helper = subprocess.Popen(["sleep", "1000"], start_new_session=True)  # as wandb has one
            self.note("hangs", helper=helper.pid)
            threading.Event().wait()
        if row["step"] == self.s.breaks_at and (self.s.always or self.opened() == 1):
            raise ValueError("this row")
        self.count += 1
        self.note("metrics", row=row)
    def layers(self, row): self.note("layers", row=row)
    def sample(self, row): self.note("sample", row=row)
    def event(self, row): self.note("event", row=row)
    def rewound(self, step): self.note("rewound", step=step)
    def flush(self):
        self.note("flush")
        return {"count": self.count}
    def close(self, outcome, code): self.note("close", outcome=outcome, code=code)

NAME = "recorder"
register("logging", "recorder", "recorder_plugin:Recorder", Settings)
'''
OTHER = """
import recorder_plugin
from megatron_scratch.registry import register

class Other(recorder_plugin.Recorder):
    def file(self):
        return self.folder / "other.calls"

register("logging", "other", "other_plugin:Other", recorder_plugin.Settings)
"""


def has_ended(pid: int) -> bool:
    """Gone, or waiting for a parent to take note: what was killed is nobody's child here."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


class Run:
    """A run directory as training writes it, and its followers."""

    def __init__(self, path: Path) -> None:
        self.dir = RunDir(path)
        self.dir.create()
        self.followers: Followers | None = None
        self.said: list[str] = []

    def start(self, *words: str, step: int = 0, remembered: dict[str, Any] | None = None) -> Followers:
        self.cfg: Config = compose.load(["plugins=[recorder_plugin,other_plugin]", f"dir={self.dir.path}", "name=a_run",
                                         *(words or ["+logging.recorder={}"])])  # fmt: skip
        compose.save(self.cfg, self.dir.config)
        self.dir.record("start", step=step, world=1)
        self.followers = Followers(self.cfg, self.dir.path)
        self.followers.start(step, remembered)
        return self.followers

    def steps(self, *steps: int, **more: Any) -> None:
        for step in steps:
            self.dir.log({"step": step, "loss": 1.0 / step, **more})

    def calls(self, *names: str, sink: str = "recorder") -> list[dict[str, Any]]:
        path = self.dir.path / f"{sink}.calls"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [call for call in map(json.loads, lines) if not names or call["call"] in names]

    def given(self, sink: str = "recorder") -> list[int]:
        return [call["row"]["step"] for call in self.calls("metrics", sink=sink)]

    def told(self) -> list[str]:
        assert self.followers is not None
        self.said += self.followers.told()
        return self.said

    def until(self, true: Callable[[], Any]) -> None:
        end = time.monotonic() + DEADLINE
        while not true():
            assert time.monotonic() < end, (self.calls(), self.told(), self.log())
            time.sleep(0.02)

    def kept(self, steps: int) -> bool:
        """Whether run.json says that so many rows are sent."""
        return read_state(self.dir.path, "recorder").get("sent", {}).get("metrics.jsonl", {}).get("rows") == steps

    def close(self, outcome: str = "finished", code: int = 0) -> None:
        assert self.followers is not None
        self.followers.close(outcome, code)
        self.told()

    def log(self, sink: str = "recorder") -> str:
        path = self.dir.logs / f"{sink}.log"
        return path.read_text() if path.exists() else ""

    def pid(self, sink: str = "recorder") -> int:
        assert self.followers is not None
        process = self.followers.ends[sink].process
        assert process is not None
        return process.pid


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    (tmp_path / "recorder_plugin.py").write_text(PLUGIN)
    (tmp_path / "other_plugin.py").write_text(OTHER)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    registry.names("logging")  # the package's own are listed once
    monkeypatch.setattr(registry, "_ENTRIES", {kind: dict(table) for kind, table in registry._ENTRIES.items()})
    run = Run(tmp_path / "run")
    yield run
    if run.followers is not None:
        monkeypatch.setattr(followers, "LIMIT", 0.0)
        run.followers.close("failed", 1)


def test_a_sink_is_given_all_there_is(run: Run) -> None:
    run.start("+logging.recorder={}", "seed=77")
    run.steps(1, 2)
    run.dir.log({"step": 2, "val_loss": 3.0})
    run.dir.log_layers({"step": 2, "layers": {"head": {"grad_norm": 1.0}}})
    run.dir.sample({"step": 2, "prompt": "a", "text": "b"})
    run.until(lambda: len(run.calls("metrics")) == 3)
    run.steps(3)
    run.dir.record("finish", step=3)
    run.close()
    assert run.given() == [1, 2, 2, 3]
    assert [call["row"]["layers"] for call in run.calls("layers")] == [{"head": {"grad_norm": 1.0}}]
    assert [call["row"]["text"] for call in run.calls("sample")] == ["b"]
    assert [call["row"]["event"] for call in run.calls("event")] == ["start", "finish"]
    assert [call["call"] for call in run.calls()][-2:] == ["flush", "close"]
    assert not run.calls("rewound")
    (opened,) = run.calls("open")
    assert (opened["name"], opened["seed"], opened["start_step"], opened["facts"]["world"]) == ("a_run", 77, 0, 1)
    assert not opened["torch"] and opened["nice"] == os.nice(0) + followers.NICE
    assert run.calls("close") == [{"call": "close", "outcome": "finished", "code": 0}]
    assert run.said == ["recorder: look here"] and "a package prints" in run.log()
    with pytest.raises(ProcessLookupError):
        os.kill(opened["pid"], 0)


def test_a_later_start_goes_on_under_the_same_id(run: Run) -> None:
    run.start()
    run.steps(1, 2)
    run.close("stopped", 75)
    run.steps(3)  # nobody follows
    run.start(step=2)
    run.steps(4)
    run.close()
    assert run.given() == [1, 2, 3, 4] and not run.calls("rewound")
    first, second = run.calls("open")
    assert first["id"] == second["id"] and second["state"]["count"] == 2 and second["start_step"] == 2
    assert [call["outcome"] for call in run.calls("close")] == ["stopped", "finished"]


def test_steps_that_a_later_start_computes_anew_come_again(run: Run) -> None:
    run.start()
    run.steps(1, 2, 3, 4)
    run.dir.log_layers({"step": 4, "layers": {}})
    run.close("failed", 1)
    run.dir.rewind(2)
    run.start(step=2)
    run.steps(3, 4, again=True)
    run.close()
    assert run.given() == [1, 2, 3, 4, 3, 4]
    order = [call for call in run.calls("metrics", "rewound", "open") if call["call"] != "metrics" or call["row"].get("again")]
    assert [call["call"] for call in order] == ["open", "open", "rewound", "metrics", "metrics"]
    assert [call["step"] for call in run.calls("rewound")] == [2]


def test_steps_that_a_living_run_computes_anew_come_again(run: Run) -> None:
    """A rollback: the file is replaced while it is followed."""
    run.start()
    run.steps(1, 2, 3, 4)
    run.until(lambda: run.given() == [1, 2, 3, 4])
    run.dir.rewind(2)
    run.dir.record("rollback", step=4, to=2, reason="a spike")
    run.steps(3, again=True)
    run.close()
    assert run.given() == [1, 2, 3, 4, 3]
    assert [call["step"] for call in run.calls("rewound")] == [2]
    assert run.calls("rewound", "metrics")[-1]["row"]["again"]


def test_one_that_is_killed_is_started_anew_and_sends_the_rest(run: Run) -> None:
    run.start()
    run.steps(1, 2)
    run.until(lambda: run.kept(2))
    os.kill(run.pid(), signal.SIGKILL)
    run.steps(3)
    run.until(lambda: run.told() and 3 in run.given())
    run.close()
    assert run.given() == [1, 2, 3] and not run.calls("rewound")
    assert any("ended with -9; started anew" in line for line in run.said)
    assert len({call["id"] for call in run.calls("open")}) == 1


def test_one_that_dies_again_and_again_is_left_alone(run: Run) -> None:
    run.start()
    for _ in range(followers.RESTARTS + 1):
        os.kill(run.pid(), signal.SIGKILL)
        count = len(run.said)
        run.until(lambda count=count: len(run.told()) > count)
    assert "left alone" in run.said[-1] and run.followers and run.followers.ends["recorder"].process is None
    run.close()


def test_a_sink_that_hangs_holds_up_neither_the_end_nor_another_sink(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(followers, "LIMIT", 4.0)
    run.start("+logging.recorder.hangs_at=2", "+logging.other={}")
    run.until(lambda: run.calls("open") and run.calls("open", sink="other"))
    run.steps(1)
    run.until(lambda: run.kept(1))
    run.steps(2, 3)
    run.until(lambda: run.calls("hangs") and 3 in run.given("other"))
    run.close()
    assert run.calls("close", sink="other") and run.given("other") == [1, 2, 3]
    assert not run.calls("close") and any(line.startswith("recorder: not all is sent yet") for line in run.said)
    with pytest.raises(ProcessLookupError):
        os.kill(run.calls("open")[0]["pid"], 0)
    run.until(lambda: has_ended(run.calls("hangs")[0]["helper"]))  # and so does what it had started; a kill takes its time
    run.start("+logging.recorder={}", step=1)
    run.close()
    assert run.given() == [1, 2, 3]


def test_a_sink_that_cannot_be_opened_is_tried_again(run: Run) -> None:
    run.start("+logging.recorder.fails=1")
    run.steps(1)
    run.until(run.given)
    run.steps(2)
    run.close()
    assert run.given() == [1, 2]
    assert run.said[0].startswith("recorder: ConnectionError: no route to host; the run goes on") and len(run.said) == 2
    assert "Traceback" in run.log()


def test_a_sink_that_breaks_is_opened_anew_and_given_what_it_did_not_keep(run: Run) -> None:
    run.start("+logging.recorder.breaks_at=3", "+logging.recorder.flush_seconds=1000")
    run.steps(1, 2, 3, 4)
    run.until(lambda: 4 in run.given())
    run.close()
    assert run.given() == [1, 2, 1, 2, 3, 4] and len(run.calls("open")) == 2
    assert any("ValueError: this row" in line for line in run.said)


def test_a_sink_with_wrong_settings_is_given_up_at_once(run: Run) -> None:
    run.start("+logging.recorder.refuses=true")
    run.until(lambda: run.told() and run.followers and run.followers.ends["recorder"].process is None)
    run.close()
    assert run.said == ["recorder: given up: wrong settings"] and len(run.calls("open")) == 1


def test_the_last_try_is_made_when_the_run_has_ended(run: Run) -> None:
    run.start("+logging.recorder.breaks_at=1", "+logging.recorder.always=true")
    run.until(lambda: run.calls("open"))
    run.steps(1)
    run.until(run.told)
    run.close()
    assert any("not all is sent (ValueError: this row)" in line or "given up" in line for line in run.said), run.said
    assert not run.calls("close")


def test_signals_of_a_job_do_not_end_it(run: Run) -> None:
    run.start()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(run.pid(), number)  # while it is being started, too
    run.steps(1)
    run.until(run.given)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(run.pid(), number)
    run.steps(2)
    run.close("stopped", 75)
    assert run.given() == [1, 2] and run.calls("close")[0]["outcome"] == "stopped" and len(run.calls("open")) == 1


RANK = """
import sys, time
from pathlib import Path
from megatron_scratch.config import compose
from megatron_scratch.logs.followers import Followers
followers = Followers(compose.load_file(Path(sys.argv[1], "config.yaml")), Path(sys.argv[1]))
followers.start(0)
print("started", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("hangs", [False, True])
def test_it_ends_soon_after_its_rank(run: Run, hangs: bool) -> None:
    word = "+logging.recorder.hangs_at=2" if hangs else "+logging.recorder={}"
    run.cfg = compose.load(["plugins=[recorder_plugin]", f"dir={run.dir.path}", word])
    compose.save(run.cfg, run.dir.config)
    run.dir.record("start", step=0)
    run.steps(1, 2)
    with subprocess.Popen([sys.executable, "-c", RANK, str(run.dir.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as rank:
        assert rank.stdout and rank.stdout.readline() == b"started\n"
        run.followers = Followers(run.cfg, run.dir.path)
        run.until(lambda: run.calls("hangs") if hangs else run.given() == [1, 2])
        rank.kill()
    pid = run.calls("open")[0]["pid"]
    run.until(lambda: not _runs(pid))
    assert run.calls("close") == ([] if hangs else [{"call": "close", "outcome": "crashed", "code": 1}])


def _runs(pid: int) -> bool:
    """Not even as a zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_one_that_cannot_be_started_does_not_end_the_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    found = run.start()
    assert "recorder: cannot be started" in found.told()[0]
    assert found.told() == []
    found.close("finished", 0)


def test_a_checkpoint_remembers_the_id(run: Run, tmp_path: Path) -> None:
    found = run.start()
    run.steps(1, 2)
    run.until(lambda: run.kept(2))
    state = found.state(2)["recorder"]
    run.close()
    assert state == {"id": run.calls("open")[0]["id"], "count": 2, "step": 2}

    state_file(run.dir.path, "recorder").unlink()  # the folder came back from storage without it
    run.start(step=2, remembered={"recorder": state})
    run.close()
    assert run.calls("open")[-1]["state"] == state and run.given() == [1, 2, 1, 2]

    write_state(run.dir.path, "recorder", {"id": "another1"})  # the checkpoint's counts
    run.start(step=2, remembered={"recorder": state})
    run.close()
    assert run.calls("open")[-1]["id"] == state["id"]

    fork = Run(tmp_path / "fork")  # started from that checkpoint, which is another run's
    fork.start(step=2)
    fork.close()
    assert fork.calls("open")[0]["id"] != state["id"]


def test_a_state_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    state_file(tmp_path, "x").parent.mkdir()
    for text in ("", "[1]", '{"id": "../../x"}', '{"id": null}'):
        state_file(tmp_path, "x").write_text(text)
        assert read_state(tmp_path, "x") == {}


@pytest.mark.parametrize(("event", "title", "level"), [
    ({"event": "spike", "step": 5, "reason": "loss 9 is above 3"}, "spike", WARN),
    ({"event": "skip", "step": 5, "reason": "loss nan, gradient norm nan: not finite"}, "NaN", ERROR),
    ({"event": "skip", "step": 5, "reason": "loss 9 is above 3"}, "skipped", WARN),
    ({"event": "skip", "step": 5, "reason": "gradients overflowed under the loss scale 65536"}, None, None),
    ({"event": "rollback", "step": 5, "to": 2, "reason": "loss 9"}, "Rolled back", WARN),
    ({"event": "hang", "reason": "rank 3 is silent", "ranks": [3]}, "hangs", ERROR),
    ({"event": "straggler", "step": 5, "rank": 3, "host": "n1", "ratio": 2.0, "slow": True}, "Slow rank", WARN),
    ({"event": "straggler", "step": 5, "rank": 3, "host": "n1", "ratio": 1.0, "slow": False}, None, None),
    ({"event": "requeued", "job": 7, "reason": "time is up"}, "requeued", WARN),
    ({"event": "failed", "reason": "out of memory"}, "failed", ERROR),
    ({"event": "corrupt_checkpoint", "problem": "sha256", "moved_to": "x"}, "Corrupt", ERROR),
    ({"event": "start", "step": 0}, None, None),
    ({"event": "save", "step": 5}, None, None),
    ({}, None, None),
])  # fmt: skip
def test_alerts(event: dict[str, Any], title: str | None, level: str | None) -> None:
    found = alert(event)
    assert (found is None) == (title is None)
    if found is not None and title is not None:
        assert title in found.title and found.level == level and found.step == event.get("step")
        assert all(str(event[key]) in found.text for key in ("step", "reason", "problem", "host", "to") if key in event)
