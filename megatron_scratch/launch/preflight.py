"""Which nodes of a job are fit to train on: each looks at itself, then they talk to each other. No torch here.

One process a node (train/preflight.py, over srun) writes what it finds to START/preflight/NNN/NODE.json. A node that does not
answer is as bad as one that says it is. One node on which srun cannot begin ends the step of all of them: those that have not
answered by then are asked again, each by an srun of its own.

Then all that are left add up numbers together and exchange some in pairs, in one step: at most 25 messages a node, however many
nodes there are. The pairs are always measured: all together are as slow as the slowest, and nothing says how fast they should be.
Only if that step fails do pairs start as processes of their own, one srun for all pairs of a round: who cannot talk to one that
others can talk to is the one.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_scratch.config import Config
from megatron_scratch.launch.step import contained, meeting
from megatron_scratch.util.env import everything
from megatron_scratch.util.errors import RunFailed
from megatron_scratch.util.files import write_json
from megatron_scratch.util.starts import Start

CLOCK = 30.0  # seconds that a node's clock may be off: certificates, file times and logs depend on it
SLOW = 3.0  # times slower than the median node
MEETING = 40.0  # seconds for nodes to find each other, and for one message; a TCPStore that finds nobody takes it twice
NETWORK_SECONDS = 2 * MEETING + 40.0  # a step of the network check, torch's import included
AT_ONCE = 64  # sruns; each takes some 15 MB on the first node
LEAVE, END = 5.0, 10.0  # seconds for a step to end when all have answered, and for srun to end it; Slurm kills what is left
POLL = 0.2


@dataclass(frozen=True)
class Answer:
    """What a node has found."""

    report: dict[str, Any]
    asked: float  # when the question went out, by this machine's clock
    arrived: float  # when the answer was seen

    @property
    def problems(self) -> list[str]:
        return [f"{name}: {problem}" for name, problem in self.report["problems"].items()] + clock(self)


def preflight(cfg: Config, job: Path, start: Start, nodes: list[str], number: int) -> dict[str, str]:
    """Bad node -> why; empty when all are fit.

    Args:
        number: of Slurm's job, for the ports.

    Raises:
        RunFailed: something is wrong that is no node's fault, or cannot be told to be one's.
    """
    began = time.monotonic()
    look = _Look(cfg, job, start, number)
    bad = look.at_nodes(nodes)
    good = [node for node in nodes if node not in bad]
    if len(good) > 1 and cfg.launcher.nodes > 1:
        bad |= look.at_network(good)
    seconds = time.monotonic() - began
    write_json(look.folder / "summary.json", {"nodes": nodes, "bad": bad, "seconds": round(seconds, 1), "network": look.network})
    print(f"preflight: {len(nodes) - len(bad)} of {len(nodes)} nodes are fit, {seconds:.1f} s", flush=True)
    return bad


class _Look:
    def __init__(self, cfg: Config, job: Path, start: Start, number: int) -> None:
        self.cfg, self.job, self.start, self.number = cfg, job, start, number
        self.folder = start.folder / "preflight"
        self.network: dict[str, float] = {}  # bytes per second
        self.asked = self.met = 0

    def at_nodes(self, nodes: list[str]) -> dict[str, str]:
        """Every node by itself; those without an answer once more, alone."""
        limit = self.cfg.launcher.preflight_seconds
        deadline = time.monotonic() + limit
        words = ["node", f"--config={self.job / 'config.yaml'}"]
        answers = self._ask([nodes], words, deadline)
        if alone := [[node] for node in nodes if node not in answers]:
            answers |= self._ask(alone, words, deadline)
        late = time.monotonic() >= deadline
        why = f"did not answer in {limit} s" if late else "the check ended without an answer; see the job's log"
        bad = {node: why for node in nodes if node not in answers}
        bad |= {node: "; ".join(answer.problems) for node, answer in answers.items() if answer.problems}
        return bad | odd_ones({node: answers[node].report["versions"] for node in nodes if node not in bad})

    def at_network(self, nodes: list[str]) -> dict[str, str]:
        """All nodes together, until those that are left can talk to each other."""
        bad: dict[str, str] = {}
        again = True
        while len(rest := [node for node in nodes if node not in bad]) > 1:
            reports = self._talk([rest], rounds(len(rest)) if len(rest) > 2 else [])[0]
            if worked(rest, reports):
                return bad | self._rates(reports)
            found = self._search(rest)
            if not found and not again:  # once may have been chance
                raise RunFailed(f"preflight: each of {len(rest)} nodes can talk to another, but not all together{_error(reports)}")
            again = again and bool(found)
            bad |= found
        return bad

    def _rates(self, reports: Mapping[str, dict[str, Any]]) -> dict[str, str]:
        """Keep and show what was measured; who is slow."""
        pairs = {node: report["pairs"] for node, report in reports.items() if report["pairs"]}
        best = {node: max(found.values()) for node, found in pairs.items()}
        self.network = {"all_reduce": min(report["all_reduce"] for report in reports.values())}
        self.network |= {"fastest_pair": max(best.values()), "slowest_node": min(best.values())} if best else {}
        told = ", ".join(f"{name.replace('_', ' ')} {rate / 1e9:.2f} GB/s" for name, rate in self.network.items())
        print(f"preflight: network of {len(reports)} nodes: {told}", flush=True)
        return slow_ones(best)

    def _search(self, nodes: list[str]) -> dict[str, str]:
        """Who is it? Pairs, until every node has worked with another or has failed with one that works; then other pairs, if all
        nodes work, for a path that does not."""
        proven: list[str] = []
        bad: dict[str, str] = {}
        failed: list[tuple[str, str, str]] = []
        arrangements = iter(rounds(len(nodes)))
        error = ""
        while (rest := [node for node in nodes if node not in proven and node not in bad]) or not bad:
            pairs = [[node, partner] for node, partner in zip(rest, proven, strict=False)]
            if not pairs:
                pairs = [[nodes[a], nodes[b]] for a, b in next(arrangements, [])]
            if not pairs:
                break
            for pair, reports in zip(pairs, self._talk(pairs), strict=True):
                if worked(pair, reports):
                    proven += [node for node in pair if node not in proven]
                else:
                    error = _error(reports)
                    failed.append((pair[0], pair[1], error))
            bad |= blamed(failed, proven, bad)
        if not proven:
            raise RunFailed(_nobody(nodes, error))
        return bad

    def _talk(self, groups: list[list[str]], pairs: Sequence[Any] = ()) -> list[dict[str, dict[str, Any]]]:
        """Let groups of nodes exchange numbers, all at once in one step; each group's node -> report."""
        plan = []
        for group in groups:
            self.met += 1
            place = meeting(group, self.number, self.start.number * 1000 + self.met)
            plan.append({"nodes": group, "address": place["MASTER_ADDR"], "port": int(place["MASTER_PORT"]), "rounds": pairs,
                         "gpu": self.cfg.launcher.gpus, "timeout": MEETING})  # fmt: skip

        def decided(answers: Mapping[str, Answer]) -> bool:
            failed = {node for node, answer in answers.items() if "error" in answer.report}
            return all(set(group) <= answers.keys() or failed & set(group) for group in groups)

        deadline = time.monotonic() + NETWORK_SECONDS
        answers = self._ask([[node for group in groups for node in group]], ["network"], deadline, plan, decided)
        return [{node: answers[node].report for node in group if node in answers} for group in groups]

    def _ask(self, sets: list[list[str]], words: list[str], deadline: float, plan: Any = None,
             enough: Callable[[Mapping[str, Answer]], bool] = lambda answers: False) -> dict[str, Answer]:  # fmt: skip
        """Run a check on sets of nodes, an srun each, until all nodes have answered or all steps ended, it is `enough`, or the time
        is over: node -> answer."""
        self.asked += 1
        folder = self.folder / f"{self.asked:03d}"
        folder.mkdir(parents=True)
        write_json(folder / "plan", plan)
        left = max(1, int(deadline - time.monotonic()))
        words = [*words, f"--report={folder}", f"--seconds={left}"]
        waiting, running, answers, asked = list(sets), [], {}, time.time()
        nodes = {node for some in sets for node in some}
        try:
            while time.monotonic() < deadline:
                running = [step for step in running if step.poll() is None]
                while waiting and len(running) < AT_ONCE:
                    running.append(self._srun(waiting.pop(0), words))
                ended = not running
                for node in nodes & listed(folder) - answers.keys():
                    answers[node] = Answer(read(folder / f"{node}.json"), asked, time.time())
                if ended or nodes <= answers.keys() or enough(answers):
                    break
                time.sleep(POLL)
        finally:
            _end(running, LEAVE if nodes <= answers.keys() else 0.0)
        return answers

    def _srun(self, nodes: list[str], words: list[str]) -> subprocess.Popen[bytes]:
        srun = ["srun", "--quiet", f"--nodes={len(nodes)}", f"--nodelist={','.join(nodes)}", f"--ntasks={len(nodes)}",
                "--ntasks-per-node=1", "--cpu-bind=none", "--kill-on-bad-exit=0", "--overlap", "--export=ALL"]  # fmt: skip
        command = [*srun, *contained(self.cfg.launcher, self.job), "-m", "megatron_scratch.train.preflight", *words]
        env = {**everything(), "TORCH_CPP_LOG_LEVEL": "FATAL"}  # errors are in the reports, without 30 lines of C++ each
        return subprocess.Popen(command, env=env, start_new_session=True)


