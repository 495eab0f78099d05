"""Tokens per second of a training step: this package and its peers, in one run, taking turns.

    python -m venv peers && peers/bin/pip install -c constraints.txt litgpt transformers accelerate ai2-olmo-core
    python benchmarks/peers.py --peers-python peers/bin/python --nanogpt DIR --text FILE --compile --out FILE.md

The piece of work: 16 windows of 256 bytes a step, 6 layers, width 384, 6 heads, 10.8M parameters, AdamW, gradients clipped to 1.0,
each trainer in its own idiom and with its own defaults (`trainers.py`). The trainers of a column stay alive side by side (count on
2 GB for each) and take turns of a few steps, so that whatever else the machine does meets all of them alike; the first step of a
turn finds cold caches and does not count. On a busy machine only the ratios mean anything, and not much: read "waiting for a core",
and see --max-wait. A trainer that is not there is left out, with a line that says why.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import select
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TOKENS = 16 * 256  # of a step
INSTALL = "pip install -c constraints.txt litgpt transformers accelerate ai2-olmo-core"
NAMES = {"ours": "megatron_scratch", "nanogpt": "nanoGPT", "litgpt": "litgpt", "hf_trainer": "HF Trainer", "olmo_core": "OLMo-core"}
PACKAGES = {"litgpt": ["litgpt", "lightning"], "hf_trainer": ["transformers", "accelerate"], "olmo_core": ["ai2-olmo-core"]}
VERSIONS = "import json, sys\nfrom importlib import metadata\nprint(json.dumps({n: metadata.version(n) for n in sys.argv[1:]}))"


class Failed(Exception):
    """A trainer cannot be measured; the message says why."""


@dataclass(frozen=True)
class Mode:
    """A column of the table."""

    precision: str
    compile: bool

    def __str__(self) -> str:
        return f"{self.precision} {'compile' if self.compile else 'eager'}"


@dataclass(frozen=True)
class Step:
    """One measured step: seconds, CPU seconds of all threads, seconds in which threads waited for a core."""

    seconds: float
    cpu: float
    waited: float


@dataclass
class Cell:
    """What was measured of one trainer in one mode: the steps of each turn."""

    rounds: list[list[Step]] = field(default_factory=list)
    rss_mb: float = 0.0
    greeting: dict[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> list[Step]:
        return [step for turn in self.rounds for step in turn]


class Worker:
    """A trainer in a process of its own, between steps until it is asked for some."""

    def __init__(self, python: str, words: Sequence[str], env: dict[str, str], timeout: float) -> None:
        self.timeout, self.log = timeout, tempfile.TemporaryFile("w+")
        command = [python, str(HERE / "trainers.py"), *words]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=env)

    def read(self) -> dict[str, Any]:
        """Its next message. Raises Failed when it died or says nothing in time."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], self.timeout)
        line = self.process.stdout.readline() if ready else ""
        if not line:
            raise Failed(f"no answer in {self.timeout:.0f} s" if not ready else self._last_words())
        return json.loads(line)

    def run(self, steps: int) -> dict[str, Any]:
        """Let it run `steps` steps; returns their times and its peak memory."""
        assert self.process.stdin is not None
        try:
            print(steps, file=self.process.stdin, flush=True)
        except BrokenPipeError as error:
            raise Failed(self._last_words()) from error
        return self.read()

    def _last_words(self) -> str:
        self.process.wait()
        self.log.seek(0)
        lines = [line.strip() for line in self.log if line.strip()]
        return f"exit code {self.process.returncode}: {lines[-1][:300] if lines else 'no message'}"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()


@dataclass
class Run:
    """All that is asked for, and what came of it."""

    args: argparse.Namespace
    versions: dict[str, str] = field(default_factory=dict)  # trainer -> its packages, for those that are there
    skipped: dict[str, str] = field(default_factory=dict)  # trainer, or trainer and mode -> why not
    cells: dict[tuple[str, Mode], Cell] = field(default_factory=dict)
    load: tuple[float, float] = (0.0, 0.0)  # mean number of runnable processes over a minute, before and after

    @property
    def modes(self) -> list[Mode]:
        return [Mode(p, c) for c in ((False, True) if self.args.compile else (False,)) for p in ("fp32", "bf16")]


def python_of(trainer: str, args: argparse.Namespace) -> str | None:
    """The Python that runs a trainer. nanoGPT needs torch alone, so ours will do."""
    if trainer == "ours":
        return args.python
    return args.peers_python or (args.python if trainer == "nanogpt" else None)


