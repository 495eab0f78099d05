"""What an engine is: who holds parameters, gradients and optimizer state, and when gradients are reduced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from megatron_scratch.parallel.topology import Topology


@dataclass(frozen=True)
class Parts:
    """What an engine is built from. It decides in which order: some shard before there is memory, some after."""

    model: nn.Module  # what is called and wrapped: tokens and labels in, loss out
    core: nn.Module  # the part of it whose parameter names are the global ones
    fill: Callable[[], None]  # gives the meta-device model memory and its initial values
    make_optimizer: Callable[[dict[str, nn.Parameter]], torch.optim.Optimizer]
    topo: Topology
    clip: float  # largest gradient norm; 0: no clipping


class Engine(Protocol):
    """Six methods. The training step knows nothing else of how a model is sharded."""

    def forward(self, *args: Any) -> torch.Tensor:
        """The model's forward, with whatever the engine wraps around it."""

    def microbatch(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of one microbatch. Gradients are reduced in the last one of a step only."""

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate gradients. `loss` is this rank's sum divided by the *global* token count: gradients add up over ranks."""

    def step(self, lr: float) -> torch.Tensor:
        """Clip, update, zero the gradients. Returns the global gradient norm before clipping, on the device."""

    def state(self) -> dict[str, torch.Tensor]:
        """`model.NAME` and `optim.NAME.KEY` -> the live tensor (a DTensor where it is sharded): to save, or to load into."""

    def allocate(self, shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        """Make the optimizer state that a checkpoint holds, so that `state()` has a place for each of its tensors."""
