"""What an engine is: who holds parameters, gradients and optimizer state, and when gradients are reduced."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from megatron_scratch.parallel.topology import Topology

Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # what a checkpoint holds: name -> global shape, dtype


@dataclass(frozen=True)
class Parts:
    """What an engine is built from. It decides in which order: some shard before there is memory, some after."""

    models: tuple[nn.Module, ...]  # what is called and wrapped: the whole model, or this rank's stages of a pipeline
    cores: tuple[nn.Module, ...]  # the part of each whose parameter names are the global ones; `layers` are the units to shard by
    fill: Callable[[], None]  # gives the meta-device models memory and their initial values
    make_optimizer: Callable[[dict[str, nn.Parameter]], torch.optim.Optimizer]
    topo: Topology
    clip: float  # largest gradient norm; 0: no clipping
    compute_dtype: torch.dtype = torch.float32  # of the activations; parameters are fp32 masters (fp64 in fp64)
    tied: str = ""  # the parameter that the first and the last stage of a pipeline both hold
    gradient_dtype: torch.dtype | None = None  # gradients are added up over microbatches and dp in it; None: the masters'


class Engine(Protocol):
    """Eight methods, and three more of those that can hold the stages of a pipeline (`Staged`). The training step knows nothing
    else of how a model is sharded.

    A step is `forward` and `backward` inside `microbatch`, then `norm`, then one of `update` and `drop`.
    """

    copies: str  # the axis over which ranks hold the same parameters and optimizer state: "dp", "replicate" (hsdp's), "": none

    def forward(self, *args: Any) -> torch.Tensor:
        """The model's forward, with whatever the engine wraps around it."""

    def microbatch(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of one microbatch. On leaving the last one of a step, gradients are whole: summed over
        dp (each engine as late and as rarely as it can) and, where they are partial sums, over tp."""

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate gradients. `loss` is this rank's sum divided by the *global* token count: gradients add up over dp."""

    def norm(self, scale: float | None = None) -> torch.Tensor:
        """The global gradient norm, a scalar on the device; collective, and once a step.

        `scale` is what the loss was multiplied by: gradients are divided by it first. A number that is not finite in any rank's
        gradients makes the norm of at least that rank not finite.
        """

    def update(self, lr: float, norm: torch.Tensor) -> None:
        """Clip gradients that have this norm, update, drop the gradients."""

    def drop(self) -> None:
        """Drop the gradients. Weights, optimizer state and its counters stay as if the step had never been."""

    def state(self) -> dict[str, Any]:
        """The live tensors: `model.NAME` and `optim.NAME.KEY`, and between the last microbatch and `update` or `drop` `grad.NAME`.

        A DTensor, or `parallel.pieces.Pieces`, where a rank holds a part; a plain tensor where it holds all.
        """

    def load(self, shapes: Shapes, fill: Callable[[dict[str, Any]], None]) -> None:
        """Make room for the optimizer state that a checkpoint holds, and for no other, have `fill` write into `state()`, and take
        it over. Between steps, at any time."""


class Staged(Engine, Protocol):
    """An engine over several stages: the schedule calls them, and says when which gradients are there."""

    calls: Sequence[nn.Module]  # the stages, wrapped

    def accumulate(self, stage: int) -> None:
        """A microbatch's gradients of a stage (counted on this rank) are there."""

    def reduce(self, stage: int) -> None:
        """All microbatches' are: sum them over dp."""

    def finish_gradients(self) -> None:
        """All stages are reduced: on return gradients are whole."""
