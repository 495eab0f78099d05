"""Loss on held-out text: the same windows in the same order under every layout, each predicted token counted once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from megatron_scratch.data.loader import Batch
from megatron_scratch.parallel.collectives import all_reduce_world
from megatron_scratch.parallel.topology import Topology
from megatron_scratch.train.objective import LanguageModel
from megatron_scratch.train.step import to_device


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


@torch.no_grad()
def evaluate(
    model: LanguageModel, forward: Callable[..., torch.Tensor], batches: Iterator[Batch], topo: Topology,
    bytes_per_id: np.ndarray | None, limit: int | None,
) -> Evaluation:  # fmt: skip
    """Evaluate on this rank's `batches` (at most `limit` of them), summed over ranks; collective.

    Args:
        forward: the model's forward through its engine, which may have to gather parameters first.
        bytes_per_id: UTF-8 bytes that each token id stands for, shape (V,).
    """
    was_training = model.training
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64)
    for batch in islice(batches, limit):
        tokens, labels, positions, documents = to_device(batch, topo.device)
        valid = batch.labels_BS[batch.labels_BS >= 0]
        loss = forward(tokens, labels, positions, documents)
        if not topo.counts_tokens:
            continue
        totals[0] += loss.double().cpu()
        totals[1] += valid.size
        totals[2] += 0 if bytes_per_id is None else int(bytes_per_id[valid].sum())
    model.train(was_training)
    all_reduce_world(totals, topo)
    return Evaluation(float(totals[0] / totals[1].clamp(min=1)), int(totals[1]), int(totals[2]))
