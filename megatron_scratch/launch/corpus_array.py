"""`corpus.engine=slurm`: the unfinished tasks of a stage as a job array of Slurm, and this process waiting for it.

    coordinator (`data prepare`, on a login node or as a job)    submits, looks at markers and at the queue, submits what is missing
    element K of n, on some node                                 runs tasks K, K + n, ... of the list, in one process

A task that an element leaves unfinished - killed, out of memory or time, cancelled, a node lost - is submitted again, at most
launcher.max_restarts times; one that is preempted is requeued by Slurm itself, and goes on with the tasks that have no marker.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import string
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import megatron_scratch
from megatron_scratch.config.corpus import CorpusConfig
from megatron_scratch.config.launcher import PATH, LauncherConfig, SlurmConfig, check_launcher, fits
from megatron_scratch.launch.array import Array, largest_array, last_words, query, tail
from megatron_scratch.launch.slurm import carried, need
from megatron_scratch.launch.step import contained, secrets
from megatron_scratch.util.env import everything
from megatron_scratch.util.errors import RunFailed, UserError
from megatron_scratch.util.files import atomic_write, write_json

AT_ONCE = 64  # elements that run at a time, where corpus.workers says nothing
EACH = 16  # elements in an array for one that runs: sites limit the jobs that one may submit, often at 1000
SHORTEST, LONGEST = 0.2, 4.0  # seconds between two looks: short at first, for arrays that take seconds
GONE = 90.0  # seconds for a cancelled array to end: Slurm kills after KillWait, 30 by default
SETTLE = 5.0  # seconds that a marker may take from a node's disk cache to here, once its element has ended
USED = ("name", "time", "partition", "account", "qos", "constraint", "reservation", "exclude", "mem_per_node", "sbatch",
        "container", "image", "mounts", "setup", "env", "secrets_file", "python", "requeue", "max_restarts")  # fmt: skip
# what may be said of fields that are otherwise for the ranks of `train`: an element is so anyway
ALREADY_SO = {"exclusive": False, "gpus": False, "preflight": False, "signal_seconds": 0}


class SlurmArray:
    """One coordinator. Its files are in OUTPUT/.prepare: code/, as it was when it began, and logs/."""

    def __init__(self, cfg: CorpusConfig, work: Path, say: Callable[[str], Any], launcher: LauncherConfig):
        self.launcher = check_options(launcher)
        self.work, self.say, self.at_once = work.absolute(), say, cfg.workers or AT_ONCE
        self.logs, self.current = self.work / "logs", self.work / "array.json"
        fits("corpus.output", str(self.work.parent), PATH.replace(":", ""), "data/web")
        need("sbatch")
        carried(self.launcher, everything())
        self.command = contained(self.launcher, self.logs)  # which mounts the output

    def __enter__(self) -> SlurmArray:
        self.logs.mkdir(parents=True, exist_ok=True)
        self._cancel_old()
        code = self.work / "code"
        shutil.rmtree(code, ignore_errors=True)
        package = Path(megatron_scratch.__file__).parent
        shutil.copytree(package, code / package.name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing is left to end: `run` has waited for its array or cancelled it."""

    def run(self, folder: Path, pending: list[int], finished: Callable[[int], bool]) -> Iterator[int]:
        """See `corpus.stages.Engine`.

        Raises:
            UserError: a task says that its input is bad. RunFailed: a task is unfinished after launcher.max_restarts + 1 arrays.
        """
        left, folder = set(pending), folder.absolute()
        for attempt in range(self.launcher.max_restarts + 1):
            array = self._submit(folder, sorted(left))
            try:
                for index in self._watch(array, folder, left, finished):
                    left.discard(index)
                    yield index
            finally:
                if array.alive:  # an exception, Ctrl-C, a stage that is no longer wanted
                    subprocess.run(["scancel", str(array.number)], check=False)  # who comes next waits until it is gone
                else:
                    self.current.unlink(missing_ok=True)
            if not left:
                return
            self._judge(folder, array, left, attempt)

    # submitting

    def _submit(self, folder: Path, indices: list[int]) -> Array:
        plan, n = self.logs / f"{folder.name}.json", min(len(indices), EACH * self.at_once, largest_array())
        write_json(plan, {"folder": str(folder), "tasks": indices, "elements": n,
                          "command": self.command, "secrets_file": self.launcher.secrets_file})  # fmt: skip
        script = self.logs / f"{folder.name}.sbatch"
        with atomic_write(script, "w") as f:
            f.write(self.render(folder.name, plan, n))
        done = subprocess.run(["sbatch", "--parsable", *self._excluded(), str(script)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(
                f"sbatch refuses {script}: {' '.join(done.stderr.split())[:400] or 'no reason given'}; change launcher.*"
            )
        number = int(done.stdout.split(";")[0])
        write_json(self.current, {"job": number, "name": f"prepare-{folder.name}"})
        self.say(f"{folder.name}: array job {number}, {len(indices)} tasks in {n} elements")
        return Array(number, n, indices)

    def render(self, stage: str, plan: Path, elements: int) -> str:
        """The sbatch script."""
        template = string.Template(files("megatron_scratch.templates").joinpath("corpus.sbatch").read_text(encoding="utf-8"))
        exports = [f"export {name}={shlex.quote(value)}" for name, value in carried(self.launcher, everything()).items()]
        code = f"{shlex.quote(str(self.work / 'code'))}${{PYTHONPATH:+:$PYTHONPATH}}"
        return template.substitute(
            options="\n".join(f"#SBATCH {option}" for option in self.options(stage, elements)),
            exports="\n".join([*exports, f"export PYTHONPATH={code} PYTHONSAFEPATH=1"]),
            setup=f"source {shlex.quote(self.launcher.setup)}" if self.launcher.setup else "",
            python=shlex.quote(self.launcher.python or sys.executable),
            bad_nodes=shlex.quote(str(self.logs / "bad_nodes")),
            plan=shlex.quote(str(plan)),
        )

    def options(self, stage: str, elements: int) -> list[str]:
        """The long options of sbatch; every value has been matched against its pattern. launcher.sbatch may ask for more cores."""
        c = self.launcher
        given = {
            "job-name": f"prepare-{stage}", "array": f"0-{elements - 1}%{self.at_once}", "nodes": 1, "ntasks": 1,
            **{key: getattr(c, key) for key in ("time", "partition", "account", "qos", "constraint", "reservation")},
            "mem": c.mem_per_node,
            "output": self.logs / f"{stage}_%A_%a.log", "open-mode": "append", "export": "NIL", **c.sbatch,
        }  # fmt: skip
        flag = "--requeue" if c.requeue else "--no-requeue"
        return [f"--{key}={value}" for key, value in given.items() if value not in (None, "")] + [flag]

    def _excluded(self) -> list[str]:
        """The nodes that the user leaves out and those where Python did not start: an empty one would swallow a whole array."""
        bad = self.logs / "bad_nodes"
        found = sorted(set(bad.read_text(encoding="utf-8").split())) if bad.exists() else []
        nodes = ",".join([*([self.launcher.exclude] if self.launcher.exclude else []), *found])
        return [f"--exclude={nodes}"] if nodes else []

    def _cancel_old(self) -> None:
        """An array that a coordinator left behind when it was killed: two would run the same tasks."""
        if not self.current.exists():
            return
        told = json.loads(self.current.read_text(encoding="utf-8"))
        if told["name"] in query("squeue", "--noheader", f"--jobs={told['job']}", "--format=%j").split():
            self.say(f"cancelling array job {told['job']}, which an earlier command has left")
            subprocess.run(["scancel", str(told["job"])], check=False)
            until = time.monotonic() + GONE
            while time.monotonic() < until and query("squeue", "--noheader", f"--jobs={told['job']}", "--format=%F"):
                time.sleep(1.0)
        self.current.unlink()

    # waiting

    def _watch(self, array: Array, folder: Path, left: set[int], finished: Callable[[int], bool]) -> Iterator[int]:
        """The tasks of an array as they finish, until none is left or nobody works on them any more."""
        wait, ended = SHORTEST, 0.0
        missing = set(left)
        while True:
            array.look(self.say)
            there = set(os.listdir(folder))  # one request to a file server, and no look-up of a name that is not there yet
            for index in sorted(i for i in missing if f"{i:05d}.done" in there and finished(i)):
                missing.discard(index)
                yield index
            if not array.alive:
                ended = ended or time.monotonic()
                if not missing or time.monotonic() > ended + (0 if self._said(folder, array, missing) else SETTLE):
                    return
            elif self._refusal(folder, array, missing):
                return
            time.sleep(wait)
            wait = min(wait * 1.3, LONGEST)

    def _said(self, folder: Path, array: Array, missing: set[int]) -> bool:
        """Whether each element with unfinished tasks has left an error: then nothing is on its way."""
        return all(last_words(self._log(folder, array, i)).startswith(("error: ", "failed: ")) for i in missing)

    def _refusal(self, folder: Path, array: Array, missing: set[int]) -> str:
        """What an element that has ended says of bad input, if one does."""
        for index in missing:
            if array.element(index) in array.over:
                words = last_words(self._log(folder, array, index))
                if words.startswith("error: "):
                    return f"{words.removeprefix('error: ')} ({folder.name}, task {index})"
        return ""

    def _judge(self, folder: Path, array: Array, left: set[int], attempt: int) -> None:
        """Raise unless what is left is to be submitted again."""
        array.over = set(range(array.elements))
        if refusal := self._refusal(folder, array, left):
            raise UserError(refusal)
        index = min(left)
        state = array.states.get(array.element(index), "gone")
        log = self._log(folder, array, index)
        words = last_words(log) or "its log says nothing"
        self.say(f"{folder.name}: {len(left)} tasks are unfinished; task {index} ({state.lower()}): {words[:200]}")
        if attempt == self.launcher.max_restarts:
            raise RunFailed(f"{folder.name}: task {index} is unfinished after {attempt + 1} arrays (launcher.max_restarts="
                            f"{self.launcher.max_restarts}); Slurm says {state}; the end of {log}:\n{tail(log)}")  # fmt: skip

    def _log(self, folder: Path, array: Array, index: int) -> Path:
        return self.logs / f"{folder.name}_{array.number}_{array.element(index)}.log"


def check_options(launcher: LauncherConfig) -> SlurmConfig:
    """What `launcher=slurm` asks for, or a refusal: nothing that is given has no effect."""
    if not isinstance(launcher, SlurmConfig):
        raise UserError(f"corpus.engine=slurm needs launcher=slurm, got launcher={launcher.name}; add launcher=slurm, and "
                        "launcher.partition, launcher.time ... where the cluster asks for them")  # fmt: skip
    check_launcher(launcher)
    plain = SlurmConfig()
    for name in (f.name for f in fields(SlurmConfig) if f.name not in USED):
        got = getattr(launcher, name)
        if got != getattr(plain, name) and (name not in ALREADY_SO or got != ALREADY_SO[name]):
            raise UserError(f"launcher.{name}={got} is for the ranks of `train`; an element of a job array is one process on one "
                            "node; leave it out: corpus.workers says how many run at a time")  # fmt: skip
    return launcher


def element(plan: Path, number: int) -> None:
    """Become the process that runs the tasks of one element: its secrets in the environment, its container around it."""
    told = json.loads(plan.read_text(encoding="utf-8"))
    tasks = told["tasks"][number :: told["elements"]]
    words = [*told["command"], "-m", "megatron_scratch.corpus.work", told["folder"], *map(str, tasks)]
    if told["command"][0].startswith("-"):  # options of srun, which pyxis adds to
        words = ["srun", "--ntasks=1", "--export=ALL", *words]
    os.execvpe(words[0], words, secrets(told["secrets_file"]))


if __name__ == "__main__":
    from megatron_scratch.util.exits import exit_code

    sys.exit(exit_code(lambda: element(Path(sys.argv[1]), int(sys.argv[2]))))
