"""What travels between ranks: a counter of collectives, and the formulas that say how many there should be.

The size of a message is the larger of what a rank gives and what it gets: the tensor of an all-reduce or a broadcast, the gathered
output of an all-gather, the whole input of a reduce-scatter. `ring_bytes` makes of it what a rank has to send.

The formulas count one optimizer step of one rank, for a decoder whose layers have two tensor-parallel regions, attention and MLP.
L layers, D hidden, N tokens of a microbatch, m microbatches; bytes of a number: c of an activation, w of a master weight or its
gradient, g of a weight as the engine gives it to the model (w under ddp, else c), hence of its embeddings:

    tp        plain: all-reduce m ((4 L + 1) c + g) N D        2 L + 1 entrances in backward, 2 L exits and the embedding's forward
              sequence parallel: all-gather and reduce-scatter, each m ((4 L + 1) c + g) N D: every entrance and exit is one of
              them in forward and the other in backward; with overlap 2 L m c N D more gathered, the inputs of backward's products
              loss: all-gather 2 w N tp m                      two numbers of each rank for each token
              partial gradients: all-reduce, once
    ddp       dp: all-reduce w P, once                         P numbers of parameters, where tp > 1 of this rank's part
    fsdp      shard (dp): all-gather g P for each microbatch, twice for layers that are resharded after forward (not the last);
              reduce-scatter w P, once; replicate: all-reduce w P / shard, once
    zero1, 2  dp: all-reduce w P, once (1) or for each microbatch (2); all-gather g P, once
    zero3     dp: all-gather g P for each microbatch, but small parameters once; reduce-scatter w P for each microbatch
    pp        send and receive, each m c N D (tp: of this rank's tokens) for each edge between a stage of this rank and one of
              another: activations one way, gradients the other. Embedding, head and loss are the first and the last stage's. Of
              tied weights, w V D each way, once, between two ends on two ranks. ddp sums each stage by itself; fsdp gathers once
              a step, not for each microbatch. The first step of a schedule also sends a number from stage to stage and back
    always    world: all-reduce of two int64 before forward, of three fp64 after backward, and of the gradient norm where
              gradients are cut
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_scratch.parallel.topology import AXES, HYBRID, Topology

Message = tuple[str, str, int, int]  # axis, operation, calls, bytes of all of them
Shape = tuple[int, ...]

_COLLECTIVES = ("c10d", "_c10d_functional")
_SPELLINGS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")  # torch: allreduce_, _allgather_base_, ...


class Tally(dict[tuple[str, str], tuple[int, int]]):
    """(axis, operation) -> (calls, bytes)."""

    def add(self, axis: str, operation: str, calls: int, size: int) -> None:
        """`size`: bytes of all the calls."""
        if calls:
            before = self.get((axis, operation), (0, 0))
            self[axis, operation] = (before[0] + calls, before[1] + size)


class Traffic(TorchDispatchMode):
    """Counts every collective that this thread issues while it is open: `with Traffic(topo) as traffic: step(0)`, then `.tally`.

    All ways lead through torch's dispatcher: `torch.distributed`, its functional twins, DDP's reducer and FSDP2 in C++ and Python,
    DTensors. On a CPU the backward pass runs in the calling thread. Not seen: other threads, compiled graphs, point-to-point
    messages inside a backend.
    """

    def __init__(self, topo: Topology) -> None:
        super().__init__()
        self.tally, self._labels = Tally(), {ranks: label for label, ranks in labels(topo).values()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # DTensor goes first, and what it sends comes back here
        out = func(*args, **(kwargs or {}))
        if func.namespace in _COLLECTIVES:
            named = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
            group = named.get("process_group", named.get("group_name"))
            if group is not None:  # else it waits for a message that has been counted
                ranks = _ranks(group)
                label = self._labels.get(ranks, f"ranks {ranks}")
                self.tally.add(label, _operation(func.__name__), 1, max(_size(x) for x in (*args, out)))
        return out


def labels(topo: Topology) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Axis with more than one rank -> (label, this rank's group on it). Axes of the same ranks share a label: `dp=world`."""
    hybrid = topo.size("replicate") > 1
    groups = {axis: topo.group(axis) for axis in (*AXES, *(HYBRID if hybrid else ()))}
    ranks = {axis: tuple(dist.get_process_group_ranks(group)) for axis, group in groups.items() if group is not None}
    if topo.world > 1:
        ranks["world"] = tuple(range(topo.world))
    found = {axis: ("=".join(a for a in ranks if ranks[a] == mine), mine) for axis, mine in ranks.items()}
    return found if hybrid or "dp" not in found else {**found, "shard": found["dp"]}  # one copy, which all of dp share


