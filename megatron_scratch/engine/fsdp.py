"""Fully sharded data parallel (PyTorch FSDP2): each rank keeps 1/n of every parameter, gradient and optimizer state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from megatron_scratch.config.engine import FSDPConfig
from megatron_scratch.engine.base import Parts
from megatron_scratch.engine.torch_engine import TorchEngine
from megatron_scratch.parallel.layout import layouts
from megatron_scratch.parallel.topology import HYBRID


class FSDPEngine(TorchEngine):
    """`fully_shard` over dp, a unit per layer and one for what is outside of them; over one rank, nothing at all.

    Weights are gathered in the compute dtype, gradients are reduced in the master's. With engine=hsdp the mesh is
    (replicate, shard): gradients are scattered inside a group and all-reduced over the groups.
    """

    def __init__(self, cfg: FSDPConfig, parts: Parts) -> None:
        topo, table = parts.topo, layouts(parts.core)
        self.model = parts.model
        if topo.size("dp") > 1:
            assert topo.mesh is not None
            mesh = topo.mesh[HYBRID] if topo.size("replicate") > 1 else topo.axes["dp"]
            master = next(parts.core.parameters()).dtype
            policy = MixedPrecisionPolicy(param_dtype=parts.compute_dtype, reduce_dtype=master, cast_forward_inputs=False)
            units = (*parts.core.layers.values(), parts.model)
            for unit in units:
                # Backward begins with the head (in the outermost unit, with the embedding) and the last layer: letting go of them
                # after forward would gather them again at once.
                reshard = cfg.reshard_after_forward and unit not in units[-2:]
                fully_shard(unit, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy)
            for module in parts.model.modules():
                if isinstance(module, FSDPModule):  # gradients only add, see `Engine.backward`
                    module.set_gradient_divide_factor(1.0)
                    module.set_force_sum_reduction_for_comms(True)
        parts.fill()
        super().__init__(dict(parts.core.named_parameters()), table, parts)

    def forward(self, *args: Any) -> torch.Tensor:
        return self.model(*args)

    @contextmanager
    def microbatch(self, last: bool) -> Iterator[None]:
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
            self.model.set_is_last_backward(last)
        yield
        if last:
            self.finish_gradients()