def look_around(run: Run) -> None:
    """Find out which trainers are there, and their versions; note why the others are not."""
    for trainer in run.args.trainers:
        python = python_of(trainer, run.args)
        if python is None:
            run.skipped[NAMES[trainer]] = f"not installed (--peers-python PATH not given); {INSTALL}"
        elif trainer == "nanogpt":
            model = run.args.nanogpt and Path(run.args.nanogpt) / "model.py"
            if not model:
                run.skipped[NAMES[trainer]] = "not given (--nanogpt DIR, a checkout of karpathy/nanoGPT)"
            elif not model.is_file():
                run.skipped[NAMES[trainer]] = "no model.py in the folder given"
            else:
                run.versions[trainer] = f"model.py sha256 {hashlib.sha256(model.read_bytes()).hexdigest()[:12]}"
        else:
            packages = ["megatron-scratch"] if trainer == "ours" else PACKAGES[trainer]
            found = subprocess.run([python, "-c", VERSIONS, *packages], capture_output=True, text=True, check=False)
            if found.returncode:
                run.skipped[NAMES[trainer]] = f"not installed; {INSTALL if trainer != 'ours' else 'pip install -e .'}"
            else:
                run.versions[trainer] = ", ".join(f"{name} {version}" for name, version in json.loads(found.stdout).items())


def start(run: Run, trainer: str, mode: Mode) -> Worker:
    """Start a trainer, on CPUs only; it runs its first step at once."""
    args, threads = run.args, str(run.args.threads)
    words = [trainer, mode.precision, "--threads", threads]
    words += ["--compile"] if mode.compile else []
    words += ["--text", str(args.text)] if args.text else []
    words += ["--source", str(args.nanogpt)] if trainer == "nanogpt" else []
    env = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": "",
           "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}  # fmt: skip
    python = python_of(trainer, args)
    assert python is not None
    return Worker(python, words, env, args.timeout)


def measure(run: Run, mode: Mode) -> None:
    """Fill one column: start all trainers, warm each up, then take turns, beginning with another one in every round."""
    workers: dict[str, Worker] = {}
    try:
        for trainer in run.versions:
            worker = workers[trainer] = start(run, trainer, mode)
            with_failure(run, workers, trainer, mode, lambda w=worker: warm_up(w, run.args.warmup))
        for r in range(run.args.rounds):
            names = list(workers)
            for trainer in names[r % max(1, len(names)) :] + names[: r % max(1, len(names))]:
                with_failure(run, workers, trainer, mode, lambda w=workers[trainer]: w.run(run.args.discard + run.args.steps))
            say(f"{mode}: round {r + 1} of {run.args.rounds}")
    finally:
        for worker in workers.values():
            worker.close()


def warm_up(worker: Worker, steps: int) -> dict[str, Any]:
    """The first step, with compilation, and some more; none of them counts."""
    greeting = worker.read()
    if steps:
        worker.run(steps)
    return {"greeting": greeting}


def with_failure(run: Run, workers: dict[str, Worker], trainer: str, mode: Mode, turn: Any) -> None:
    """Take a turn and keep what it says; a trainer that fails leaves this column and the others go on."""
    try:
        answer = turn()
    except Failed as error:
        run.skipped[f"{NAMES[trainer]}, {mode}"] = str(error)
        say(f"{mode}: {NAMES[trainer]} failed: {error}")
        workers.pop(trainer).close()
        return
    cell = run.cells.setdefault((trainer, mode), Cell())
    if "greeting" in answer:
        cell.greeting = answer["greeting"]
        return
    steps = [Step(*times) for times in answer["steps"][run.args.discard :]]
    cell.rounds.append([s for s in steps if waiting([s], run.args.threads) <= run.args.max_wait])
    cell.rss_mb = answer["rss_mb"]


def waiting(steps: list[Step], threads: int) -> float:
    """Part of the threads' time in which they were ready to run but something else had the core."""
    return sum(s.waited for s in steps) / (threads * sum(s.seconds for s in steps)) if steps else 0.0


def rates(steps: list[Step]) -> list[float]:
    return [TOKENS / s.seconds for s in steps]


def span(values: list[float], form: str) -> str:
    """min / median / max."""
    return " / ".join(format(f(values), form) for f in (min, statistics.median, max)) if values else "-"


def ratios(ours: Cell | None, peer: Cell | None) -> list[float]:
    """Our tokens/s over the peer's: one number from the medians of each round in which both have steps."""
    pairs = zip(ours.rounds, peer.rounds, strict=False) if ours and peer else ()
    return [statistics.median(rates(a)) / statistics.median(rates(b)) for a, b in pairs if a and b]


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def speed_table(run: Run) -> str:
    """Tokens/s, and the most memory over all modes."""
    rows = []
    for trainer in run.versions:
        cells = [run.cells.get((trainer, mode), Cell()) for mode in run.modes]
        rss = max(cell.rss_mb for cell in cells)
        rows.append([NAMES[trainer], *(span(rates(c.steps), ",.0f") for c in cells), f"{rss:,.0f}" if rss else "-"])
    return table(["trainer", *map(str, run.modes), "peak RSS MB"], rows)


