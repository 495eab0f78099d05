"""The report of a sweep: what became of each point, from sweep.json, the run directories, and squeue where it is there.

Nothing is computed and nothing locked: files are read from their ends, so that a sweep of many long runs is answered at once.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

from megatron_scratch.launch.sweep.record import alive, read

TAIL = 1 << 16  # bytes; a row of metrics.jsonl has about 250
FINAL = ("finished", "stopped", "failed", "dropped", "not started")
SQUEUE_SECONDS = 10.0
METRICS = ("step", "loss", "val_loss", "tokens_per_second", "mfu", "memory_gib")
SAID = re.compile(r"^(?:error|failed|stopped|interrupted): .*|^.*(?:CANCELLED|DUE TO ).*", re.MULTILINE)


def report(path: Path) -> list[dict[str, Any]]:
    """A row for each point, the best validation loss first.

    Keys: number, overrides, state, reason, jobs (of Slurm), dir, and the newest step, loss, val_loss, tokens_per_second, mfu,
    memory_gib, each None where there is none.
    """
    record = read(path)
    homes = [path / str(point["number"]) for point in record["points"]]
    jobs = [jobs_of(home) for home in homes]
    queue = squeue(path) if any(jobs) else {}
    working = alive(record.get("host"), record.get("process"))
    rows = []
    for point, home, numbers in zip(record["points"], homes, jobs, strict=True):
        state, reason = job_state(home, numbers, queue) if numbers else process_state(point, home, working)
        rows.append({"number": point["number"], "overrides": point["overrides"], "state": state, "reason": reason, "jobs": numbers,
                     "dir": str(home), **newest(home / "metrics.jsonl", METRICS)})  # fmt: skip
    return sorted(rows, key=lambda row: (_order(row["val_loss"]), row["number"]))


def lines(path: Path, rows: list[dict[str, Any]]) -> list[str]:
    """The report for a person."""
    from megatron_scratch.checkpoint.inspect import table

    head = ["point", "overrides", "state", "step", "loss", "val_loss", "tokens/s", "MFU", "GiB", ""]
    cells = [[row["number"], " ".join(row["overrides"]), row["state"], row["step"], _number(row["loss"], ".4f"),
              _number(row["val_loss"], ".4f"), _number(row["tokens_per_second"], ",.0f"), _number(row["mfu"], ".1%"),
              _number(row["memory_gib"], ".2f"), row["reason"]] for row in rows]  # fmt: skip
    counts = Counter(row["state"] for row in rows)
    said = ", ".join(f"{count} {state}" for state, count in counts.items())
    fixed = " ".join(read(path)["fixed"])
    return [f"{path}: {said}", *([f"all with {fixed}"] if fixed else []), *table(head, cells, right=(0, 3, 4, 5, 6, 7, 8))]


def newest(file: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    """The newest value of each key in a file of JSON lines; None where it has none. The whole file is read only for what is old."""
    found: dict[str, Any] = {}
    for rows in (_rows(file, TAIL), None):
        for row in reversed(_rows(file, None) if rows is None else rows):
            for key in keys:
                if key in row:
                    found.setdefault(key, row[key])
        if len(found) == len(keys) or not found:
            break
    return {key: found.get(key) for key in keys}


def ended(home: Path) -> dict[str, Any]:
    """The newest event of a run's ledger that begins or ends it; empty before the first."""
    events = [row for row in _rows(home / "ledger.jsonl", TAIL) if row.get("event") in ("start", "finish", "stop", "failed")]
    return events[-1] if events else {}


def jobs_of(home: Path) -> list[int]:
    """Every job that was submitted for a run, in their order."""
    numbers = []
    for file in sorted(home.glob("jobs/*/submitted.json")):
        try:
            numbers += [int(number) for number in json.loads(file.read_text(encoding="utf-8"))["ids"]]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return numbers


