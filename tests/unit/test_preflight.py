"""The preflight: every check fails when there is something to find, and the judge names the right nodes, none that is healthy."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import config, run

from megatron_scratch.checkpoint.manifest import read as read_manifest
from megatron_scratch.config import compose
from megatron_scratch.launch import preflight as judge
from megatron_scratch.launch.preflight import Answer, clock, odd_ones, rounds, slow_ones
from megatron_scratch.train import preflight as node
from megatron_scratch.util.env import temporary_folder
from megatron_scratch.util.errors import RunFailed
from megatron_scratch.util.files import write_json
from megatron_scratch.util.starts import Start

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(node.BLOCK, "cpu", 1000)


def corrupt(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, nth: int) -> None:
    """The nth result of a function has one other number in it."""
    original, calls = getattr(owner, name), []

    def wrong(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        calls.append(1)
        if len(calls) == nth:
            result.view(-1)[7] += 1
        return result

    monkeypatch.setattr(owner, name, wrong)


# What a node finds out about itself.


def test_a_healthy_cpu(small: None) -> None:
    assert node.check_compute(CPU) == node.check_memory(CPU) == node.check_host() == ""


@pytest.mark.parametrize("nth", [1, node.REPEATS["cpu"]])
def test_one_wrong_number_of_a_product(nth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    corrupt(monkeypatch, torch, "matmul", nth)
    assert node.check_compute(CPU) == "1 of 262144 numbers of a product in torch.float32 are wrong on cpu"


def test_the_product_is_exact_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """All terms are positive, so no partial sum is above the result; bf16 holds integers up to 256."""
    seen = []
    original = torch.matmul
    monkeypatch.setattr(torch, "matmul", lambda a, b: seen.append((a.min(), b.min(), original(a, b))) or seen[-1][2])
    assert node.check_compute(CPU, 2) == ""
    low_a, low_b, product = seen[0]
    assert low_a == low_b == 0 and 100 < product.max() <= 256 and torch.equal(product.bfloat16().float(), product)


@pytest.mark.parametrize("nth", [1, node.CPU_BLOCKS, node.CPU_BLOCKS + 1])
def test_one_wrong_number_in_memory(nth: int, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    corrupt(monkeypatch, node, "_pattern", nth)
    assert node.check_memory(CPU) == "1 of 16000 numbers in the memory of cpu are read other than they were written"


def test_a_bit_that_cannot_be_cleared(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the pattern has a one only the other way round shows it."""
    original = torch.Tensor.bitwise_not_

    def stuck(block: torch.Tensor) -> torch.Tensor:
        original(block)
        block[3] |= 2  # 3 has this bit
        return block

    monkeypatch.setattr(torch.Tensor, "bitwise_not_", stuck)
    assert node.check_memory(CPU, 1).startswith("1 of 1000 numbers")


def test_a_block_of_memory_that_shows_another_one(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing one block after the other, and reading each at once, would not see it."""
    memory = torch.empty(1000, dtype=torch.int32)
    original, made = node._pattern, []

    def same(device: torch.device, block: int) -> torch.Tensor:
        made.append(block)
        return memory.copy_(original(device, block)) if len(made) <= 2 else original(device, block)

    monkeypatch.setattr(node, "_pattern", same)
    assert "other than they were written" in node.check_memory(CPU, 2)


def test_a_host_whose_memory_is_taken(tmp_path: Path) -> None:
    info = tmp_path / "meminfo"
    for left, said in ((10, ""), (9, "9.0 of 100 GiB are free")):
        info.write_text(f"MemTotal: {100 << 20} kB\nMemFree: 1 kB\nMemAvailable: {left << 20} kB\nHugePages_Total: 0\n")
        assert node.check_host(info) == said


def test_gpus_that_are_not_there_or_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 7)
    assert node.check_gpus(8) == "7 of 8 GPUs can be seen" and node.check_gpus(0) == ""
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda device: (int(79.9 * 2**30), 80 << 30) if device.index != 5 else (1, 80 << 30)
    )
    for check in ("check_compute", "check_memory"):
        monkeypatch.setattr(node, check, lambda *args: "")
    monkeypatch.setattr(node, "check_records", lambda number, uuid: "")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="u"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert node.check_gpus(5) == ""
    assert node.check_gpus(7) == "80.0 of 80 GiB of GPU 5 are taken by somebody else"
    monkeypatch.setattr(node, "check_memory", lambda device, blocks: f"{blocks} blocks on {device}")
    assert node.check_gpus(5) == "61 blocks on cuda:0"


SMI = """#!/bin/sh
case "$*" in
  *--id=GPU-u*ecc*) echo "{ecc}" ;;
  *remapped*) echo "{remapped}" ;;
  *clocks_event*) [ "{driver}" = new ] && echo "{clocks}" || {{ echo "Field is not valid"; exit 2; }} ;;
  *clocks_throttle*) echo "{clocks}" ;;
