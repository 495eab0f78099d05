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
from megatron_scratch.parallel.layout import localize

# torch 2.13 renamed the argument and warns of the old name; 2.11 knows only the old one.
_DDP_ARGUMENTS = inspect.signature(DistributedDataParallel.__init__).parameters
_SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _DDP_ARGUMENTS else "broadcast_buffers"


def _sum_bucket(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DDP's default divides by the number of ranks. The loss already is a part of the global mean, so gradients only add."""
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


class DDPEngine(TorchEngine):
    """`torch.nn.parallel.DistributedDataParallel` over the dp axis; over one rank, nothing at all."""

    def __init__(self, cfg: DDPConfig, parts: Parts) -> None:
        layouts = localize(parts.core)  # DDP's buckets are made of plain tensors
        parts.fill()
        self.wrapped: nn.Module = parts.model
        group = parts.topo.group("dp")
        if group is not None:
            ids = [parts.topo.device.index] if parts.topo.device.type == "cuda" else None
            # Buffers are constants here: never synced. gradient_as_bucket_view saves one copy of the gradients.
            self.wrapped = DistributedDataParallel(parts.model, device_ids=ids, process_group=group, bucket_cap_mb=cfg.bucket_mb,
                                                   gradient_as_bucket_view=True, **{_SYNC_BUFFERS: False})  # fmt: skip
            self.wrapped.register_comm_hook(group, _sum_bucket)
        super().__init__(dict(parts.core.named_parameters()), layouts, parts)

    def forward(self, *args: Any) -> torch.Tensor:
        return self.wrapped(*args)

    @contextmanager
    def microbatch(self, last: bool) -> Iterator[None]:
        alone = last or not isinstance(self.wrapped, DistributedDataParallel)
        with nullcontext() if alone else self.wrapped.no_sync():
            yield
        if last:
            self.finish_gradients()
