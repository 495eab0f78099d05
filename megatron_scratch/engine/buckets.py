"""Gradients summed over a group of ranks in buckets, while backward goes on.

The buckets are the same in every step. With three ranks and more, the order in which a ring or a tree adds the ranks' numbers up
depends on where in the message a number stands. torch's DistributedDataParallel makes new buckets after its first backward, in
the order in which gradients came: the first step of a run that is resumed then adds up in another order than the same step of a
run that was never stopped, and the two differ in the last bits from there on (seen with 4 ranks over gloo, torch 2.13).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

FIRST = 2**20  # bytes of the first bucket: messages begin soon after backward does (Li et al., arXiv 2006.15704)


class Buckets:
    """Sums of the gradients of some parameters over a group; each bucket goes out as soon as it and all before it are complete."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter], group: dist.ProcessGroup, size: int) -> None:
        """
        Args:
            parameters: in the order of forward. Backward has their gradients about the other way round.
            size: bytes of a bucket, of gradients in the parameters' dtype.
        """
        self.group, self.buckets = group, _cut(parameters[::-1], size)
        self.works: list[dist.Work] = []
        self.missing: list[int] | None = None  # gradients that each bucket waits for; None: it is not the last microbatch
        for number, bucket in enumerate(self.buckets):
            for parameter in bucket:
                parameter.register_post_accumulate_grad_hook(lambda _, number=number: self._one_more(number))

    def watch(self) -> None:
        """Before the last backward of a step: gradients are whole as they come."""
        self.missing = [len(bucket) for bucket in self.buckets]

    def send(self) -> None:
        """Send what has not been sent: there is no gradient to come."""
        while len(self.works) < len(self.buckets):
            self._send(self.buckets[len(self.works)])

    def finish(self) -> None:
        """Send what is left, wait for all of it. `grad` of every parameter then is the sum."""
        self.send()
        for work in self.works:
            work.wait()
        self.works, self.missing = [], None

    def _one_more(self, number: int) -> None:
        if self.missing is None:
            return
        self.missing[number] -= 1
        while len(self.works) < len(self.buckets) and self.missing[len(self.works)] == 0:  # one order on all ranks
            self._send(self.buckets[len(self.works)])

    def _send(self, bucket: Sequence[torch.nn.Parameter]) -> None:
        held = [p for p in bucket if p.grad is not None]
        flat = torch.cat([p.grad.flatten() for p in held]) if held else bucket[0].new_zeros(0)
        self.works.append(dist.all_reduce(flat, group=self.group, async_op=True))
        for parameter, part in zip(held, flat.split([p.numel() for p in held]), strict=True):
            parameter.grad = part.view_as(parameter)  # so that the message is the only copy


def _cut(parameters: Sequence[torch.nn.Parameter], size: int) -> list[list[torch.nn.Parameter]]:
    """In their order, a bucket ending with the parameter that fills it; one dtype in each."""
    buckets: list[list[torch.nn.Parameter]] = []
    for parameter in parameters:
        limit = min(FIRST, size) if len(buckets) == 1 else size
        full = buckets and (sum(p.nbytes for p in buckets[-1]) >= limit or buckets[-1][0].dtype != parameter.dtype)
        if full or not buckets:
            buckets.append([])
        buckets[-1].append(parameter)
    return buckets
