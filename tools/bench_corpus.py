"""Corpus preparation measured: this package and its peers on one corpus, in one run, taking turns.

    python tools/dedup_corpus.py CORPUS --mb 160
    python -m venv peers && peers/bin/pip install -c constraints.txt torch megatron-core tokenizers datasketch rensa "xxhash<4" \\
        datatrove orjson regex humanize loguru
    python -m venv ours && ours/bin/pip install -c constraints.txt ".[corpus]"  # and no more: numba imports what is there
    ours/bin/python tools/bench_corpus.py CORPUS --peers-python peers/bin/python --out FILE.md

CPU seconds (user + system, of all processes, from their start to their end: imports, reading JSON and writing files counted) are
what is compared: other work on the machine changes them least. Parts, --only: dedup (near-deduplication, ours with the exact
check), tokens (text to .bin/.idx), scale (time and memory at 1, 4 and 16 times the corpus), edges (30 million confirmed pairs).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
PARTS = ("dedup", "tokens", "scale", "edges")
DEDUP = {"megatron_scratch 28 x 4, exact check": [], "megatron_scratch 14 x 8 (fineweb)": ["corpus.dedup=fineweb"],
         "megatron_scratch 14 x 8, exact check": ["corpus.dedup=fineweb", "corpus.minhash.threshold=0.8"]}  # fmt: skip
ENCODERS = {"gigatoken": [], "tiktoken": ["corpus.encoder=tiktoken"], "native (tokenizers)": ["corpus.encoder=native"]}
EDGES = 30_000_000


@dataclass(frozen=True)
class Cost:
    """wall and cpu in seconds, peak memory of the largest process in MB; None: could not run, and why."""

    wall: float
    cpu: float
    rss: float


def measured(command: list[str], threads: bool = False) -> Cost | str:
    """Run a command to its end. One thread for libraries that have pools, unless `threads`."""
    one = {} if threads else {name: "1" for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "NUMBA_NUM_THREADS")}
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | one | {"TOKENIZERS_PARALLELISM": "0"}
        )
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode == 0:
            return Cost(wall, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)
        log.seek(0)
        return (log.read().decode("utf-8", "replace").strip().splitlines() or [f"ended with {process.returncode}"])[-1][:160]


def ours(verb: str, corpus: Path, out: Path, *more: str) -> Callable[[], Cost | str]:
    settings = [f"corpus.input={corpus}/shard_*.jsonl", f"corpus.output={out}", "corpus.workers=1", *more]
    command = [sys.executable, "-m", "megatron_scratch", "data", verb, *settings]
    return lambda: (shutil.rmtree(out, ignore_errors=True), measured(command))[1]


def tokenizer(corpus: Path, out: Path) -> str:
    """The path of one of 32,000 ids, trained on a sample of the corpus."""
    made = ours("tokenizer", corpus, out, "corpus.tokenizer=bpe", "corpus.vocab_size=32000", "corpus.dedup=none")()
    if isinstance(made, str):
        raise SystemExit(made)
    return f"{out}/tokenizer.json"


def peer(python: str, name: str, corpus: Path, out: Path, *more: str) -> Callable[[], Cost | str]:
    return lambda: measured([python, str(HERE / "bench_corpus_peers.py"), name, str(corpus), str(out), *more])


def table(title: str, megabytes: float, rows: dict[str, Callable[[], Cost | str]], rounds: int) -> list[str]:
    """Rows take turns; medians of the rounds."""
    costs: dict[str, list[Cost]] = {name: [] for name in rows}
    failed: dict[str, str] = {}
    for _ in range(rounds):
        for name, run in rows.items():
            if name not in failed:
                cost = run()
                print(f"{title}: {name}: {cost}", flush=True)
                failed.update({name: cost}) if isinstance(cost, str) else costs[name].append(cost)
    lines = ["", f"## {title}", "", "| | CPU s | MB per CPU second | wall s | peak RSS MB |", "| --- | --- | --- | --- | --- |"]
    for name, runs in costs.items():
        if name in failed:
            lines.append(f"| {name} | not run: {failed[name]} | | | |")
            continue
        cpu, wall, rss = (statistics.median(getattr(c, key) for c in runs) for key in ("cpu", "wall", "rss"))
        lines.append(f"| {name} | {cpu:.1f} | {megabytes / cpu:.1f} | {wall:.1f} | {rss:,.0f} |")
    return lines


def steps(out: Path, title: str) -> list[str]:
    """Where our own time went, from the report of the last run in `out`."""
    from megatron_scratch.corpus.report_page import read_report

    told = read_report(out / "report.html")
    if told is None:
        return []
    lines = ["", f"Of {title}:", "", "| step | MB in | CPU s | MB per CPU second |", "| --- | --- | --- | --- |"]
    return lines + [f"| {s['label']} | {s['bytes_in'] / 1e6:.0f} | {s['cpu_seconds']:.2f} | "
                    f"{s['bytes_in'] / 1e6 / max(s['cpu_seconds'], 1e-3):,.0f} |" for s in told["steps"]]  # fmt: skip


def text_bytes(corpus: Path) -> int:
    return sum(len(json.loads(line)["text"].encode()) for path in sorted(corpus.glob("shard_*.jsonl")) for line in open(path, "rb"))


def dedup(corpus: Path, work: Path, args: argparse.Namespace) -> list[str]:
    rows = {name: ours("dedup", corpus, work / f"ours{k}", *more) for k, (name, more) in enumerate(DEDUP.items())}
    for name in ("rensa", "datasketch", "datatrove_regex", *(["datatrove"] if args.slow else [])):
        rows[f"{name} 14 x 8, no check"] = peer(args.peers_python, name, corpus, work / name)
    lines = table("Near-deduplication, whole process, JSON lines to JSON lines", text_bytes(corpus) / 1e6, rows, args.rounds)
    return lines + steps(work / "ours0", next(iter(DEDUP)))


def tokens(corpus: Path, work: Path, args: argparse.Namespace) -> list[str]:
    path = tokenizer(corpus, work / "bpe")
    rows = {f"megatron_scratch, {name}": ours("tokenize", corpus, work / f"ours{k}", f"corpus.tokenizer={path}", *more)
            for k, (name, more) in enumerate(ENCODERS.items())}  # fmt: skip
    rows["megatron-core IndexedDatasetBuilder, tokenizers"] = peer(args.peers_python, "megatron_core", corpus, work / "mcore", path)
    title = "Text to .bin and .idx, 32,000 ids of byte-level BPE, whole process"
    return table(title, text_bytes(corpus) / 1e6, rows, args.rounds) + steps(work / "ours0", "megatron_scratch, gigatoken")


def scale(corpus: Path, work: Path, args: argparse.Namespace) -> list[str]:
    lines = ["", "## 1, 4 and 16 times the corpus", "",
             "Each replica has its letters permuted: the same sizes and the same near copies inside it, none across.", "",
             "| `data prepare`, workers=1 | text MB | CPU s | MB per CPU second | peak RSS MB, largest process |",
             "| --- | --- | --- | --- | --- |"]  # fmt: skip
    base, size = work / "replicas", text_bytes(corpus) / 1e6
    base.mkdir()
    path, made, costs = tokenizer(corpus, work / "bpe"), 0, {}
    for times in (0, 1, 4, 16):
        if not times:
            (base / "shard_00.jsonl").write_text(
                json.dumps({"text": "One document of a few words, and what a process costs. " * 5})
            )
        for r in range(made, times):
            _replica(corpus, base, r)
        made = times
        cost = ours("prepare", base, work / "scaled", f"corpus.tokenizer={path}")()
        print(f"scale {times}: {cost}", flush=True)
        shutil.rmtree(work / "scaled", ignore_errors=True)
        if isinstance(cost, str):
            raise SystemExit(cost)
        costs[times] = cost.cpu
        name, speed = (f"{times} x", f"{times * size / cost.cpu:.1f}") if times else ("one document", "")
        lines.append(f"| {name} | {times * size:,.0f} | {cost.cpu:.1f} | {speed} | {cost.rss:,.0f} |")
    return [*lines, "", f"From 1 x to 16 x: {15 * size / (costs[16] - costs[1]):.1f} MB per CPU second more."]


def _replica(corpus: Path, base: Path, r: int) -> None:
    letters = list(string.ascii_lowercase)
    random.Random(r).shuffle(letters)
    other = str.maketrans(string.ascii_letters, "".join(letters) + "".join(letters).upper()) if r else {}
    for path in sorted(corpus.glob("shard_*.jsonl")):
        with open(path, encoding="utf-8") as f, open(base / f"shard_{r:02d}_{path.name[6:]}", "w", encoding="utf-8") as g:
            g.writelines(json.dumps({"text": json.loads(line)["text"].translate(other)}) + "\n" for line in f)


def edges(corpus: Path, work: Path, args: argparse.Namespace) -> list[str]:
    cost = measured([sys.executable, __file__, "--star", str(work)])
    told = (
        cost if isinstance(cost, str) else f"{cost.cpu:.1f} CPU s, {cost.rss:,.0f} MB peak, imports and NumPy's own 100 MB included"
    )
    return [
        "",
        f"## Clustering {EDGES // 10**6} million confirmed pairs of {EDGES // 2 // 10**6} million documents",
        "",
        f"star: {told}",
    ]


def star(work: Path) -> None:
    """The stage alone, on pairs as `check` writes them: in tasks of two million, sorted, none across a document."""
    import numpy as np

    from megatron_scratch.corpus.dedup import minhash
    from megatron_scratch.corpus.stages import Outputs

    rng, documents, stems, step = np.random.default_rng(0), EDGES // 2, [], 1 << 20
    checked = Outputs(work, 0)
    for k, first in enumerate(range(1, documents, step)):
        later = np.repeat(np.arange(first, min(first + step, documents), dtype=np.uint64), 2)
        earlier = (rng.random(len(later)) * later).astype(np.uint64)
        checked.save(f"{k}.confirmed.npy", np.stack([later, earlier]))
        checked.save(f"{k}.similarity.npy", 0.8 + 0.2 * rng.random(len(later)))
        stems.append(str(checked.path(str(k))))
    print(minhash.star(Outputs(work, 1), stems, documents)["removed"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, nargs="?", help="folder of shard_*.jsonl")
    parser.add_argument("--peers-python", default=sys.executable)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slow", action="store_true", help="datatrove with its own words, too (spaCy)")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--star", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.star:
        return star(args.star)
    commit = subprocess.run(
        ["git", "-C", str(HERE), "describe", "--always", "--dirty"], capture_output=True, text=True
    ).stdout.strip()
    lines = ["# Corpus preparation: speed and memory", "", f"`python {' '.join(['tools/bench_corpus.py', *sys.argv[1:]])}`  ",
             f"commit {commit}, {time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, Python {platform.python_version()}, "
             f"{platform.system()}; medians of {args.rounds} rounds in which the rows take turns; one worker process"]  # fmt: skip
    for part in args.only:
        with tempfile.TemporaryDirectory(dir=args.corpus.parent) as work:
            lines += {"dedup": dedup, "tokens": tokens, "scale": scale, "edges": edges}[part](args.corpus, Path(work), args)
    text = "\n".join(lines) + "\n"
    args.out.write_text(text) if args.out else print(text)


if __name__ == "__main__":
    main()
