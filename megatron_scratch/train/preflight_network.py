"""Nodes exchange numbers, one process each: do they reach each other, is what arrives what was sent, and how fast is it?"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist

BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}  # of one message
REPEATS = 5

Pairs = Sequence[Sequence[int]]


def talk(group: Mapping[str, Any], me: str, answer: Callable[[dict[str, Any]], None]) -> None:
    """Meet the other nodes of a group and measure.

    Args:
        group: `nodes`, the first of which is at `address` and `port`; `rounds` of pairs; `gpu`; `timeout` in seconds.
        me: which of the nodes this is.
        answer: takes the report, before this process waits for those that are slower.
    """
    nodes = group["nodes"]
    rank, limit = nodes.index(me), datetime.timedelta(seconds=group["timeout"])
    store = dist.TCPStore(group["address"], group["port"], len(nodes), is_master=rank == 0, timeout=limit)
    backend = "nccl" if group["gpu"] else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=len(nodes), timeout=limit)
    answer(measure(nodes, group["rounds"], torch.device("cuda" if group["gpu"] else "cpu")))
    with suppress(Exception):
        dist.barrier()  # nobody hangs up on those that still measure


def measure(nodes: Sequence[str], rounds: Sequence[Pairs], device: torch.device, size: int | None = None) -> dict[str, Any]:
    """Over the default group, one rank a node: bytes per second of an all-reduce, and with each partner.

    `size` of a message in bytes.

    Raises:
        RuntimeError: other numbers arrived than were sent, or none (torch's own).
    """
    size = size or BYTES[device.type]
    rank, pairs = dist.get_rank(), {}
    rate = all_reduce(size, device)
    for some in rounds:  # no barrier: partners wait for each other, and of 5 times the best counts
        partner = next((a + b - rank for a, b in some if rank in (a, b)), None)
        if partner is not None:
            pairs[nodes[partner]] = exchange(partner, size, device)
    return {"all_reduce": rate, "pairs": pairs}


def all_reduce(size: int, device: torch.device) -> float:
    """Bytes that a node sends, and receives, a second, if it goes in a ring: size * 2 (n - 1) / n. The median of 5."""
    rank, world = dist.get_rank(), dist.get_world_size()
    numbers, seconds = torch.empty(size // 4, device=device), []
    for _ in range(REPEATS):
        numbers.fill_(rank + 1)
        started = _now(device)
        dist.all_reduce(numbers)
        seconds.append(_now(device) - started)
        _expect(numbers, world * (world + 1) / 2, f"the sum over {world} nodes")
    return size * 2 * (world - 1) / world / sorted(seconds)[REPEATS // 2]


def exchange(partner: int, size: int, device: torch.device) -> float:
    """Bytes a second, both ways at once. The fastest of 5: the first one connects, any may wait for a partner that is late."""
    sent = torch.full((size // 4,), float(dist.get_rank() + 1), device=device)
    got, seconds = torch.empty_like(sent), []
    for _ in range(REPEATS):
        got.zero_()
        started = _now(device)
        both = [dist.P2POp(dist.isend, sent, partner), dist.P2POp(dist.irecv, got, partner)]
        for work in dist.batch_isend_irecv(both):
            work.wait()
        seconds.append(_now(device) - started)
        _expect(got, partner + 1, f"the message of rank {partner}")
    return size / min(seconds)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _expect(numbers: torch.Tensor, want: float, what: str) -> None:
    if wrong := int((numbers != want).sum()):
        raise RuntimeError(f"{wrong} numbers of {what} are wrong")