def squeue(path: Path) -> dict[int, str] | None:
    """Job -> state, of all jobs of the sweep's owner that wait or run. None: Slurm cannot be asked from here."""
    if shutil.which("squeue") is None:
        return None
    words = ["squeue", "--noheader", f"--user={path.stat().st_uid}", "--format=%i %T"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=SQUEUE_SECONDS)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode:
        return None
    return {int(job): state for job, _, state in (line.partition(" ") for line in done.stdout.splitlines()) if job.isdigit()}


def job_state(home: Path, jobs: list[int], queue: dict[int, str] | None) -> tuple[str, str]:
    """State and reason of a point that was submitted.

    pending: not begun. requeued: has run, and waits to go on. Neither waiting nor running: over, by the run's ledger or the job's
    last words.
    """
    event = ended(home)
    why = str(event.get("reason", "")) if event.get("event") in ("stop", "failed") else ""
    if queue is None:
        words = {"start": "started", "finish": "finished", "stop": "stopped", "failed": "failed", None: "submitted"}
        return words[event.get("event")], "as its run says; Slurm cannot be asked from here"
    there = [queue[job] for job in jobs if job in queue]
    if any(state != "PENDING" for state in there):
        return "running", ""
    if there:
        return ("requeued", why) if _begun(home) else ("pending", "")
    if event.get("event") == "finish":
        return "finished", ""
    said = _job_said(home, jobs)
    stopped = said.startswith("stopped: ") or not said and event.get("event") == "stop"
    said = said.partition(": ")[2] if said.startswith(("stopped: ", "failed: ", "error: ")) else said
    return "stopped" if stopped else "failed", said or why or f"ended without a word; see {home / 'logs'}"


def process_state(point: dict[str, Any], home: Path, working: bool) -> tuple[str, str]:
    """State and reason of a point that is a process here, or has come to nothing before it was one.

    Args:
        working: the sweep itself is still at it.
    """
    state, reason = point.get("state", "planned"), point.get("reason", "")
    event = ended(home)
    if state == "dropped" or event.get("event") == "finish":
        return ("dropped", reason) if state == "dropped" else ("finished", "")
    if event.get("event") == "start" and _held(home):
        return "running", ""
    if state in FINAL:
        return state, reason
    if event.get("event") in ("stop", "failed"):
        return "stopped" if event["event"] == "stop" else "failed", str(event.get("reason", ""))
    if state == "planned":
        return ("pending", "") if working else ("not started", "the sweep ended before its turn")
    if working:
        return ("running" if state == "started" else state), ""
    if state == "submitting":
        return "unknown", f"the sweep ended while it submitted it; squeue --name={point.get('name')} tells"
    return "failed", f"ended without a word, and so did the sweep; see {home / 'logs'}"


def _begun(home: Path) -> bool:
    """Has a job of this run ever started it?"""
    return any(row.get("event") == "job" for row in _rows(home / "ledger.jsonl", None))


def _job_said(home: Path, jobs: list[int]) -> str:
    """The last words of the newest job that has any."""
    for job in reversed(jobs):
        log = home / "logs" / f"slurm_{job}.log"
        if log.exists() and (found := SAID.findall(_tail(log, TAIL))):
            return " ".join(found[-1].split())[:300]
    return ""


def _held(home: Path) -> bool:
    """Does a process of this machine train in the run directory? Its lock is read, never tried: a run may be about to take it."""
    try:
        text = (home / ".lock").read_text(encoding="utf-8")
    except OSError:
        return False
    found = re.match(r"process (\d+) on (\S+),", text)
    return bool(found) and alive(found[2], found[1])  # type: ignore[index]


def _rows(file: Path, tail: int | None) -> list[dict[str, Any]]:
    """The last rows of a file that may be being written to; a torn one is passed over."""
    rows = []
    for line in _tail(file, tail).splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _tail(file: Path, size: int | None) -> str:
    try:
        with open(file, "rb") as f:
            if size is not None:
                f.seek(max(0, f.seek(0, 2) - size))
            return f.read().decode("utf-8", errors="replace")
    except OSError:
        return ""


def _order(value: object) -> float:
    return value if isinstance(value, (int, float)) and not math.isnan(value) else math.inf


def _number(value: object, form: str) -> str | None:
    return format(value, form) if isinstance(value, (int, float)) else None
