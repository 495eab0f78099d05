"""Statistics by layer, every n steps: how large its gradients, its weights and what comes out of it are.

A row has for each module (embed, layers.0, ..., norm, head) that there is:

    grad_norm        L2 norm of the gradient of the step's loss, over all of the module's parameters: before clipping, and without
                     the loss scaler's scale. The squares of all modules add up to the square of the step's `grad_norm`.
    weight_norm      L2 norm of the weights that this gradient was computed at: before the update.
    activation_rms   of the residual stream after the module (of `norm`: of what goes into the head), over all tokens of the step's
                     batch, those too that nobody predicts, and all features; with dropout, where there is any.
    activation_max   the largest absolute value of the same.

`embed` has the table of learned positions too. The head's logits are never there all at once, and have no statistics; tied, there
is no `head`, and the embedding's gradient is the sum over both of its uses.

The numbers do not depend on the layout. Squares are added up in float64: on a rank over what it holds, each number that several
ranks hold with a share of 1/n, then over all ranks. So what differs between layouts is what differs in the gradients and the
activations themselves: rounding. Nothing of it is written back; the numbers of the training stay as they are, to the last bit.

Cost, in a step that is due: two reads of gradients and weights, two of the stream after each layer; the host waits for the device
once, after the update; two messages of 40 bytes a module over the host. In all other steps: one comparison.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_scratch.engine import Engine
from megatron_scratch.engine.clip import copies_of
from megatron_scratch.models.decoder import Decoder
from megatron_scratch.parallel.collectives import all_reduce_world
from megatron_scratch.parallel.layout import local
from megatron_scratch.parallel.pieces import Pieces
from megatron_scratch.parallel.topology import Topology
from megatron_scratch.train.step import StepResult

GRADIENT, WEIGHT, STREAM, NUMBERS = range(4)  # columns: three sums of squares, and how many numbers of the stream these are


@dataclass
class Norms:
    """L2 norms on the device, and to which module each belongs; several ranks that hold the same numbers have a share each."""

    modules: list[int] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)  # float64 scalars


class LayerStatistics:
    """Wraps a step function (`listening`), looks at the stream while that runs, and at gradients when it is called just before the
    update (`take_gradients`). Collective where a step is due."""

    def __init__(self, every: int, engine: Engine, cores: Sequence[Decoder], topo: Topology, tokens_at: Callable[[int], int],
                 write: Callable[[dict[str, Any]], None]) -> None:  # fmt: skip
        """
        Args:
            every: steps; 0: never.
            cores: this rank's stages of the model, or all of it.
            tokens_at: tokens up to a step. write: is given each row, on the main rank.
        """
        self.every, self.engine, self.cores, self.topo = every, engine, cores, topo
        self.tokens_at, self.write = tokens_at, write
        self.names = ["embed", *(f"layers.{i}" for i in range(cores[0].cfg.num_layers)), "norm", "head"]
        self.places = {name: i for i, name in enumerate(self.names)}
        self.looking = False  # the step under way is due
        self._forget()

    def listening(self, step: Callable[[int], StepResult]) -> Callable[[int], StepResult]:
        """The step function, with a row after each step that is due and was applied."""

        def watched(number: int) -> StepResult:
            if self.every == 0 or (number + 1) % self.every:
                return step(number)
            self._look(True)
            try:
                result = step(number)
            finally:
                self._look(False)
            if result.verdict.applied:
                self._write(number + 1)
            self._forget()
            return result

        return watched

    @torch.no_grad()
    def take_gradients(self) -> None:
        """After `engine.norm`, which takes the loss scaler's scale out of gradients, and before `engine.update`, which clips."""
        if not self.looking:
            return
        state = self.engine.state()
        for column, prefix in ((GRADIENT, "grad."), (WEIGHT, "model.")):
            named = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
            self._add_parameters(self.norms[column], named)

    def _look(self, on: bool) -> None:
        self.looking = on
        for core in self.cores:
            core.tap = self._see if on else None

    def _forget(self) -> None:
        self.norms = {column: Norms() for column in (GRADIENT, WEIGHT, STREAM)}
        self.largest: list[torch.Tensor] = []
        self.numbers: list[int] = []

    def _add_parameters(self, norms: Norms, named: Mapping[str, torch.Tensor]) -> None:
        parts = []
        for name, tensor in named.items():
            module = self.places[_module(name)]
            if module == 0 and self.topo.index("pp") > 0:
                continue  # the copy of a tied embedding at the other end of a pipeline: the first stage's counts
            for part, share in self._held(tensor):
                parts.append(part)
                norms.modules.append(module)
                norms.shares.append(share)
        if parts:
            norms.values = list(torch._foreach_norm(parts, 2, dtype=torch.float64))

    def _held(self, tensor: torch.Tensor) -> list[tuple[torch.Tensor, float]]:
        """This rank's parts of a tensor, and the share with which each counts."""
        if isinstance(tensor, Pieces):
            return [(view, float(tensor.counts)) for view in tensor.views.values()]
        return [(local(tensor), 1.0 / copies_of(tensor, self.topo.world // self.topo.size("pp")))]

    @torch.no_grad()
    def _see(self, name: str, x_ND: torch.Tensor) -> None:
        """A microbatch's stream after a module: all of its tokens, on every tp rank, or this rank's part of them."""
        x_ND = x_ND.detach()
        mine = self.topo.sequence_parallel or self.topo.index("tp") == 0
        norms = self.norms[STREAM]
        norms.modules.append(self.places[name])
        norms.shares.append(float(mine))
        norms.values.append(torch.linalg.vector_norm(x_ND, 2, dtype=torch.float64))
        self.largest.append(torch.linalg.vector_norm(x_ND, torch.inf))
        self.numbers.append(x_ND.numel() * mine)

    def _write(self, step: int) -> None:
        table = torch.zeros(len(self.names), 4, dtype=torch.float64)
        there = torch.zeros(len(self.names), 2, dtype=torch.float64)  # whether it has weights; the largest number of its stream
        *columns, largest = self._on_host()
        for column, found in zip(self.norms, columns, strict=True):
            norms = self.norms[column]
            for module, share, value in zip(norms.modules, norms.shares, found, strict=True):
                table[module, column] += share * value * value
        for module, numbers, value in zip(self.norms[STREAM].modules, self.numbers, largest, strict=True):
            table[module, NUMBERS] += numbers
            there[module, 1] = max(float(there[module, 1]), value)
        there[self.norms[WEIGHT].modules, 0] = 1.0
        all_reduce_world(table, self.topo)
        all_reduce_world(there, self.topo, "max")
        if self.topo.is_main:
            rows = {name: _row(*table[i].tolist(), *there[i].tolist()) for i, name in enumerate(self.names)}
            self.write({"step": step, "time": time.time(), "tokens": self.tokens_at(step),
                        "layers": {name: row for name, row in rows.items() if row}})  # fmt: skip

    def _on_host(self) -> list[list[float]]:
        """What the device has found: the norms of each column, and the largest numbers. The one time that the host waits for it."""
        found = [*(norms.values for norms in self.norms.values()), self.largest]
        host = torch.stack([value.double().to(self.topo.device) for values in found for value in values]).cpu()
        return [part.tolist() for part in host.split([len(values) for values in found])]


def _module(parameter: str) -> str:
    first, _, rest = parameter.partition(".")
    return f"layers.{rest.partition('.')[0]}" if first == "layers" else "embed" if first == "position" else first


def _row(gradient: float, weight: float, stream: float, numbers: float, weights: float, largest: float) -> dict[str, float]:
    """Empty where the model has no such module: a head that is the embedding, a norm behind blocks that have their own."""
    if not weights:
        return {}
    row = {"grad_norm": gradient**0.5, "weight_norm": weight**0.5}
    return row | ({"activation_rms": (stream / numbers) ** 0.5, "activation_max": largest} if numbers else {})