esac
"""
RECORDS = [
    (dict(), ""),
    (dict(ecc="[N/A]", remapped="[N/A]", clocks="[Not Supported]"), ""),
    (dict(ecc="3"), "GPU 4 has uncorrected memory errors: ecc.errors.uncorrected.volatile.total is 3"),
    (dict(remapped="1"), "GPU 4 has memory that it could not repair: remapped_rows.failure is 1"),
    (
        dict(clocks="Active"),
        "GPU 4 has clocks slowed down by the hardware (heat or power): clocks_event_reasons.hw_slowdown is Active",
    ),
]


@pytest.mark.parametrize("driver", ["new", "old"])
@pytest.mark.parametrize(("values", "said"), RECORDS, ids=[str(values) for values, _ in RECORDS])
def test_the_records_of_a_gpu(
    driver: str, values: dict[str, str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(SMI.format(**{"ecc": "0", "remapped": "0", "clocks": "Not Active", "driver": driver, **values}))
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert node.check_records(4, "u") == said


def test_no_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert node.check_records(0, "u") == ""


def test_a_disk_that_is_full_or_not_to_be_written(small_disk: Path) -> None:
    assert node.check_disk(small_disk) == f"{small_disk}: No space left on device"
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert node.check_disk(small_disk) == f"{small_disk}: Read-only file system"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert node.check_disk(tmp_path / "none") == f"{tmp_path}/none: No such file or directory"
    assert node.check_disk(tmp_path) == "" and list(tmp_path.iterdir()) == []


def test_a_disk_that_gives_back_other_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: os.pwrite(fd, bytes(16), node.DISK - 16))
    assert node.check_disk(tmp_path) == f"{tmp_path} gives back other bytes than were written"


def test_the_temporary_folder_is_the_one_that_was_asked_for(tmp_path: Path) -> None:
    """Python's own answer would quietly be another one when it cannot be written."""
    assert temporary_folder({"TMPDIR": "/nowhere"}) == Path("/nowhere") and temporary_folder({}).is_dir()


@pytest.mark.parametrize("optim", ["adamw", "lion"])
def test_the_size_of_a_checkpoint_is_known_before_the_first(optim: str, corpus: Path, tmp_path: Path) -> None:
    cfg = config(corpus, tmp_path / "r", f"optim={optim}", "optim.lr=1e-3", "train.steps=1", "checkpoint.every=1")
    assert run(cfg) == [0]
    saved = sum(tensor.bytes for tensor in read_manifest(tmp_path / "r" / "checkpoints" / "step_00000001").tensors.values())
    assert node.checkpoint_bytes(cfg) == pytest.approx(saved, rel=0.002)  # the optimizer counts steps