def listed(folder: Path) -> set[str]:
    """Nodes that have answered. A client of NFS may show a listing that is up to a minute old, but not once it has changed the
    folder itself."""
    own = folder / ".listed"
    own.mkdir()
    own.rmdir()
    return {path.stem for path in folder.glob("*.json")}


def read(path: Path) -> dict[str, Any]:
    """A report. It was renamed into place whole: other bytes are the work of a disk."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return {"problems": {"report": f"{path} cannot be read: {error}"}, "error": str(error), "versions": {}, "time": time.time()}


def rounds(n: int) -> list[list[tuple[int, int]]]:
    """Pairs of near neighbours of n, in rounds in which nobody is twice: each meets those beside it and those two away."""
    out: list[list[tuple[int, int]]] = []
    for order in (list(range(n)), [*range(0, n, 2), *range(1, n, 2)]):
        for turned in (order, order[1:] + order[:1]):
            pairs = sorted((min(pair), max(pair)) for pair in zip(turned[0 : n - 1 : 2], turned[1::2], strict=False))
            if pairs and pairs not in out:
                out.append(pairs)
    return out


def blamed(failed: Sequence[tuple[str, str, str]], proven: Sequence[str], bad: Mapping[str, str]) -> dict[str, str]:
    """Of each pair that failed, and has nobody bad yet, the node that has worked with no other; of two that have, the second: it is
    the path between them, and without one of them it is not used."""
    out: dict[str, str] = {}
    for one, other, error in failed:
        if {one, other} & set(proven) and not {one, other} & {*bad, *out}:
            who, partner = (other, one) if one in proven else (one, other)
            out[who] = f"network: {partner}, which others reach, cannot be reached{error}"
    return out


def worked(group: Sequence[str], reports: Mapping[str, dict[str, Any]]) -> bool:
    """Whether all of a group could talk to each other."""
    return all(node in reports and "error" not in reports[node] for node in group)


def slow_ones(best: Mapping[str, float]) -> dict[str, str]:
    """Nodes that are slow with whomever they talk to. `best`: of a node's pairs, as a slow partner is no fault of its own."""
    middle = statistics.median(best.values()) if len(best) > 2 else 0.0
    return {
        node: f"network: {rate / 1e9:.2f} GB/s, the median of the nodes is {middle / 1e9:.2f}"
        for node, rate in best.items()
        if rate * SLOW < middle
    }


