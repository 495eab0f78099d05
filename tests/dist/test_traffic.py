"""What travels in a step is what the formulas say, no collective more and none less; and the counter misses none."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.distributed import _functional_collectives as functional
from torch.distributed.tensor import DTensor, Shard

from megatron_scratch.parallel import Topology, traffic
from megatron_scratch.parallel.collectives import all_gather, all_reduce_world, gather_json, reduce_scatter_rows
from megatron_scratch.parallel.tensor import leave
from megatron_scratch.parallel.traffic import Traffic, ring_bytes
from megatron_scratch.train import forked

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
import communication


class Checked(Traffic):
    """Compares itself with torch's flight recorder, which gloo keeps by itself, below torch's dispatcher; it does not note what
    goes from one rank to one other."""

    def __enter__(self) -> Checked:
        self.before = self.recorded()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        noted = sum(calls for (_, operation), (calls, _) in self.tally.items() if operation not in ("send", "recv"))
        assert error[0] or noted == self.recorded() - self.before

    @staticmethod
    def recorded() -> int:
        entries = json.loads(torch._C._distributed_c10d._dump_fr_trace_json()).get("entries")
        return entries[-1]["record_id"] + 1 if entries else 0


@pytest.mark.parametrize(
    ("world", "words"),
    [
        (2, "engine=ddp"),
        (3, "engine=fsdp"),  # 3 does not divide the rows
        (4, "engine=hsdp engine.replicas=2"),
        (2, "parallel.tp=2 parallel.sequence_parallel=false model.qk_norm=true"),
        (4, "engine=ddp parallel.tp=2 parallel.overlap=true"),
        (4, "engine=fsdp engine.reshard_after_forward=false parallel.tp=2 precision=bf16"),
        (2, "parallel.pp=2 parallel.schedule=gpipe model.tie_embeddings=true"),
        (4, "parallel.pp=2 parallel.schedule=zbv_zero_bubble model.num_layers=4 parallel.tp=2 precision=bf16"),
        (4, "parallel.pp=2 parallel.schedule=gpipe engine=fsdp model.num_layers=3 precision=bf16"),
        (2, "engine=zero1"),
        (3, "engine=zero2 precision=bf16"),
        (2, "engine=zero3 engine.persist=100"),
    ],
)
def test_a_step_sends_what_the_formulas_say(world: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(communication, "Traffic", Checked)
    for steps, _ in forked.run_ranks(world, communication.measure, communication.config(world, words)):
        for counted, formulas in steps:
            assert counted == formulas


def _every_way(topo: Topology) -> dict[tuple[str, str], tuple[int, int]]:
    tp, x = topo.group("tp"), torch.ones(4, 3, requires_grad=True)
    assert tp is not None
    with Checked(topo) as seen:
        gather_json(0, topo)  # 2 lists of a number, of 8 bytes and of 1
        all_reduce_world(torch.ones(5), topo)
        dist.broadcast(torch.ones(7), group_src=0, group=topo.group("dp"))
        leave(x, replace(topo, sequence_parallel=True)).sum().backward()  # one message in forward, one in backward
        with torch.no_grad():
            all_gather(x.bfloat16(), topo, "tp")
            reduce_scatter_rows(torch.empty(2, 3), x, group=tp)
            functional.all_reduce(x, "max", tp).sum()
            cut = DTensor.from_local(x, topo.axes["tp"], [Shard(0)])
            cut.full_tensor()
            cut.softmax(0)  # DTensor gathers for it by itself
    return dict(seen.tally)


def test_every_way_to_a_collective_is_counted() -> None:
    for counted in run_ranks(4, _every_way, degrees={"tp": 2}, detail=False):
        assert counted == {
            ("world", "all_gather"): (2, 4 * 8 + 4 * 1), ("world", "all_reduce"): (1, 20), ("dp", "broadcast"): (1, 28),
            ("tp", "all_gather"): (4, 48 + 48 + 96 + 96), ("tp", "reduce_scatter"): (2, 48 + 48), ("tp", "all_reduce"): (1, 48),
        }  # fmt: skip


def _labels(topo: Topology) -> dict[str, Any]:
    return traffic.labels(topo)


def test_axes_of_the_same_ranks_share_a_label() -> None:
    assert run_ranks(2, _labels, detail=False)[1] == dict.fromkeys(("dp", "world", "shard"), ("dp=world", (0, 1)))
    halves = run_ranks(4, _labels, degrees={"replicate": 2}, detail=False)[3]
    assert {axis: ranks for axis, (_, ranks) in halves.items()} == {
        "dp": (0, 1, 2, 3), "replicate": (1, 3), "shard": (2, 3), "world": (0, 1, 2, 3)}  # fmt: skip


def test_ring() -> None:
    assert [ring_bytes(operation, 800, 4) for operation in ("all_reduce", "all_gather", "reduce_scatter")] == [1200, 600, 600]
