"""Several ranks on one CPU: `megatron_scratch.train.forked` with a topology ready made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_scratch.parallel import Topology
from megatron_scratch.train import forked
from megatron_scratch.util.env import Rank


def _with_topology(rank: Rank, degrees: dict[str, int], fn: Callable[..., Any], *args: Any) -> Any:
    return fn(Topology.build(degrees, rank.rank, rank.world, torch.device("cpu")), *args)


def run_ranks(
    world: int, fn: Callable[..., Any], *args: Any, degrees: dict[str, int] | None = None, detail: bool = True
) -> list[Any]:
    """`fn(topo, *args)` on `world` forked ranks (dp unless `degrees` says otherwise); their results in order of rank."""
    return forked.run_ranks(world, _with_topology, degrees or {}, fn, *args, detail=detail, timeout=60)
