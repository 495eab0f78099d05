"""Silent corruption: ranks that hold the same parameters and optimizer state compare them, bit for bit. And before anything is
saved, whether it is made of numbers.

Gradients are summed by one message, which gives every rank the same bits, and an update is a function of them: copies stay equal
for ever unless a device computes or remembers wrongly (Llama 3, arXiv 2407.21783, table 5: 6 such interruptions in 54 days). A rank
that drifts off makes every later gradient wrong, and nothing in the loss says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from megatron_scratch.engine import Engine
from megatron_scratch.parallel.collectives import gather_json
from megatron_scratch.parallel.layout import local
from megatron_scratch.parallel.pieces import Pieces
from megatron_scratch.parallel.topology import Topology
from megatron_scratch.train.step import StepResult
from megatron_scratch.util.errors import RunFailed

WORDS = 1 << 20  # of 8 bytes, looked at at a time: needs 40 MiB beside what is compared
SHOWN = 3  # tensors in a message


class CheckReplicas:
    """Every n steps: ranks that hold copies compare them."""

    def __init__(self, every: int, topo: Topology, engine: Engine) -> None:
        self.every, self.topo, self.engine = every, topo, engine

    def due(self, step: int, finished: bool, stopped: bool) -> bool:
        """A last step is followed by a checkpoint, before which they are compared anyway."""
        return step % self.every == 0

    def run(self, step: int, result: StepResult) -> None:
        check_replicas(self.engine, self.topo, step)


def check_replicas(engine: Engine, topo: Topology, step: int) -> None:
    """Compare the copies of all parameters and optimizer state after `step` steps; collective. Nothing where there are none.

    First one number a rank; names travel only where these differ.

    Raises:
        RunFailed: on every rank: some copies differ. It names tensors and ranks: those that differ from the majority, or both of
            two.
    """
    axis = engine.copies
    if not axis or topo.size(axis) == 1:
        return
    sums = checksums({name: local(t) for name, t in engine.state().items() if not name.startswith("grad.")})
    digest = int(checksum(torch.tensor([value for _, value in sorted(sums.items())])))
    problem = ""
    if len(set(gather_json(digest, topo, axis))) > 1:
        problem = describe(dict(gather_json([topo.rank, sums], topo, axis)))
    # Other groups of copies may be in order: all ranks stop, in the same step.
    if problem := next((found for found in gather_json(problem, topo) if found), ""):
        raise RunFailed(f"step {step}: {problem}; memory or arithmetic of a device is in doubt: take it out, and start again from "
                        "the newest checkpoint, which was compared before it was saved")  # fmt: skip


def check_finite(engine: Engine, topo: Topology, step: int) -> None:
    """Look at all parameters and optimizer state for numbers that are not finite; collective.

    No step whose loss or gradient norm is not finite is applied, but an update may overflow by itself, and memory may change.

    Raises:
        RunFailed: on every rank: there is one. It names the tensor.
    """
    parts = [(name, part) for name, t in engine.state().items() if not name.startswith("grad.") for part in _views(t)]
    ends = [torch.stack(part.aminmax()).double() for _, part in parts]  # NaN, where there is one; and no copy is made
    finite = torch.stack(ends).isfinite().all(1).tolist() if ends else []
    bad = next((name for (name, _), fine in zip(parts, finite, strict=True) if not fine), "")
    if bad := next((found for found in gather_json(bad, topo) if found), ""):
        raise RunFailed(f"step {step}: {bad} is not finite, though the loss and the gradient norm were: an update has "
                        "overflowed, or memory has changed; nothing was saved, the checkpoints before are whole")  # fmt: skip


def _views(tensor: torch.Tensor) -> list[torch.Tensor]:
    """What this rank holds of it, where that is anything."""
    parts = list(tensor.views.values()) if isinstance(tensor, Pieces) else [local(tensor)]
    return [part for part in parts if part.numel()]


def checksums(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Name -> checksum, by one transfer from the device."""
    if not tensors:
        return {}
    return dict(zip(tensors, torch.stack([checksum(t) for t in tensors.values()]).tolist(), strict=True))


@torch.no_grad()
def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """An int64 scalar on the device that any single flipped bit changes; two tensors that are equal bit for bit have the same.

    The bytes are words w of 64 bits, zeros after the last. With u = w xor (w >> 32), from which w can be told, the checksum is the
    sum of u_i (2 i + 1) mod 2^64. Another w_i is another u_i; its difference times an odd number is no multiple of 2^64. So any
    change inside one word is seen. Two flips of one and the same bit in two words are, too (in less than 2^31 words): they change
    the sum by 2^b (+-(2 i + 1) +- (2 j + 1)), b < 32. Without the xor b could be 63, and two changed signs would always cancel.
    """
    content = tensor.detach().reshape(-1).view(torch.uint8)
    odd = 2 * torch.arange(min(WORDS, -(-content.numel() // 8)), device=content.device) + 1
    total = torch.zeros((), dtype=torch.int64, device=content.device)
    for first, part in enumerate(content.split(8 * WORDS)):
        words = _words(part)
        mixed = words ^ ((words >> 32) & 0xFFFFFFFF)
        # (2 (first WORDS + i) + 1) u_i = (2 i + 1) u_i + 2 first WORDS u_i
        total += (mixed * odd[: words.numel()]).sum() + 2 * first * WORDS * mixed.sum()
    return total


def _words(part: torch.Tensor) -> torch.Tensor:
    """Bytes as int64, filled up with zeros."""
    short = -part.numel() % 8
    if short:
        part = torch.cat([part, part.new_zeros(short)])
    elif part.storage_offset() % 8:  # a view of a flat buffer: words must begin where words may
        part = part.clone()
    return part.view(torch.int64)


def describe(sums: Mapping[int, Mapping[str, int]]) -> str:
    """rank -> (name -> checksum), of ranks that hold copies: which tensors differ, on whom."""
    names = next(iter(sums.values()))
    apart = {name: found for name in names if len(set((found := {rank: s[name] for rank, s in sums.items()}).values())) > 1}
    said = [f"{name} is not the same on all ranks that hold a copy: {_who(found)}" for name, found in apart.items()]
    more = len(said) - SHOWN
    return "; ".join(said[:SHOWN]) + (f"; and {more} more tensors" if more > 0 else "")


def _who(found: Mapping[int, int]) -> str:
    """found: rank -> checksum."""
    (common, count), *_ = Counter(found.values()).most_common(1)
    if 2 * count <= len(found):
        return f"ranks {_listed(found)} differ, and no majority says which is right"
    odd = [rank for rank, value in found.items() if value != common]
    return f"rank{'s' * (len(odd) > 1)} {_listed(odd)} differ{'s' * (len(odd) == 1)} from the other {count}"


def _listed(ranks: Iterable[Any]) -> str:
    return ", ".join(str(rank) for rank in sorted(ranks))
