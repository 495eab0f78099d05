"""Data parallel: every rank holds the whole model, gradients are summed in buckets while backward goes on."""

# No `from __future__ import annotations`: DDP reads the types of its hook and does not take strings.
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from megatron_scratch.config.engine import DDPConfig
from megatron_scratch.engine.base import Parts, Shapes
from megatron_scratch.engine.update import Update
from megatron_scratch.parallel.layout import localize

# torch 2.13 renamed the argument and warns of the old name; 2.11 knows only the old one.
_DDP_ARGUMENTS = inspect.signature(DistributedDataParallel.__init__).parameters
_SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _DDP_ARGUMENTS else "broadcast_buffers"


def _sum_bucket(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DDP's default divides by the number of ranks. The loss already is a part of the global mean, so gradients only add."""
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


class DDPEngine:
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
        self.update = Update(dict(parts.core.named_parameters()), layouts, parts)

    def forward(self, *args: Any) -> torch.Tensor:
        return self.wrapped(*args)

    @contextmanager
    def microbatch(self, last: bool) -> Iterator[None]:
        alone = last or not isinstance(self.wrapped, DistributedDataParallel)
        with nullcontext() if alone else self.wrapped.no_sync():
            yield
        if last:
            self.update.finish_gradients()

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self, lr: float) -> torch.Tensor:
        return self.update.step(lr)

    def state(self) -> dict[str, Any]:
        return self.update.state()

    def load(self, shapes: Shapes, fill: Callable[[dict[str, Any]], None]) -> None:
        self.update.load(shapes, fill)
