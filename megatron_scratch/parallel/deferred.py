"""Backward in two parts, for schedules that fill idle time with weight gradients (zero bubble, Qi et al., arXiv 2401.10241).

A linear's backward computes its input gradient at once, which another rank waits for, and leaves its weight gradient here as a
closure. The schedule takes the closures of a microbatch and runs them when this rank would be idle. torch's own way, walking the
autograd graph twice, runs a fused Function's whole backward in both parts and recomputes a checkpointed layer once per weight.
Norms, biases and the embedding are cheap, and stay where they were; so does the head, whose gradients come with the loss.

Legend: N tokens, I features in, O features out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd.graph import GradientEdge


class WeightGradients:
    """What is left to do, in order: d_weight = product(dy, x), and where it goes from there."""

    def __init__(self) -> None:
        self.left: list[tuple[GradientEdge, Callable[[], torch.Tensor]]] = []

    def put(self, edge: GradientEdge, compute: Callable[[], torch.Tensor]) -> None:
        """`edge` leads from the weight as the product reads it to the parameter: through casts, slices, and its layout."""
        self.left.append((edge, compute))

    def take(self) -> Callable[[], None]:
        """All that is left, as one piece of work."""
        mine, self.left = self.left, []

        def run() -> None:
            while mine:
                edge, compute = mine.pop(0)
                torch.autograd.backward((edge,), (compute(),))

        return run