@pytest.mark.parametrize(("there", "more"), [(0, 2), (1, 1), (2, 1), (5, 1)])
def test_room_for_two_checkpoints(there: int, more: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = slurm(tmp_path)
    for step in range(there):
        (tmp_path / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    need = more * node.checkpoint_bytes(cfg)
    for free, said in ((need, ""), (need - 1, f"{more} more checkpoints take")):
        monkeypatch.setattr(node.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        assert said in node.check_space(cfg) and bool(said) == bool(node.check_space(cfg))


@cache
def composed(*words: str) -> Any:
    return compose.load(["model=llama_tiny", "model.vocab_size=256", "launcher=slurm", "launcher.gpus=false", *words])


def slurm(path: Path, nodes: int = 2) -> Any:
    cfg = deepcopy(composed(f"launcher.nodes={nodes}"))
    cfg.dir = str(path)
    return cfg


def test_a_check_that_breaks_is_a_problem_and_the_others_are_made(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def driver(expected: int) -> str:
        raise RuntimeError("CUDA error:\n unknown")

    monkeypatch.setattr(node, "check_gpus", driver)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    found = node.check_node(slurm(tmp_path))
    assert found["problems"] == {"gpus": "RuntimeError: CUDA error: unknown",
                                 "temporary directory": f"{tmp_path}/none: No such file or directory"}  # fmt: skip
    assert found["versions"]["torch"] == torch.__version__


def check(folder: Path, cfg: Any, seconds: int, arm: Callable[[], None]) -> int:
    """The whole program on a node named n1, in a forked process; its exit code."""
    compose.save(cfg, folder / "config.yaml")

    def child() -> None:
        os.environ["SLURMD_NODENAME"] = "n1"
        sys.argv = ["preflight", "node", f"--report={folder}", f"--config={folder / 'config.yaml'}", f"--seconds={seconds}"]
        node.BLOCK["cpu"] = 1000
        arm()
        node.main()
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(30)
    assert process.exitcode is not None
    return process.exitcode


def test_a_node_answers(tmp_path: Path) -> None:
    assert check(tmp_path, slurm(tmp_path), 30, lambda: None) == 0
    assert json.loads((tmp_path / "n1.json").read_text())["problems"] == {}


def test_a_check_that_hangs_ends_in_time_and_shows_where(tmp_path: Path, capfd: Any) -> None:
    def arm() -> None:
        node.check_host = signal.pause

    assert check(tmp_path, slurm(tmp_path), 4, arm) == 1
    assert not (tmp_path / "n1.json").exists() and "in check_node" in capfd.readouterr().err


# What is made of it.

NOW = 1_000_000.0


@pytest.mark.parametrize(
    ("shown", "said"),
    [(NOW, []), (NOW + 300, []), (NOW - 29, []), (NOW + 329, []), (NOW - 31, ["clock: 31 s behind"]),
     (NOW + 331, ["clock: 31 s ahead"])],
)  # fmt: skip
def test_a_clock_is_right_between_question_and_answer(shown: float, said: list[str]) -> None:
    """The step took 300 s, and says nothing about when in it the node looked at its clock."""
    assert clock(Answer({"time": shown}, NOW, NOW + 300)) == said


V = {"torch": "2.13", "python": "3.11"}
ODD = [
    ({"a": V, "b": V, "c": V}, {}),
    ({"a": {**V, "torch": "2.12"}, "b": V, "c": V}, {"a": "torch is 2.12, 2.13 on the others"}),
    ({"a": V, "b": {**V, "torch": "2.12"}}, {"b": "torch is 2.12, 2.13 on the others"}),
    ({"a": V, "b": {**V, "torch": "2.12"}, "c": {**V, "torch": "2.12"}}, {"a": "torch is 2.13, 2.12 on the others"}),
    ({"a": V, "b": {"torch": "2.13"}, "c": V}, {"b": "python is not there, 3.11 on the others"}),
    ({}, {}),
]


@pytest.mark.parametrize(("versions", "bad"), ODD)
def test_other_software(versions: Mapping[str, Mapping[str, str]], bad: dict[str, str]) -> None:
    assert odd_ones(versions) == bad


@pytest.mark.parametrize(
    ("best", "bad"),
    [({"a": 9, "b": 10, "c": 11}, ""), ({"a": 10, "b": 3.4, "c": 10}, ""), ({"a": 10, "b": 3.3, "c": 10}, "b"),
     ({"a": 1, "b": 1, "c": 9, "d": 10, "e": 11}, "ab"), ({"a": 1, "b": 100}, ""), ({}, "")],
)  # fmt: skip
def test_a_slow_node(best: dict[str, float], bad: str) -> None:
    assert sorted(slow_ones(best)) == list(bad)


@pytest.mark.parametrize("n", range(1, 30))
def test_rounds(n: int) -> None:
    found = rounds(n)
    partners: dict[int, set[int]] = {i: set() for i in range(n)}
    for pairs in found:
        members = [i for pair in pairs for i in pair]
        assert len(members) == len(set(members)) >= n - 1
        for a, b in pairs:
            partners[a].add(b)
            partners[b].add(a)
    assert len(found) <= 4
    assert min(map(len, partners.values())) >= min(n - 1, 2)
    if n in (2, 3, 4):
        assert all(len(met) == n - 1 for met in partners.values())


class Network:
    """Nodes a, b, ... some of which cannot talk, or only slowly; takes the place of the steps over srun."""

    def __init__(self, dead: str = "", cut: Sequence[str] = (), slow: str = "", failing: int = 0) -> None:
        self.dead, self.cut, self.slow, self.failing, self.steps = dead, [set(pair) for pair in cut], slow, failing, 0

    def talk(self, groups: list[list[str]], pairs: Sequence[Sequence[tuple[int, int]]] = ()) -> list[dict[str, Any]]:
        self.steps += 1
        members = [node for group in groups for node in group]
        assert len(members) == len(set(members))
        return [self._group(group, pairs) for group in groups]

    def _group(self, group: list[str], pairs: Sequence[Sequence[tuple[int, int]]]) -> dict[str, Any]:
        self.failing -= len(group) > 2
        lost = any(node in self.dead for node in group) or any(pair <= set(group) for pair in self.cut)
        if lost or self.failing >= 0 and len(group) > 2:
            return {node: {"error": "no route"} for node in group if node not in self.dead}
        met: dict[str, dict[str, float]] = {node: {} for node in group}
        for a, b in ((group[i], group[j]) for some in pairs for i, j in some):
            met[a][b] = met[b][a] = 1e9 if {a, b} & set(self.slow) else 1e10
        return {node: {"all_reduce": 1e9, "pairs": met[node]} for node in group}


def look(tmp_path: Path) -> Any:
    return judge._Look(slurm(tmp_path), tmp_path, Start.claim(tmp_path / "starts", None), 7)


@pytest.mark.parametrize(
    ("failed", "proven", "bad", "names"),
    [(["ab"], "", "", ""), (["ab"], "a", "", "b"), (["ab"], "b", "", "a"), (["ab"], "ab", "", "b"), (["ab"], "a", "b", ""),
     (["ab", "bc"], "ab", "", "b"), (["ab", "cd"], "bc", "", "ad")],
)  # fmt: skip
def test_whom_a_failed_pair_accuses(failed: list[str], proven: str, bad: str, names: str) -> None:
    """Nobody while nobody is known to work; and none because of a partner that is bad itself."""
    pairs = [(pair[0], pair[1], "") for pair in failed]
    assert sorted(judge.blamed(pairs, list(proven), dict.fromkeys(bad, "dead"))) == list(names)


FOUND = [
    ("ab", Network(), "", 1),
    ("abcdefgh", Network(), "", 1),
    ("abc", Network(dead="a"), "a", 5),
    ("abc", Network(dead="b"), "b", 5),
    ("abc", Network(dead="c"), "c", 5),
    ("abcd", Network(dead="c"), "c", 4),
    ("abcd", Network(dead="ac"), "ac", 6),
    ("abcde", Network(dead="bd"), "bd", 6),
    ("abcdefgh", Network(dead="aceg"), "aceg", 6),
    ("abcdefghijkl", Network(dead="bcdefghij"), "bcdefghij", 9),
    ("abcdef", Network(cut=["ab"]), "b", 5),
    ("abc", Network(cut=["bc"]), "c", 5),
    ("abcd", Network(slow="b"), "b", 1),
    ("abcdefghi", Network(slow="ac"), "ac", 1),
    ("abcdef", Network(dead="a", slow="d"), "ad", 5),
    ("abcd", Network(failing=1), "", 5),
]


@pytest.mark.parametrize(("nodes", "network", "bad", "steps"), FOUND)
def test_who_it_is(nodes: str, network: Network, bad: str, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every node that is bad, no other, and in few steps however many nodes there are."""
    found = look(tmp_path)
    monkeypatch.setattr(found, "_talk", network.talk)
    assert sorted(found.at_network(list(nodes))) == list(bad)
    assert network.steps <= steps


@pytest.mark.parametrize(
    ("nodes", "network", "said"),
    [("ab", Network(dead="b"), "a and b cannot reach each other (a: no route); which one is at fault shows only beside a third"),
     ("abc", Network(dead="abc"), "no two of 3 nodes can reach each other"), ("abcdef", Network(dead="abcdef"), "no two of 6"),
     ("abc", Network(dead="ab"), "no two of 3"), ("abcd", Network(failing=99), "each of 4 nodes can talk to another, but not all")],
)  # fmt: skip
def test_it_is_not_the_nodes_or_cannot_be_told(
    nodes: str, network: Network, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = look(tmp_path)
    monkeypatch.setattr(found, "_talk", network.talk)
    with pytest.raises(RunFailed) as error:
        found.at_network(list(nodes))
    assert said in str(error.value) and "\n" not in str(error.value)


# The steps: sh takes the place of srun.

REPORT = json.dumps({"problems": {}, "versions": V, "time": 0})
WRITE = 'echo "$TEXT" > "$DIR/.$N" && mv "$DIR/.$N" "$DIR/$N.json"'


class Steps:
    """What each set of nodes does: a piece of sh with DIR, N (the node) and TEXT (a good report)."""

    def __init__(self, script: Callable[[list[str], str], str]) -> None:
        self.script, self.sets, self.processes, self.beside = script, [], [], []  # type: ignore[var-annotated]

    def srun(self, nodes: list[str], words: list[str]) -> subprocess.Popen[bytes]:
        self.sets.append(nodes)
        self.beside.append(sum(process.poll() is None for process in self.processes))
        folder = next(word.partition("=")[2] for word in words if word.startswith("--report="))
        lines = [f"N={name}\nTEXT=$GOOD\n{self.script(nodes, name)}" for name in nodes]
        env = {**os.environ, "DIR": folder, "GOOD": REPORT}
        self.processes.append(subprocess.Popen(["sh", "-c", "\n".join(lines)], env=env))
        return self.processes[-1]

    def over(self) -> bool:
        return all(process.poll() is not None for process in self.processes)


@pytest.fixture
def stepped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, Steps]]:
    def make(script: Callable[[list[str], str], str], seconds: float = 20.0) -> tuple[Any, Steps]:
        steps, found = Steps(script), look(tmp_path)
        found.cfg.launcher.preflight_seconds = seconds
        monkeypatch.setattr(found, "_srun", steps.srun)
        monkeypatch.setattr(judge, "clock", lambda answer: [])
        monkeypatch.setattr(judge, "POLL", 0.02)
        return found, steps

    return make


def test_all_nodes_answer_in_one_step(stepped: Any) -> None:
    found, steps = stepped(lambda nodes, name: WRITE)
    assert found.at_nodes(["a", "b", "c"]) == {} and steps.sets == [["a", "b", "c"]] and steps.over()


def test_who_did_not_answer_with_the_others_is_asked_alone(stepped: Any) -> None:
    """srun cannot start on b, and ends the step on a and c before they have answered."""
    found, steps = stepped(lambda nodes, name: "exit 1" if nodes != [name] or name == "b" else WRITE)
    assert found.at_nodes(["a", "b", "c"]) == {"b": "the check ended without an answer; see the job's log"}
    assert steps.sets == [["a", "b", "c"], ["a"], ["b"], ["c"]] and steps.over()


def test_some_at_once_but_not_all(stepped: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sruns at a time: the first ones wait for each other, and no third one begins beside two."""
    monkeypatch.setattr(judge, "AT_ONCE", 2)
    both = f'touch "$DIR/up.$N"; until [ $(ls "$DIR" | grep -c "^up") -ge 2 ]; do sleep 0.02; done\n{WRITE}'
    found, steps = stepped(lambda nodes, name: "exit 1" if len(nodes) > 1 else both)
    assert found.at_nodes(list("abcde")) == {} and len(steps.sets) == 6 and max(steps.beside) == 1


def test_a_node_that_hangs(stepped: Any) -> None:
    found, steps = stepped(lambda nodes, name: WRITE if name == "a" else "exec sleep 600", seconds=1)
    assert found.at_nodes(["a", "b"]) == {"b": "did not answer in 1 s"} and steps.sets == [["a", "b"]] and steps.over()


def test_an_answer_is_seen_when_it_comes_not_when_the_step_is_over(
    stepped: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """b goes on once a has been read: a clock is compared with ours at that moment."""
    original = judge.read
    monkeypatch.setattr(judge, "read", lambda path: (path.with_name("seen").touch(), original(path))[1])
    found, steps = stepped(lambda nodes, name: WRITE if name == "a" else f'until [ -e "$DIR/seen" ]; do sleep 0.02; done\n{WRITE}')
    assert found.at_nodes(["a", "b"]) == {} and len(steps.sets) == 1


def test_problems_a_torn_report_and_other_software(stepped: Any) -> None:
    texts = {"a": REPORT, "b": json.dumps({"problems": {"gpus": "3 of 4"}, "versions": {}, "time": 0}), "c": '{"pro',
             "d": REPORT.replace("2.13", "2.12"), "e": REPORT}  # fmt: skip
    found, _ = stepped(lambda nodes, name: f"TEXT='{texts[name]}'\n{WRITE}")
    bad = found.at_nodes(list("abcde"))
    assert sorted(bad) == ["b", "c", "d"] and bad["b"] == "gpus: 3 of 4" and "cannot be read" in bad["c"]


def test_pairs_do_not_wait_for_a_node_that_hangs(stepped: Any) -> None:
    """One of a pair that says so is enough; the other pair is let to its end."""
    error = json.dumps({"error": "timed out"})
    found, steps = stepped(
        lambda nodes, name: {"a": f"TEXT='{error}'\n{WRITE}", "b": "", "c": WRITE, "d": f"{WRITE}\nexec sleep 600"}[name]
    )
    began = time.monotonic()
    reports = found._talk([["a", "b"], ["c", "d"]])
    assert [sorted(group) for group in reports] == [["a"], ["c", "d"]] and reports[0]["a"] == {"error": "timed out"}
    assert time.monotonic() - began < judge.NETWORK_SECONDS / 2
    assert steps.over()
    plan = json.loads(next(found.folder.glob("*/plan")).read_text())
    assert [group["nodes"] for group in plan] == [["a", "b"], ["c", "d"]] and plan[0]["port"] != plan[1]["port"]


def test_what_srun_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    monkeypatch.setattr(judge.subprocess, "Popen", lambda words, **kwargs: told.append(words))
    look(tmp_path)._srun(["n1", "n3"], ["node"])
    (words,) = told
    assert {"--nodelist=n1,n3", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--overlap", "--kill-on-bad-exit=0"} < set(words)
    assert words[-3:] == ["-m", "megatron_scratch.train.preflight", "node"]


@pytest.mark.parametrize(("nodes", "bad", "asked"), [(2, {}, ["a", "b"]), (1, {}, None), (2, {"a": "dead"}, None)])
def test_the_whole(
    nodes: int, bad: dict[str, str], asked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """The network is asked of those that passed, and only where two are to talk; what came of it is kept."""
    talked = []
    monkeypatch.setattr(judge._Look, "at_nodes", lambda self, nodes: dict(bad))
    monkeypatch.setattr(judge._Look, "at_network", lambda self, nodes: talked.append(nodes) or {"b": "slow"})
    start = Start.claim(tmp_path / "starts", None)
    (start.folder / "preflight").mkdir()
    found = judge.preflight(slurm(tmp_path, nodes), tmp_path, start, ["a", "b"], 7)
    assert talked == ([asked] if asked else []) and found == {**bad, **({"b": "slow"} if asked else {})}
    assert json.loads((start.folder / "preflight" / "summary.json").read_text())["bad"] == found
    assert f"{2 - len(found)} of 2 nodes are fit" in capfd.readouterr().out


def test_the_reports_of_a_step_are_found(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {})
    (tmp_path / ".b.json.1.tmp").touch()
    assert judge.listed(tmp_path) == {"a"} and len(list(tmp_path.iterdir())) == 2
