"""Fully sharded data parallel (PyTorch FSDP2): each rank keeps 1/n of every parameter, gradient and optimizer state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage

from megatron_scratch.config.engine import FSDPConfig
from megatron_scratch.engine.base import Parts
from megatron_scratch.engine.torch_engine import TorchEngine
from megatron_scratch.parallel.layout import layouts
from megatron_scratch.parallel.topology import HYBRID


class FSDPEngine(TorchEngine):
    """`fully_shard` over dp, a unit per layer and one for what is outside of them; over one rank, nothing at all.

    Weights are gathered in the compute dtype, gradients are added up and reduced in the master's, or in
    `gradient_dtype`. With engine=hsdp the mesh is (replicate, shard): gradients are scattered inside a group and all-reduced over
    the groups.

    The stages of a pipeline keep gathered weights from the first forward of a step to the last backward, and gradients whole
    until then, unless `reshard_after_forward` and `reduce_every_microbatch` say otherwise. Gradients are reduced by our call, not
    by hooks of backward, which fire before a schedule's separate weight gradients are there.
    """

    copies = "replicate"

    def __init__(self, cfg: FSDPConfig, parts: Parts) -> None:
        topo = parts.topo
        table = {name: layout for core in parts.cores for name, layout in layouts(core).items()}
        self.calls, self.every, self.staged = parts.models, cfg.reduce_every_microbatch, topo.size("pp") > 1
        self.reshard = not self.staged if cfg.reshard_after_forward is None else cfg.reshard_after_forward
        if topo.size("dp") > 1:
            for model, core in zip(parts.models, parts.cores, strict=True):
                self._shard(model, core, parts)
        parts.fill()
        super().__init__(table, parts)

    def _shard(self, model: nn.Module, core: nn.Module, parts: Parts) -> None:
        topo = parts.topo
        assert topo.mesh is not None
        mesh = topo.mesh[HYBRID] if topo.size("replicate") > 1 else topo.axes["dp"]
        master = next(core.parameters()).dtype
        policy = MixedPrecisionPolicy(param_dtype=parts.compute_dtype, reduce_dtype=parts.gradient_dtype or master,
                                      cast_forward_inputs=False)  # fmt: skip
        units = (*core.layers.values(), model)
        for unit in units:
            # Backward begins with the head (in the outermost unit, with the embedding) and the last layer: letting go of them
            # after forward would gather them again at once.
            reshard = self.reshard and (self.staged or unit not in units[-2:])
            fully_shard(unit, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy)
        for module in model.modules():
            if isinstance(module, FSDPModule):  # gradients only add, see `Engine.backward`
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        if self.staged:
            self._hold(model)

    def _hold(self, model: nn.Module) -> None:
        """Until `reduce`, backward reduces nothing."""
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(False)
            model.set_is_last_backward(False)
            model.set_reshard_after_backward(self.reshard)

    def forward(self, *args: Any) -> torch.Tensor:
        return self.calls[0](*args)  # type: ignore[no-any-return]

    @contextmanager
    def microbatch(self, last: bool) -> Iterator[None]:
        model = self.calls[0]
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last or self.every)
            model.set_is_last_backward(last)
        yield
        if last:
            self.finish_gradients()

    def accumulate(self, stage: int) -> None:
        if self.topo.deferred is not None:  # came after the hooks of backward, which add to the sums in fp32
            for parameter in (p for group in _groups(self.calls[stage]) for p in group.fsdp_params):
                parameter.accumulate_unsharded_grad_if_needed()
                parameter.to_accumulated_grad_if_needed()
        if self.every:
            self.reduce(stage)

    def reduce(self, stage: int) -> None:
        model = self.calls[stage]
        if isinstance(model, FSDPModule):
            # What torch's own stages do after the last microbatch.
            PipelineStage.perform_reduce_grad(SimpleNamespace(submod=model), 1)  # type: ignore[arg-type]
            self._hold(model)


def _groups(model: nn.Module) -> Iterator[Any]:
    """The parameter groups inside FSDP: one to a module in torch 2.11, a list in 2.13."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state: Any = module._get_fsdp_state()
            yield from getattr(state, "_fsdp_param_groups", None) or filter(None, [state._fsdp_param_group])
