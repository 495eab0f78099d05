"""The network check of the preflight over forked ranks: what arrives is what was sent, or it is said; who hangs holds nobody up."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from megatron_scratch.launch.preflight import rounds
from megatron_scratch.parallel import Topology
from megatron_scratch.train import preflight
from megatron_scratch.train.preflight_network import measure
from megatron_scratch.util.errors import RunFailed

SIZE = 64 << 10
CPU = torch.device("cpu")


def _measure(topo: Topology, arm: Callable[[int], None]) -> dict[str, Any]:
    arm(dist.get_rank())
    nodes = ["n1", "n2", "n3"]
    return measure(nodes, rounds(3), CPU, SIZE)


def nothing(rank: int) -> None:
    pass


def test_three_nodes() -> None:
    """Each has met both others; the rates are those of a ring, in bytes a second."""
    found = run_ranks(3, _measure, nothing)
    assert [sorted(report["pairs"]) for report in found] == [["n2", "n3"], ["n1", "n3"], ["n1", "n2"]]
    assert all(rate > 0 for report in found for rate in (report["all_reduce"], *report["pairs"].values()))


def wrong_sum(rank: int) -> None:
    original = dist.all_reduce

    def all_reduce(numbers: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if rank == 1 and numbers.numel() == SIZE // 4:
            numbers[-1] += 1
        return original(numbers, *args, **kwargs)

    dist.all_reduce = all_reduce


def wrong_message(rank: int) -> None:
    original = dist.batch_isend_irecv

    def exchange(both: list[Any]) -> Any:
        if rank == 1:
            both[0].tensor[5] += 1
        return original(both)

    dist.batch_isend_irecv = exchange


def no_message(rank: int) -> None:
    original, calls = dist.batch_isend_irecv, []

    def exchange(both: list[Any]) -> Any:
        calls.append(both)
        return [] if len(calls) == 2 and rank < 2 else original(both)  # both of the first pair

    dist.batch_isend_irecv = exchange


@pytest.mark.parametrize(
    ("arm", "ranks", "said"),
    [(wrong_sum, (0, 1, 2), "1 numbers of the sum over 3 nodes are wrong"),
     (wrong_message, (0,), "1 numbers of the message of rank 1 are wrong"),
     (no_message, (0, 1), "16384 numbers of the message of rank")],
)  # fmt: skip
def test_a_wrong_number(arm: Callable[[int], None], ranks: tuple[int, ...], said: str) -> None:
    with pytest.raises(RunFailed) as error:
        run_ranks(3, _measure, arm)
    for rank in ranks:
        assert said in str(error.value).split(f"rank {rank}:\n")[1]


def programs(folder: Path, groups: list[list[str]], hanging: str, timeout: float) -> dict[str, int | None]:
    """The whole program, a process a node; `hanging` ones stop as they begin to measure. The exit codes; None had to be killed."""
    plan = [{"nodes": group, "address": str(i), "port": 0, "rounds": rounds(len(group)) if len(group) > 2 else [], "gpu": False,
             "timeout": timeout} for i, group in enumerate(groups)]  # fmt: skip
    (folder / "plan").write_text(json.dumps(plan))

    def child(me: str) -> None:
        os.environ["SLURMD_NODENAME"] = me
        sys.argv = ["preflight", "network", f"--report={folder}", "--seconds=30"]
        torch.set_num_threads(1)
        dist.TCPStore = lambda address, port, world, **rest: dist.FileStore(str(folder / f"store{address}"), world)
        preflight.talk.__globals__["BYTES"]["cpu"] = SIZE
        if me in hanging:
            preflight.talk.__globals__["measure"] = lambda *args: signal.pause()
        preflight.main()
        os._exit(0)

    context = multiprocessing.get_context("fork")
    processes = {name: context.Process(target=child, args=(name,)) for group in groups for name in group}
    for process in processes.values():
        process.start()
    for name, process in processes.items():
        if name not in hanging:
            process.join(30)
    for process in processes.values():
        process.kill()
        process.join()
    return {name: None if process.exitcode == -signal.SIGKILL else process.exitcode for name, process in processes.items()}


def test_three_programs(tmp_path: Path) -> None:
    assert set(programs(tmp_path, [["a", "b", "c"]], "", 30).values()) == {0}
    reports = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert {name: sorted(report["pairs"]) for name, report in reports.items()} == {
        "a": ["b", "c"],
        "b": ["a", "c"],
        "c": ["a", "b"],
    }


def test_pairs_of_which_one_hangs(tmp_path: Path) -> None:
    """Its partner says so when the time is over, and the other pair has long been done."""
    codes = programs(tmp_path, [["a", "b"], ["c", "d"]], "b", 1.0)
    assert codes == {"a": 0, "b": None, "c": 0, "d": 0}
    reports = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert sorted(reports) == ["a", "c", "d"]
    assert sorted(reports["a"]) == ["error"] and "imed out" in reports["a"]["error"] and "\n" not in reports["a"]["error"]
    assert reports["c"]["pairs"] == {} and reports["c"]["all_reduce"] > 0
