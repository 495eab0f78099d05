"""Weights & Biases: one run there for a run here, whatever its layout and however often it starts.

Where the run stands is asked of W&B's own record, the server's or that on disk, and what it lacks is read from the run's files: no
row depends on what an earlier process remembered. Without a server or a key all goes to disk, for `wandb sync`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

from megatron_scratch.config.logging import WandbConfig
from megatron_scratch.logs import wandb_file, wandb_steps
from megatron_scratch.logs.alerts import alert
from megatron_scratch.logs.sink import Begin, Row
from megatron_scratch.logs.tail import Rows
from megatron_scratch.logs.wandb_artifacts import References
from megatron_scratch.util.env import prepare_wandb
from megatron_scratch.util.exits import STOPPED
from megatron_scratch.util.files import write_json

AWAY = "W&B cannot be reached"
PAUSE, PATIENT = 600.0, 60.0  # seconds until a server is asked again, and that it then has
OLD = timedelta(days=1)  # what happened before that is no news: W&B may be added to a run that is there
LOWEST = ("train/loss", "val/*")  # of which the best is worth knowing
LAST = 2.0  # seconds that the last artifact has; with FINISH_TIMEOUT, less than a run waits for at its end


class Wandb:
    def __init__(self, settings: WandbConfig, begin: Begin, say: Callable[[str], None]) -> None:
        """
        Raises:
            ImportError: there is no wandb.
        """
        self.settings, self.begin, self.say = settings, begin, say
        self.folder = begin.run_dir / "wandb"
        prepare_wandb(self.folder / "cache")
        import wandb

        self.wandb: Any = wandb
        self.told = Told(self.folder / "told.json")
        self.state = begin.state
        self.references = References(wandb, begin, lambda: self.run, say)
        self.pause, self.again = PAUSE, float("inf")  # seconds until a server that was away is tried again, and when that is
        self._begin()

    # Opening

    def _begin(self, timeout: float | None = None) -> None:
        self.run: Any = self._open(timeout)
        self._describe()
        self.steps = self._where()
        self._catch_up()

    def _open(self, timeout: float | None) -> Any:
        """The run, at the server if it answers, else on disk."""
        if self.settings.mode == "offline":
            return self._on_disk("")
        try:
            run = self._init("online", timeout)
        except Exception as error:  # of many kinds: the client raises its own, and what it stumbles over
            self.wandb.teardown()  # which still holds the run's id
            why = _why(error)
            self.again = time.monotonic() + self.pause if why.startswith(AWAY) else float("inf")
            return self._on_disk(why)
        self.again = float("inf")
        self.say(f"{'goes on' if run.resumed else 'begins'} at {run.url}")
        for path in wandb_file.files(self.folder, run.id):  # all that these have comes from the run's own files
            if path.parent.name.startswith("offline-"):
                path.with_name(path.name + ".synced").touch()
        return run

    def _on_disk(self, why: str) -> Any:
        run = self._init("offline")
        self.say(f"{why}{'; ' if why else ''}the run is recorded in {Path(run.dir).parent}; to send it: wandb sync {self.folder}")
        return run

    def _try_again(self) -> None:
        """A server that did not answer may do so by now. To ask costs 5 s at most; only then the run on disk is left for it."""
        self.pause *= 2
        self.again = time.monotonic() + self.pause
        if _answers(self.run.settings.base_url):
            self.run.finish(exit_code=0)
            self._begin(PATIENT)

    def _init(self, mode: str, timeout: float | None = None) -> Any:
        s, begin = self.settings, self.begin
        return self.wandb.init(
            id=begin.state["id"], resume="allow", mode=mode, dir=str(begin.run_dir), project=s.project, entity=s.entity,
            name=s.name or begin.name, group=s.group, job_type=s.job_type, tags=list(s.tags) or None, notes=s.notes,
            settings=self._client(timeout), reinit="finish_previous",
        )  # fmt: skip

    def _client(self, timeout: float | None) -> Any:
        """Settings of the client; those that an older one does not have are left out."""
        wanted = {
            "console": "off",  # what ranks print is in RUN/logs, and this process prints nothing of interest
            "silent": True,  # else it asks the server who the user is, to say so: 10 s where none answers, beside init_timeout
            "save_code": False, "disable_code": True, "disable_git": True,  # a diff of the user's checkout is not ours to send
            "program": "megatron-scratch", "program_relpath": "megatron-scratch", "program_abspath": "",
            "x_stats_pid": os.getppid(),  # the rank, not this process
            "x_transaction_log_flush_interval": 1.0,  # seconds of rows that a kill can take
            "finish_timeout_raises": True,
            **({"init_timeout": timeout} if timeout else {}),  # else what util.env says
        }  # fmt: skip
        known = self.wandb.Settings.model_fields
        return self.wandb.Settings(**{key: value for key, value in wanted.items() if key in known})

    def _describe(self) -> None:
        """What W&B knows of the run beside its rows. Of a run that goes on, the newest config counts."""
        facts = {key: value for key, value in self.begin.facts.items() if key not in ("time", "event", "step")}
        self.run.config.update({**self.begin.config, "start": facts}, allow_val_change=True)
        for axis in ("step", "tokens"):
            self.run.define_metric(axis)
        self.run.define_metric("*", step_metric="step")
        for name in LOWEST:
            self.run.define_metric(name, step_metric="step", summary="last,min")

    def _where(self) -> wandb_steps.Steps:
        """After which row of the run to go on."""
        if self.run.offline:
            paths = [path for path in wandb_file.files(self.folder, self.run.id) if path.stat().st_size]
            newest = next((row for row in map(wandb_file.last_row, reversed(paths)) if row), {})
            there, last = int(newest.get("_step", -1)), newest.get("step")
        else:  # after an outage a server may have less than was sent
            summary = self.run.summary
            next_one = getattr(self.run, "_starting_step", 0)  # as the server counts; what the client calls `step` begins with 0
            there = max(next_one - 1, summary.get("_step", -1)) if self.run.resumed else -1
            last = summary.get("step") if there >= 0 else None
        state = self.state
        last = int(there - state.get("offset", 0) if last is None else last)
        steps = wandb_steps.Steps(last, there - last, int(state.get("high", -1)))
        if state.get("attempt") != self._attempt():  # else this start of the run has been here already
            steps.rewound(self.begin.start_step)
        return steps

    def _attempt(self) -> Any:
        return self.begin.facts.get("attempt")

    def _catch_up(self) -> None:
        """Take from the run's files what W&B does not have."""
        files = {"metrics": self.metrics, "layers": self.layers, "samples": self.sample, "ledger": self.event}
        for name, take in files.items():
            file = Rows(self.begin.run_dir / f"{name}.jsonl")
            while rows := file.new():
                for row in rows:
                    take(row)

    # Rows

    def metrics(self, row: Row) -> None:
        self.steps.add(wandb_steps.metrics(row))

    def layers(self, row: Row) -> None:
        self.steps.add(wandb_steps.layers(row))

    def sample(self, row: Row) -> None:
        """As a table of the step, in which all of its prompts are."""
        if self.settings.artifacts:
            self.steps.add_sample(row)

    def rewound(self, step: int) -> None:
        self.steps.rewound(step)

    def flush(self) -> dict[str, Any]:
        self._send(all_of_it=False)
        steps = self.steps
        self.state = {"id": self.run.id, "step": steps.last, "offset": steps.offset, "high": steps.high, "attempt": self._attempt()}
        if time.monotonic() >= self.again:
            self._try_again()
        return self.state

    def _send(self, all_of_it: bool) -> None:
        for step, values in self.steps.ready(all_of_it):
            if samples := values.get(wandb_steps.SAMPLES):
                columns = list(samples[0])
                table = self.wandb.Table(columns=columns, data=[[row.get(name) for name in columns] for row in samples])
                values = {**values, wandb_steps.SAMPLES: table}
            self.run.log(values, step=step, commit=True)

    # What happens to the run

    def event(self, row: Row) -> None:
        """An alert, or an artifact; each once, also if the ledger is read again."""
        news, made = alert(row) if self.settings.alerts else None, self.settings.artifacts and self.references.wants(row)
        if not (news or made) or not _is_new(row) or row in self.told:
            return
        if news is not None:
            self.run.alert(news.title, news.text, level=news.level, wait_duration=0)
        if made:
            self.references.put(row)
        self.told.add(row)

    def close(self, outcome: str, code: int) -> None:
        self._send(all_of_it=True)
        self.references.wait(LAST)
        if code == STOPPED:
            self.run.mark_preempting()  # then it is not called failed there
        try:
            self.run.finish(exit_code=code)
        except TimeoutError:
            folder = Path(self.run.dir).parent
            self.say("W&B has not taken everything in time; the next start of the run sends it, or else: "
                     f"wandb sync --include-online {folder}")  # fmt: skip


