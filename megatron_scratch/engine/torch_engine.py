"""What ddp and fsdp share: one tensor and one optimizer state per parameter, under torch's own optimizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from megatron_scratch.engine.base import Parts, Shapes
from megatron_scratch.engine.clip import clip_, global_norm
from megatron_scratch.parallel.collectives import sum_over, swap
from megatron_scratch.parallel.layout import Layout, local


class TorchEngine:
    """Six of an engine's eight methods, and `finish_gradients`; how gradients come about is its subclasses'.

    The optimizer works on plain tensors that share their memory with the parameters: its kernels are elementwise, know nothing of
    DTensors (torch has no sharding rule for most fused ones), and skip their dispatch. The outside sees parts of global tensors.

    A pipeline's first and last stage both hold a tied parameter. Their gradients are added up, so that both update alike; where one
    rank has both stages, the second is a copy of the first.

    Args:
        layouts: name -> how each parameter lies over tp.
    """

    copies = "dp"

    def __init__(self, layouts: Mapping[str, Layout], parts: Parts) -> None:
        self.layouts, self.topo, self.clip, self.tied = layouts, parts.topo, parts.clip, parts.tied
        self.named: dict[str, nn.Parameter] = {}  # a DTensor, or this rank's plain part
        self.twins: dict[str, nn.Parameter] = {}
        for name, parameter in (pair for core in parts.cores for pair in core.named_parameters()):
            (self.twins if name in self.named else self.named)[name] = parameter
        self.plain = {name: nn.Parameter(local(p.detach())) for name, p in self.named.items()}
        self.optimizer = parts.make_optimizer(self.plain)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def finish_gradients(self) -> None:
        """Add up what the two ends of a pipeline share, and over tp what is partial, in one message."""
        for name, twin in self.twins.items():
            local(self.named[name].grad).add_(local(twin.grad))
            twin.grad = None
        if self.tied in self.named and not self.twins:  # by another rank too, the one at the other end
            gradient = local(self.named[self.tied].grad)
            gradient.add_(swap(gradient, self.topo, "pp", self.topo.size("pp") - 1 - self.topo.index("pp")))
        grads = [p.grad for name, p in self.named.items() if self.layouts[name].partial and p.grad is not None]
        sum_over([local(g) for g in grads], self.topo, "tp")

    def _gradients(self) -> dict[str, torch.Tensor]:
        return {name: self._shown(name, local(p.grad)) for name, p in self.named.items() if p.grad is not None}

    def _shown(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the size of this rank's part as a part of the global one; counters as they are."""
        parameter = self.named[name]
        if tensor.shape != local(parameter).shape:
            return tensor
        if not isinstance(parameter, DTensor):
            return self.layouts[name].wrap(tensor)
        mesh, placements = parameter.device_mesh, parameter.placements
        return DTensor.from_local(tensor, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride())

    def norm(self, scale: float | None = None) -> torch.Tensor:
        gradients = self._gradients()
        if scale is not None and gradients:
            torch._foreach_mul_([local(g) for g in gradients.values()], 1.0 / scale)
        return global_norm(self._counted(gradients), self.topo)

    def update(self, lr: float, norm: torch.Tensor) -> None:
        gradients = {name: local(p.grad) for name, p in self.named.items() if p.grad is not None}
        if self.clip > 0 and gradients:
            clip_(list(gradients.values()), norm, self.clip)
        for name, plain in self.plain.items():
            plain.data = local(self.named[name].detach())  # FSDP may move a part before its first forward
            plain.grad = gradients.get(name)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.optimizer.step()
        self._changed()
        self.drop()

    def drop(self) -> None:
        for parameter in (*self.named.values(), *self.plain.values()):
            parameter.grad = None

    def state(self) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for name, parameter in self.named.items():
            out[f"model.{name}"] = self._shown(name, local(parameter.detach()))
            for key, value in self.optimizer.state.get(self.plain[name], {}).items():
                out[f"optim.{name}.{key}"] = self._shown(name, value)
        return out | {f"grad.{name}": g for name, g in self._gradients().items()}

    def load(self, shapes: Shapes, fill: Callable[[dict[str, Any]], None]) -> None:
        self.optimizer.state.clear()  # a run that goes back may hold more than the checkpoint does
        self._allocate(shapes)
        fill(self.state())
        self._changed()

    def _counted(self, gradients: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Those that go into the norm: of a tied parameter the first stage's."""
        elsewhere = self.tied if self.topo.index("pp") > 0 else ""
        return [g for name, g in gradients.items() if name != elsewhere]

    @torch.no_grad()
    def _changed(self) -> None:
        """After weights were written: what is made of them follows."""
        for name, twin in self.twins.items():
            local(twin).copy_(local(self.named[name]))

    def _allocate(self, shapes: Shapes) -> None:
        """Zeros for every `optim.NAME.KEY`: laid out as the parameter where the shapes agree, else a plain tensor (counters)."""
        for full, (shape, dtype) in shapes.items():
            name, _, key = full.removeprefix("optim.").rpartition(".")
            if not full.startswith("optim.") or name not in self.named:
                continue
            plain = self.plain[name]
            state: dict[str, Any] = self.optimizer.state[plain]
            if self.layouts[name].shape == shape:
                state[key] = torch.zeros_like(plain, dtype=dtype)
            else:  # fused kernels want their step counters beside the parameter
                state[key] = torch.zeros(shape, dtype=dtype, device=plain.device)
