"""Loss on held-out text: the same windows in the same order under every layout, each predicted token counted once."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from megatron_scratch.data.loader import Batch
from megatron_scratch.parallel.collectives import all_reduce_world
from megatron_scratch.parallel.topology import Topology


@dataclass(frozen=True)
class Evaluation:
    """Mean loss in nats per predicted token, and what it was measured on."""

    loss: float
    tokens: int
    bytes: int  # UTF-8 bytes of the predicted text; 0 where the tokenizer is unknown

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float | None:
        """Comparable between tokenizers: total nats / ln 2 / bytes."""
        return self.loss * self.tokens / math.log(2) / self.bytes if self.bytes else None


class Stop:
    """Whether all ranks break off, before the same batch.

    Before each batch a rank sends whether it was asked to stop, 8 bytes over the host, and goes on: the answer is waited for `lag`
    batches later. In a pipeline the first stage is ahead of the last one by as many batches as there are stages, and must not wait
    for it; elsewhere the message travels during a batch.
    """

    def __init__(self, asked: Callable[[], bool], topo: Topology, tick: Callable[[], None] = lambda: None) -> None:
        """`tick`: called with every batch."""
        self.asked, self.topo, self.tick, self.lag = asked, topo, tick, topo.size("pp")
        self.sent: deque[tuple[torch.Tensor, dist.Work | None]] = deque()

    def __call__(self) -> bool:
        self.tick()
        flag = torch.tensor(int(self.asked()))
        self.sent.append((flag, dist.all_reduce(flag, async_op=True) if self.topo.world > 1 else None))
        return len(self.sent) > self.lag and self._oldest()

    def _oldest(self) -> bool:
        flag, work = self.sent.popleft()
        if work is not None:
            work.wait()
        return bool(flag.item())

    def over(self) -> None:
        """Wait for what is still on its way: every rank has sent the same."""
        while self.sent:
            self._oldest()


@torch.no_grad()
def evaluate(
    models: Sequence[nn.Module], loss_of: Callable[[Batch], torch.Tensor], batches: Iterator[Batch], topo: Topology,
    bytes_per_id: np.ndarray | None, limit: int | None, stop: Stop | None = None,
) -> Evaluation | None:  # fmt: skip
    """Evaluate on this rank's `batches` (at most `limit` of them, as many as on all others), summed over ranks; collective.

    Args:
        models: the model, or this rank's stages of it.
        loss_of: a batch's summed loss, as this rank counts it: see `passes.Passes`.
        bytes_per_id: UTF-8 bytes that each token id stands for, shape (V,).
        stop: asked before each batch.

    Returns:
        None: it was broken off.
    """
    for model in models:
        model.eval()
    totals = torch.zeros(3, dtype=torch.float64)
    # fp32 losses have 24 bits: float64 adds them up exactly, in any order, while the sum is below 2^29 of the smallest of them.
    whole = True
    for batch in islice(batches, limit):
        if stop is not None and stop():
            whole = False
            break
        totals[0] += loss_of(batch).double().cpu()
        if not topo.counts_tokens:
            continue
        valid = batch.labels_BS[batch.labels_BS >= 0]
        totals[1] += valid.size
        totals[2] += 0 if bytes_per_id is None else int(bytes_per_id[valid].sum())
    for model in models:
        model.train()
    if stop is not None:
        stop.over()
    if not whole:
        return None
    all_reduce_world(totals, topo)
    return Evaluation(float(totals[0] / totals[1].clamp(min=1)), int(totals[1]), int(totals[2]))
