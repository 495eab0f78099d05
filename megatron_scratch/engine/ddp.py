"""Data parallel: every rank holds the whole model, gradients are summed in buckets while backward goes on."""

# No `from __future__ import annotations`: DDP reads the types of its hook and does not take strings.
import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from megatron_scratch.config.engine import DDPConfig
from megatron_scratch.engine.base import Parts
from megatron_scratch.engine.torch_engine import TorchEngine
from megatron_scratch.parallel.layout import keep_copies, localize

# torch 2.13 renamed the argument and warns of the old name; 2.11 knows only the old one.
_DDP_ARGUMENTS = inspect.signature(DistributedDataParallel.__init__).parameters
_SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _DDP_ARGUMENTS else "broadcast_buffers"


def _sum_bucket(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DDP's default divides by the number of ranks. The loss already is a part of the global mean, so gradients only add."""
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


class DDPEngine(TorchEngine):
    """`torch.nn.parallel.DistributedDataParallel` over the dp axis; over one rank, nothing at all.

    The stages of a pipeline are not wrapped: DDP counts one forward, one backward, and has been seen to give wrong gradients,
    silently, where a schedule computes weight gradients by themselves (torch 2.13). They are summed as soon as a stage has all of
    its microbatches, while other stages go on.
    """

    def __init__(self, cfg: DDPConfig, parts: Parts) -> None:
        layouts = {name: layout for core in parts.cores for name, layout in localize(core).items()}  # buckets are of plain tensors
        parts.fill()
        self.calls, self.group, self.bucket = parts.models, parts.topo.group("dp"), cfg.bucket_mb * 2**20
        if self.group is not None and parts.topo.size("pp") == 1:
            self.calls = (_wrap(cfg, parts.models[0], self.group, parts.topo.device),)
        self.of_stage = [list(core.parameters()) for core in parts.cores]
        self.sums: list[tuple[dist.Work, torch.Tensor, list[torch.Tensor]]] = []
        super().__init__(layouts, parts)
        self._changed()

    def _changed(self) -> None:
        """A pipeline's microbatches share the weights that they compute with, until these change."""
        super()._changed()
        if self.topo.size("pp") > 1:
            keep_copies(p for parameters in self.of_stage for p in parameters)

    def forward(self, *args: Any) -> torch.Tensor:
        return self.calls[0](*args)  # type: ignore[no-any-return]

    @contextmanager
    def microbatch(self, last: bool) -> Iterator[None]:
        wrapped = self.calls[0]
        with nullcontext() if last or not isinstance(wrapped, DistributedDataParallel) else wrapped.no_sync():
            yield
        if last:
            self.finish_gradients()

    def accumulate(self, stage: int) -> None:
        """They are where they belong."""

    def reduce(self, stage: int) -> None:
        if self.group is None:
            return
        bucket: list[torch.Tensor] = []
        for gradient in (p.grad for p in self.of_stage[stage] if p.grad is not None):
            bucket.append(gradient)
            if sum(g.nbytes for g in bucket) >= self.bucket:
                self._sum(bucket)
                bucket = []
        self._sum(bucket)

    def _sum(self, bucket: list[torch.Tensor]) -> None:
        if bucket:
            flat = torch.cat([g.flatten() for g in bucket])
            self.sums.append((dist.all_reduce(flat, group=self.group, async_op=True), flat, bucket))

    def finish_gradients(self) -> None:
        for work, flat, bucket in self.sums:
            work.wait()
            for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))
        self.sums.clear()
        super().finish_gradients()


def _wrap(cfg: DDPConfig, model: nn.Module, group: dist.ProcessGroup, device: torch.device) -> DistributedDataParallel:
    ids = [device.index] if device.type == "cuda" else None
    # Buffers are constants here: never synced. gradient_as_bucket_view saves one copy of the gradients.
    wrapped = DistributedDataParallel(model, device_ids=ids, process_group=group, bucket_cap_mb=cfg.bucket_mb,
                                      gradient_as_bucket_view=True, **{_SYNC_BUFFERS: False})  # fmt: skip
    wrapped.register_comm_hook(group, _sum_bucket)
    return wrapped
