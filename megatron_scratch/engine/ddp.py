"""Data parallel: every rank holds the whole model, gradients are summed in buckets while backward goes on."""

# No `from __future__ import annotations`: DDP reads the types of its hook and does not take strings.
import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from megatron_scratch.config.train import EngineConfig
from megatron_scratch.engine.base import Parts
from megatron_scratch.engine.clip import clip_, global_norm

# torch 2.13 renamed the argument and warns of the old name; 2.11 knows only the old one.
_DDP_ARGUMENTS = inspect.signature(DistributedDataParallel.__init__).parameters
_SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _DDP_ARGUMENTS else "broadcast_buffers"


def _sum_bucket(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DDP's default divides by the number of ranks. The loss already is a part of the global mean, so gradients only add."""
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


class DDPEngine:
    """`torch.nn.parallel.DistributedDataParallel` over the dp axis; over one rank, nothing at all."""

    def __init__(self, cfg: EngineConfig, parts: Parts) -> None:
        parts.fill()
        self.topo, self.clip = parts.topo, parts.clip
        self.named = dict(parts.core.named_parameters())
        self.wrapped: nn.Module = parts.model
        group = parts.topo.group("dp")
        if group is not None:
            ids = [parts.topo.device.index] if parts.topo.device.type == "cuda" else None
            # Buffers are constants here: never synced. gradient_as_bucket_view saves one copy of the gradients.
            self.wrapped = DistributedDataParallel(parts.model, device_ids=ids, process_group=group, bucket_cap_mb=cfg.bucket_mb,
                                                   gradient_as_bucket_view=True, **{_SYNC_BUFFERS: False})  # fmt: skip
            self.wrapped.register_comm_hook(group, _sum_bucket)
        self.optimizer = parts.make_optimizer(self.named)

    def forward(self, *args: Any) -> torch.Tensor:
        return self.wrapped(*args)

    def microbatch(self, last: bool) -> AbstractContextManager[None]:
        if last or not isinstance(self.wrapped, DistributedDataParallel):
            return nullcontext()
        return self.wrapped.no_sync()

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self, lr: float) -> torch.Tensor:
        gradients = [p.grad for p in self.named.values() if p.grad is not None]
        norm = global_norm(gradients, self.topo)
        if self.clip > 0:
            clip_(gradients, norm, self.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def state(self) -> dict[str, torch.Tensor]:
        out: dict[str, torch.Tensor] = {}
        for name, parameter in self.named.items():
            out[f"model.{name}"] = parameter.detach()
            for key, value in self.optimizer.state.get(parameter, {}).items():
                out[f"optim.{name}.{key}"] = value
        return out

    def allocate(self, shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        allocate_optimizer_state(self.named, self.optimizer, shapes)


def allocate_optimizer_state(
    named: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
) -> None:
    """Zeros for every `optim.NAME.KEY`: laid out as the parameter where the shapes agree, else a plain tensor (counters)."""
    for full, (shape, dtype) in shapes.items():
        name, _, key = full.removeprefix("optim.").rpartition(".")
        if not full.startswith("optim.") or name not in named:
            continue
        parameter = named[name]
        state: dict[str, Any] = optimizer.state[parameter]
        if key not in state:
            alike = tuple(parameter.shape) == shape
            if alike:
                state[key] = torch.zeros_like(parameter, dtype=dtype)
            else:  # fused kernels want their step counters beside the parameter
                state[key] = torch.zeros(shape, dtype=dtype, device=parameter.device)