class Told:
    """Events that W&B has been told of: a file, written after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.keys: list[str] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self.keys = []

    def __contains__(self, row: Row) -> bool:
        return _key(row) in self.keys

    def add(self, row: Row) -> None:
        self.keys = [*self.keys, _key(row)][-1000:]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.keys)


def _key(row: Row) -> str:
    return f"{row.get('time')} {row.get('event')} {row.get('step', '')}"


def _is_new(row: Row) -> bool:
    try:
        return datetime.now(timezone.utc) - datetime.strptime(str(row["time"]), "%Y-%m-%dT%H:%M:%S%z") < OLD
    except (KeyError, ValueError):
        return False


def _why(error: Exception) -> str:
    """What kept a run from W&B, and what would mend it."""
    text = " ".join(str(error).split())
    if "API key" in text or "api_key" in text:
        return "no key for W&B, give WANDB_API_KEY or call `wandb login` once"
    if "401" in text or "403" in text:
        return f"W&B does not accept the key in WANDB_API_KEY or ~/.netrc ({text[:200]})"
    return f"{AWAY} ({text[:200]})"


def _answers(url: str) -> bool:
    """Whether anybody is there, whatever they say."""
    try:
        with urlopen(url, timeout=5):
            return True
    except HTTPError as error:
        return error.code < 500
    except (OSError, HTTPException):
        return False