def ring_bytes(operation: str, size: int, n: int) -> float:
    """Bytes that a rank sends for a collective of `size` bytes over a ring of `n` ranks; for a broadcast the mean over ranks."""
    if operation in ("send", "recv"):
        return size if operation == "send" else 0
    return (2 if operation == "all_reduce" else 1) * size * (n - 1) / n


def _operation(name: str) -> str:
    """`_allgather_base_.default` -> all_gather."""
    plain = name.partition(".")[0].replace("_", "")
    return next((s for s in _SPELLINGS if plain.startswith(s.replace("_", ""))), name.partition(".")[0].strip("_"))


def _ranks(group: Any) -> tuple[int, ...]:
    """Of a process group as an operator gets it: a script object, or a name."""
    found = _resolve_process_group(group) if isinstance(group, str) else dist.ProcessGroup.unbox(group)
    return tuple(dist.get_process_group_ranks(found))


def _size(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(_size(v) for v in value) if isinstance(value, (list, tuple)) else 0


@dataclass(frozen=True)
class Step:
    """One optimizer step of one rank in numbers: those of the module docstring."""

    layers: int
    hidden: int
    tokens: int
    microbatches: int
    compute: int  # bytes of an activation
    master: int  # of a master weight, of its gradient
    given: int  # of a weight as the engine gives it to the model


def tensor_parallel(
    step: Step, tp: int, sequence_parallel: bool, overlap: bool, chunks: int, partial: int, ends: tuple[bool, bool] = (True, True)
) -> list[Message]:
    """Messages over tp.

    Args:
        chunks: of the loss, in a microbatch.
        partial: numbers of this rank whose gradients are parts of a sum over tp.
        ends: whether this rank has the embedding, and the head with the loss.
    """
    m, regions, stream = step.microbatches, 2 * step.layers, step.tokens * step.hidden
    embed, head = map(int, ends)
    calls = m * (2 * regions + embed + head)  # entrances (the head's too), exits, the embedding
    size = m * stream * ((2 * regions + head) * step.compute + embed * step.given)
    found = [("tp", "all_gather", head * m * chunks, head * m * tp * 2 * step.tokens * step.master),
             ("tp", "all_reduce", int(partial > 0), partial * step.master)]  # fmt: skip
    if not sequence_parallel:
        return [*found, ("tp", "all_reduce", calls, size)]
    again = regions if overlap else 0
    return [*found, ("tp", "all_gather", calls + m * again, size + m * again * stream * step.compute),
            ("tp", "reduce_scatter", calls, size)]  # fmt: skip


def pipeline(step: Step, tokens: int, stages: Sequence[int], count: int, tied: int) -> list[Message]:
    """Messages over pp.

    Args:
        tokens: of a microbatch, on this rank between its tensor-parallel regions.
        stages: this rank's, of `count`.
        tied: numbers of a parameter that it shares with the rank at the other end, or 0.
    """
    edges = sum(0 <= other < count and other not in stages for stage in stages for other in (stage - 1, stage + 1))
    calls = step.microbatches * edges
    size = calls * tokens * step.hidden * step.compute + tied * step.master
    return [("pp", way, calls + int(tied > 0), size) for way in ("send", "recv")]


def ddp(step: Step, parameters: Sequence[Shape], buckets: int = 1) -> list[Message]:
    """Gradients over dp, however many microbatches. `buckets`: 1 up to `engine.bucket_mb`."""
    return [("dp", "all_reduce", buckets, sum(map(math.prod, parameters)) * step.master)]


def fsdp(step: Step, layers: Sequence[Sequence[Shape]], outer: Sequence[Shape], shard: int, reshard: bool) -> list[Message]:
    """Weights and gradients over the ranks that share a model, and over its copies.

    Args:
        layers, outer: shapes, before this cut, of the parameters of each layer, and of those outside of them.
        reshard: whether layers are gathered a second time for backward.
    """
    m, within, outside = step.microbatches, sum(padded(u, shard) for u in layers), padded(outer, shard)
    again = layers[:-1] if reshard else ()
    gathered, units = within + outside + sum(padded(u, shard) for u in again), len(layers) + bool(outer)
    found = [("replicate", "all_reduce", units, (within + outside) // shard * step.master)]
    if shard > 1:
        found += [("shard", "all_gather", m * (units + len(again)), m * gathered * step.given),
                  ("shard", "reduce_scatter", units, (within + outside) * step.master)]  # fmt: skip
    return found


def zero(step: Step, stage: int, groups: Sequence[Sequence[Shape]], dp: int, persist: int) -> list[Message]:
    """DeepSpeed's weights and gradients (0.19.8), where one bucket of `engine.bucket_mb` holds them all. Stage 3 keeps what forward
    gathered for backward up to `stage3_max_live_parameters` = 1e9 numbers: more are gathered twice.

    Args:
        groups: shapes, before this cut, of the parameters of each optimizer group.
        persist: smaller parameters stay whole on every rank in stage 3, and are gathered one by one after the update.
    """
    m, sizes = step.microbatches, [[math.prod(shape) for shape in group] for group in groups]
    if stage < 3:
        reductions, numbers = m if stage == 2 else 1, sum(map(sum, sizes))
        return [("dp", "all_reduce", reductions, reductions * numbers * step.master),
                ("dp", "all_gather", len(groups), padded([(sum(group),) for group in sizes], 2 * dp) * step.given)]  # fmt: skip
    small, large = ([(n,) for group in sizes for n in group if (n < persist) == kept] for kept in (True, False))
    gathered = padded(small, dp) + m * padded(large, dp)
    own_norm = [(axis, "all_reduce", len(groups), 8 * len(groups)) for axis in ("dp", "tp")]  # in fp64; nobody reads it
    fetches = min(2, len(large))  # what the first module uses, and one prefetch of all the rest
    return [*own_norm, ("dp", "all_gather", len(small) + m * fetches, gathered * step.given),
            ("dp", "reduce_scatter", m, m * padded([*small, *large], dp) * step.master)]  # fmt: skip


def padded(unit: Sequence[Shape], n: int) -> int:
    """Numbers of a unit whose parameters are each cut by rows into n equal parts."""
    return sum(-(-shape[0] // n) * n * math.prod(shape[1:]) for shape in unit)


def own(unit: Sequence[Shape], n: int, index: int) -> int:
    """Numbers of it on the rank of that index: the last ones may have fewer, or none."""
    rows = [(s[0], -(-s[0] // n)) for s in unit]
    return sum(max(0, min(high, r - index * high)) * math.prod(s[1:]) for s, (r, high) in zip(unit, rows, strict=True))


def once(step: Step, cut: bool) -> list[Message]:
    """Counts of the step, its loss and norm, and the gradient norm where gradients are `cut` between ranks."""
    return [("world", "all_reduce", 2, 16 + 24), ("world", "all_reduce", int(cut), step.master)]


def tally(messages: Sequence[Message], topo: Topology) -> Tally:
    """As `Traffic` would have counted them: over an axis of one rank nothing travels."""
    found, names = Tally(), labels(topo)
    for axis, operation, calls, size in messages:
        if axis in names:
            found.add(names[axis][0], operation, calls, size)
    return found