def odd_ones(versions: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Nodes whose software or GPUs are not those of most; of two kinds that are as many, those of the first node are right."""
    bad = {}
    for key in sorted({key for found in versions.values() for key in found}):
        usual = statistics.mode(found.get(key, "") for found in versions.values())
        odd = {node: got for node, found in versions.items() if (got := found.get(key, "")) != usual}
        bad |= {node: f"{key} is {got or 'not there'}, {usual or 'not there'} on the others" for node, got in odd.items()}
    return bad


def clock(answer: Answer) -> list[str]:
    """A node's clock must show a time between the question and the answer, however long that took."""
    ahead, behind = answer.report["time"] - answer.arrived, answer.asked - answer.report["time"]
    return [f"clock: {max(ahead, behind):.0f} s {'ahead' if ahead > 0 else 'behind'}"] if max(ahead, behind) > CLOCK else []


def _nobody(nodes: list[str], error: str) -> str:
    """No pair of all that were tried could talk."""
    if len(nodes) == 2:
        return (f"preflight: {nodes[0]} and {nodes[1]} cannot reach each other{error}; which one is at fault shows only "
                "beside a third: give launcher.spare_nodes=1, or launcher.exclude=NODE")  # fmt: skip
    return (f"preflight: no two of {len(nodes)} nodes can reach each other{error}; that is hardly the nodes: see the firewall, and "
            "NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME in launcher.setup")  # fmt: skip


def _error(reports: Mapping[str, dict[str, Any]]) -> str:
    found = next((f"{node}: {report['error']}" for node, report in reports.items() if "error" in report), "no answer")
    return f" ({found})"


def _end(steps: list[subprocess.Popen[bytes]], patience: float) -> None:
    """Let steps end, or else end them. One that no signal can end, inside a broken driver, stays, and overlaps what follows."""
    _wait(steps, patience)
    for step in steps:
        step.terminate()
    _wait(steps, END)
    for step in steps:
        step.kill()
        step.wait()


def _wait(steps: list[subprocess.Popen[bytes]], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    for step in steps:
        with suppress(subprocess.TimeoutExpired):
            step.wait(max(0.0, deadline - time.monotonic()))
