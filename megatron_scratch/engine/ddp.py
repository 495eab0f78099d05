"""Data parallel: every rank holds the whole model, gradients are summed in buckets while backward goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron_scratch.config.engine import DDPConfig
from megatron_scratch.engine.base import Parts
from megatron_scratch.engine.buckets import Buckets
from megatron_scratch.engine.torch_engine import TorchEngine
from megatron_scratch.parallel.layout import keep_copies, localize


class DDPEngine(TorchEngine):
    """Gradients are summed over the dp axis, not averaged: the loss already is a part of the global mean.

    The gradients of a pipeline's stage are summed as soon as it has all of its microbatches, while other stages go on; without a
    pipeline, each bucket as soon as the last backward has filled it.
    """

    def __init__(self, cfg: DDPConfig, parts: Parts) -> None:
        layouts = {name: layout for core in parts.cores for name, layout in localize(core).items()}  # buckets are of plain tensors
        parts.fill()
        group = parts.topo.group("dp")
        self.calls, self.cores = parts.models, parts.cores
        size = cfg.bucket_mb * 2**20
        self.buckets = [] if group is None else [Buckets(list(core.parameters()), group, size) for core in parts.cores]
        super().__init__(layouts, parts)
        self._changed()

    def _changed(self) -> None:
        """A pipeline's microbatches share the weights that they compute with, until these change."""
        super()._changed()
        if self.topo.size("pp") > 1:
            keep_copies(p for core in self.cores for p in core.parameters())

    def forward(self, *args: Any) -> torch.Tensor:
        return self.calls[0](*args)  # type: ignore[no-any-return]

    @contextmanager
    def microbatch(self, last: bool) -> Iterator[None]:
        if last:
            for buckets in self.buckets:
                buckets.watch()
        yield
        if last:
            self.finish_gradients()

    def accumulate(self, stage: int) -> None:
        """They are where they belong."""

    def reduce(self, stage: int) -> None:
        """All gradients of a stage are there: send them."""
        for buckets in self.buckets[stage : stage + 1]:
            buckets.send()

    def finish_gradients(self) -> None:
        for buckets in self.buckets:
            buckets.finish()
        super().finish_gradients()
