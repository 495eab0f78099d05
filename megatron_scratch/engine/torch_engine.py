"""What ddp and fsdp share: one tensor and one optimizer state per parameter, under torch's own optimizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from megatron_scratch.engine.base import Parts, Shapes
from megatron_scratch.engine.clip import clip_, global_norm
from megatron_scratch.parallel.collectives import sum_over
from megatron_scratch.parallel.layout import Layout, local


class TorchEngine:
    """Four of an engine's six methods, and `finish_gradients`; how gradients come about is its subclasses'.

    The optimizer works on plain tensors that share their memory with the parameters: its kernels are elementwise, know nothing of
    DTensors (torch has no sharding rule for most fused ones), and skip their dispatch. The outside sees parts of global tensors.

    Args:
        named: global name -> parameter: a DTensor, or this rank's plain part.
        layouts: how each lies over tp.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], layouts: Mapping[str, Layout], parts: Parts) -> None:
        self.named, self.layouts, self.topo, self.clip = dict(named), layouts, parts.topo, parts.clip
        self.plain = {name: nn.Parameter(local(p.detach())) for name, p in self.named.items()}
        self.optimizer = parts.make_optimizer(self.plain)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def finish_gradients(self) -> None:
        """Add up over tp what is partial, in one message."""
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

    def step(self, lr: float) -> torch.Tensor:
        gradients = self._gradients()
        norm = global_norm(list(gradients.values()), self.topo)
        if self.clip > 0:
            clip_(list(gradients.values()), norm, self.clip)
        for name, plain in self.plain.items():
            plain.data = local(self.named[name].detach())  # FSDP may move a part before its first forward
            plain.grad = local(gradients[name]) if name in gradients else None
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.optimizer.step()
        for parameter in (*self.named.values(), *self.plain.values()):
            parameter.grad = None
        return norm

    def state(self) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for name, parameter in self.named.items():
            out[f"model.{name}"] = self._shown(name, local(parameter.detach()))
            for key, value in self.optimizer.state.get(self.plain[name], {}).items():
                out[f"optim.{name}.{key}"] = self._shown(name, value)
        return out | {f"grad.{name}": g for name, g in self._gradients().items()}

    def load(self, shapes: Shapes, fill: Callable[[dict[str, Any]], None]) -> None:
        self._allocate(shapes)
        fill(self.state())

    def _allocate(self, shapes: Shapes) -> None:
        """Zeros for every `optim.NAME.KEY`: laid out as the parameter where the shapes agree, else a plain tensor (counters)."""
        for full, (shape, dtype) in shapes.items():
            name, _, key = full.removeprefix("optim.").rpartition(".")
            if not full.startswith("optim.") or name not in self.named:
                continue
            plain = self.plain[name]
            state: dict[str, Any] = self.optimizer.state[plain]
            if key not in state:
                if self.layouts[name].shape == shape:
                    state[key] = torch.zeros_like(plain, dtype=dtype)
                else:  # fused kernels want their step counters beside the parameter
                    state[key] = torch.zeros(shape, dtype=dtype, device=plain.device)