def ratio_table(run: Run) -> str:
    """Ours to each peer."""
    rows = []
    for trainer in run.versions:
        pairs = [(run.cells.get(("ours", mode)), run.cells.get((trainer, mode))) for mode in run.modes]
        if trainer != "ours":
            rows.append([NAMES[trainer], *(span(ratios(*pair), ".2f") for pair in pairs)])
    return table(["ours to", *map(str, run.modes)], rows)


def fact_table(run: Run) -> str:
    """What each row really ran, and whether it had the machine to itself."""
    rows = []
    for trainer, version in run.versions.items():
        cells = [run.cells[trainer, mode] for mode in run.modes if (trainer, mode) in run.cells]
        if not cells:
            continue
        steps = [step for cell in cells for step in cell.steps]
        hello = cells[0].greeting
        cores = sum(s.cpu for s in steps) / sum(s.seconds for s in steps) if steps else 0.0
        what = [
            f"{version}, torch {hello.get('torch', '?')}",
            f"{hello.get('parameters', 0) / 1e6:.2f}M",
            hello.get("optimizer", "?"),
        ]
        rows.append([NAMES[trainer], *what, f"{cores:.2f}", f"{waiting(steps, run.args.threads):.0%}", str(len(steps))])
    return table(["trainer", "version", "parameters", "optimizer", "cores used", "waiting for a core", "steps"], rows)


def report(run: Run) -> str:
    """The whole answer in Markdown."""
    args = run.args
    what = f"bytes of {Path(args.text).name}" if args.text else "random bytes"
    kept = f", nor do steps that waited for a core for more than {args.max_wait:.0%} of their time" if args.max_wait < 1 else ""
    lines = [
        "# A training step on a CPU: this package and its peers",
        f"`{command()}`  \ncommit {commit()}, {time.strftime('%Y-%m-%d')}, {cpu()}, {args.threads} threads, "
        f"Python {platform.python_version()}, {platform.system()}",
        f"{TOKENS:,} tokens a step ({what}): 16 x 256, vocabulary 256, 6 layers, width 384, 6 heads, AdamW, clip 1.0. "
        f"{args.rounds} rounds in which the trainers take turns of {args.discard + args.steps} steps; the first {args.discard} of "
        f"each turn do not count{kept}. Load of the machine (1 minute) before {run.load[0]:.1f}, after {run.load[1]:.1f}.",
        "Tokens/s, min / median / max over steps:", speed_table(run),
        "Ours to each peer, min / median / max over rounds (above 1: ours is faster):", ratio_table(run),
        "What ran:", fact_table(run),
    ]  # fmt: skip
    lines += ["Not measured:\n\n" + "\n".join(f"- {name}: {why}" for name, why in run.skipped.items())] if run.skipped else []
    return "\n\n".join(lines) + "\n"


def command() -> str:
    """The command line, with folders left out of absolute paths."""
    words = ["python", "benchmarks/peers.py", *sys.argv[1:]]
    return shlex.join(Path(w).name if os.path.isabs(w) else w for w in words)


def commit() -> str:
    """The commit of this checkout, and whether files differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(HERE), *words], capture_output=True, text=True, check=False).stdout.strip()

    return (git("rev-parse", "--short", "HEAD") or "unknown") + (" with changes" if git("status", "--porcelain", "-uno") else "")


def cpu() -> str:
    """The processor's name and the number of cores that this process may use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{names[0] if names else platform.processor() or platform.machine()}, {cores} cores"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="Python that has this package (this one)")
    parser.add_argument("--peers-python", help="Python that has the peers")
    parser.add_argument("--nanogpt", help="folder with nanoGPT's model.py")
    parser.add_argument("--text", help="file whose bytes are the tokens (random bytes)")
    parser.add_argument("--compile", action="store_true", help="also with torch.compile; needs a C++ compiler")
    parser.add_argument("--trainers", nargs="+", choices=NAMES, default=list(NAMES), help="which ones (all)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="measured steps of a turn (3)")
    parser.add_argument("--discard", type=int, default=1, help="steps at the start of a turn that do not count (1)")
    parser.add_argument("--warmup", type=int, default=2, help="steps after the very first one that do not count (2)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--max-wait", type=float, default=1.0, help="leave out steps that waited for a core for more of their time (1)"
    )
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for a turn, or for starting and compiling (900)")
    parser.add_argument("--out", type=Path, help="also write the report here")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measure and report; 1 if nothing could be measured."""
    run = Run(parse(argv))
    look_around(run)
    if not run.versions:
        print("\n".join(f"{name}: {why}" for name, why in run.skipped.items()))
        return 1
    before = os.getloadavg()[0]
    for mode in run.modes:
        measure(run, mode)
    run.load = (before, os.getloadavg()[0])
    text = report(run)
    print(text, end="")
    if run.args.out:
        run.args.out.write_text(text)
    return 0 if any(cell.rounds for cell in run.cells.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
