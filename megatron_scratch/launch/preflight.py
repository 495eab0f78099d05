"""Which nodes of a job are fit to train on: each looks at itself, then they talk to each other.

A node that does not answer is as bad as one that says it is. Where a sum over all nodes fails, neighbours try in pairs, two rounds:
a node that no pair of its own has worked for is the one.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_scratch.config import Config
from megatron_scratch.launch.step import contained, meeting, secrets
from megatron_scratch.util.starts import Start

CLOCK = 30.0  # seconds that a node's clock may be off: certificates, file times and logs depend on it
SLOW = 3.0  # times slower than the median pair
NETWORK_SECONDS = 150.0
POLL = 0.1


def preflight(cfg: Config, job: Path, start: Start, nodes: list[str], number: int) -> dict[str, str]:
    """Bad node -> why; empty when all are fit.

    Args:
        number: of Slurm's job, for the ports.
    """
    look = _Look(cfg, job, start, number)
    bad = look.at_nodes(nodes)
    good = [node for node in nodes if node not in bad]
    return bad | look.at_network(good) if len(good) > 1 else bad


class _Look:
    def __init__(self, cfg: Config, job: Path, start: Start, number: int) -> None:
        self.cfg, self.job, self.start, self.number = cfg, job, start, number
        self.tries = 0

    def at_nodes(self, nodes: list[str]) -> dict[str, str]:
        gpus = self.cfg.launcher.gpus_per_node if self.cfg.launcher.gpus else 0
        words = ["node", f"--gpus={gpus}", f"--run={self.cfg.dir}"]
        reports = self._srun({"nodes": nodes}, words, self.cfg.launcher.preflight_seconds)["nodes"]
        bad = {node: f"did not answer in {self.cfg.launcher.preflight_seconds} s" for node in nodes if node not in reports}
        for node, report in reports.items():
            if problems := [*report["problems"].values(), *_clock(report)]:
                bad[node] = "; ".join(problems)
        return bad | odd_ones({node: report["versions"] for node, report in reports.items() if node not in bad})

    def at_network(self, nodes: list[str]) -> dict[str, str]:
        together = self._srun({"all": nodes}, ["network"], NETWORK_SECONDS)["all"]
        if len(together) == len(nodes):
            print(
                f"network: {min(r['bytes_per_second'] for r in together.values()) / 1e9:.2f} GB/s over {len(nodes)} nodes",
                flush=True,
            )
        rates: dict[str, list[float]] = {node: [] for node in nodes}
        if len(together) == len(nodes) and len(nodes) == 2:
            return {}
        for pairs in rounds(nodes):
            found = self._srun({"-".join(pair): list(pair) for pair in pairs}, ["network"], NETWORK_SECONDS)
            for pair in pairs:
                reports = found["-".join(pair)]
                for node in pair if len(reports) == 2 else ():
                    rates[node].append(min(r["bytes_per_second"] for r in reports.values()))
        return judge(rates)

    def _srun(self, groups: dict[str, list[str]], words: list[str], seconds: float) -> dict[str, dict[str, dict[str, Any]]]:
        """Run a check on all groups of nodes at once, until all have answered or the time is over: group -> node -> report."""
        folders, steps = {}, []
        for name, nodes in groups.items():
            self.tries += 1
            folders[name] = self.start.folder / "preflight" / f"{self.tries:03d}"
            folders[name].mkdir(parents=True)
            steps.append(self._step(nodes, [*words, f"--report={folders[name]}"]))
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(step.poll() is None for step in steps):
            time.sleep(POLL)
        for step in steps:
            _end(step)
        return {
            name: {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")} for name, folder in folders.items()
        }

    def _step(self, nodes: list[str], words: list[str]) -> subprocess.Popen[bytes]:
        srun = ["srun", f"--nodes={len(nodes)}", f"--nodelist={','.join(nodes)}", f"--ntasks={len(nodes)}", "--ntasks-per-node=1",
                "--cpu-bind=none", "--kill-on-bad-exit=0", "--overlap", "--export=ALL"]  # fmt: skip
        environment = {**secrets(""), **meeting(nodes, self.number, self.start.number * 1000 + self.tries)}
        command = [*srun, *contained(self.cfg.launcher, self.job), "-m", "megatron_scratch.train.preflight", *words]
        return subprocess.Popen(command, env=environment, start_new_session=True)


def rounds(nodes: list[str]) -> list[list[tuple[str, str]]]:
    """Every node with its neighbour to the right, in rounds in which no node is twice."""
    n = len(nodes)
    pairs = [(nodes[i], nodes[(i + 1) % n]) for i in range(n if n > 2 else 1)]
    out = [pairs[0 : n - n % 2 : 2], pairs[1::2]]
    if n % 2 and n > 2:
        out.append([pairs[-1]])
    return [group for group in out if group]


def judge(rates: dict[str, list[float]]) -> dict[str, str]:
    """Who cannot be talked to, or only slowly: the best of a node's pairs counts, as a bad neighbour is no fault of its own."""
    bad = {node: "no other node can be reached over the network" for node, found in rates.items() if not found}
    best = {node: max(found) for node, found in rates.items() if found}
    middle = statistics.median(best.values()) if best else 0.0
    slow = {
        node: f"network: {rate / 1e9:.2f} GB/s, the median is {middle / 1e9:.2f}"
        for node, rate in best.items()
        if rate * SLOW < middle
    }
    return bad | slow


def odd_ones(versions: dict[str, dict[str, str]]) -> dict[str, str]:
    """Nodes whose software is not that of most."""
    bad = {}
    for key in {key for found in versions.values() for key in found}:
        usual = statistics.mode(found.get(key, "") for found in versions.values())
        bad |= {
            node: f"{key} is {found.get(key)}, {usual} on the others"
            for node, found in versions.items()
            if found.get(key, "") != usual
        }
    return bad


def _clock(report: dict[str, Any]) -> Iterable[str]:
    off = report["time"] - time.time()
    return [f"its clock is {abs(off):.0f} s {'ahead' if off > 0 else 'behind'}"] if abs(off) > CLOCK else []


def _end(step: subprocess.Popen[bytes]) -> None:
    if step.poll() is None:
        step.terminate()
        try:
            step.wait(10)
        except subprocess.TimeoutExpired:
            step.kill()
            step.wait()
