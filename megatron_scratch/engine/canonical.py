"""Sums in one order at every data-parallel size: `train.canonical_reduction=true`.

A sum of floating-point numbers depends on its order. Here the order is a fixed binary tree over the M microbatches of a step, and
M knows nothing of dp. With M = odd x 2^k, runs of `odd` microbatches are added in sequence: the leaves. Leaves are then added in
pairs, pairs in pairs. Each of dp = 2^j ranks has M / dp microbatches that follow each other, a whole subtree: it adds them up by
itself, and j exchanges between pairs of ranks add the subtrees. a + b and b + a are the same bits, so both partners of an exchange
have the same sum.

Cost, for N parameters in fp32 and m = M / dp microbatches on a rank: 4 N bytes for each of at most log2(m / odd) gradients that
wait for their partners, and log2(dp) messages of 4 N bytes from each rank, after backward. DDP's all-reduce sends
2 (dp - 1) / dp x 4 N bytes, while backward goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from operator import add
from typing import Any, Generic, TypeVar

import torch

from megatron_scratch.config.engine import DDPConfig
from megatron_scratch.engine.base import Parts
from megatron_scratch.engine.torch_engine import TorchEngine
from megatron_scratch.parallel.collectives import all_reduce, swap
from megatron_scratch.parallel.layout import localize
from megatron_scratch.parallel.topology import Topology

T = TypeVar("T")


def leaf_size(count: int) -> int:
    """Microbatches of a leaf: the odd part of their number. A rank's share, 1/2^j of them, has the same."""
    return count // (count & -count)


class PairwiseSum(Generic[T]):
    """The sum of 2^k values that come one after the other, in the order of a binary tree; at most k of them wait.

    A binary counter: part i, if there, is the sum of 2^i values, and a carry adds two parts of one size.
    """

    def __init__(self, plus: Callable[[T, T], T]) -> None:
        self.plus, self.parts, self.count = plus, list[T](), 0

    def push(self, value: T) -> None:
        self.count += 1
        carry = self.count
        while carry % 2 == 0:
            value, carry = self.plus(self.parts.pop(), value), carry // 2
        self.parts.append(value)

    def total(self) -> T:
        """Once 2^k values are in."""
        (value,) = self.parts
        return value


def tree_sum(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of a rank's parts, one a microbatch."""
    total, size = PairwiseSum[torch.Tensor](add), leaf_size(len(parts))
    for first in range(0, len(parts), size):
        total.push(reduce(add, parts[first : first + size]))
    return total.total()


@torch.no_grad()
def sum_over_ranks(x: torch.Tensor, topo: Topology, axis: str) -> torch.Tensor:
    """The sum of what the 2^j ranks of an axis have, neighbours first, on each of them (recursive doubling)."""
    distance = 1
    while distance < topo.size(axis):
        x = x + swap(x, topo, axis, topo.index(axis) ^ distance)
        distance *= 2
    return x


class CanonicalEngine(TorchEngine):
    """Every rank holds the whole model (or its tp part); gradients are whole after the last microbatch, as under ddp.

    `begin` says how many microbatches a step has on this rank, before the first of them.
    """

    def __init__(self, cfg: DDPConfig, parts: Parts) -> None:
        layouts = localize(parts.cores[0])
        parts.fill()
        self.model, self.bucket = parts.models[0], cfg.bucket_mb * 2**20
        super().__init__(layouts, parts)

    def forward(self, *args: Any) -> torch.Tensor:
        return self.model(*args)  # type: ignore[no-any-return]

    def begin(self, microbatches: int) -> None:
        self.left, self.leaf = microbatches, leaf_size(microbatches)
        self.sums = PairwiseSum[list[torch.Tensor]](_plus)

    @contextmanager
    def microbatch(self, last: bool) -> Iterator[None]:
        yield
        self.left -= 1
        assert last == (self.left == 0), "a step has as many microbatches as it began with"
        if self.left % self.leaf == 0:  # inside a leaf autograd adds them up, in sequence
            self.sums.push(self._take())
        if last:
            for parameter, gradient in zip(self.named.values(), self.sums.total(), strict=True):
                parameter.grad = gradient
            self.finish_gradients()

    def _take(self) -> list[torch.Tensor]:
        gradients = []
        for name, parameter in self.named.items():
            assert parameter.grad is not None, name
            gradients.append(parameter.grad)
            parameter.grad = None
        return gradients

    def finish_gradients(self) -> None:
        del self.sums  # the parameters have what it held
        bucket: list[torch.Tensor] = []
        for gradient in (p.grad for p in self.named.values() if p.grad is not None):
            bucket.append(gradient)
            if sum(g.nbytes for g in bucket) >= self.bucket:
                self._sum(bucket)
                bucket = []
        self._sum(bucket)
        super().finish_gradients()

    def _sum(self, bucket: list[torch.Tensor]) -> None:
        """Add a bucket up over dp, in place: a message of limited size, and so are the two copies that it takes."""
        if not bucket or self.topo.size("dp") == 1:
            return
        flat = sum_over_ranks(torch.cat([g.flatten() for g in bucket]), self.topo, "dp")
        for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))

    @torch.no_grad()
    def norm(self, scale: float | None = None) -> torch.Tensor:
        """Over tp alone: all dp ranks have the same gradients, and adding up their copies' shares would depend on their number."""
        gradients = {name: p.grad for name, p in self.named.items() if p.grad is not None}
        if scale is not None:
            torch._foreach_mul_(list(gradients.values()), 1.0 / scale)
        squares = torch.stack(torch._foreach_norm(list(gradients.values()), 2)).square()
        whole = [all(p.is_replicate() for p in self.layouts[name].placements) for name in gradients]  # on every tp rank
        copies = torch.tensor([self.topo.size("tp") if copied else 1 for copied in whole], device=squares.device)
        return all_reduce((squares / copies).sum(), self.topo, "tp").sqrt()


def _plus(a: list[torch.Tensor], b: list[torch.Tensor]) -> list[torch.Tensor]:
    torch._foreach_add_(a, b)
    return a
