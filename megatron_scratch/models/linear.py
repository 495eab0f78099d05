"""Y = X A^T + b, and the token embedding: the two places where a weight meets the stream of activations.

Weights are fp32 masters; `cast` reads one in the dtype of the activations. That is the whole of mixed precision here: no autocast.

Legend: ... any leading sizes, I features in, O features out, V padded vocabulary, D hidden, B batch, S sequence.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megatron_scratch.models.gemm import linear
from megatron_scratch.parallel.layout import ZEROS, local, normal, shard_param
from megatron_scratch.parallel.topology import Topology

_DIM = {"out": 0, "in": 1}


def cast(parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """This rank's slice of a master weight in the dtype to compute in; its gradient comes back in fp32."""
    return local(parameter).to(dtype)


class Linear(nn.Module):
    """`weight` (O, I) and, on request, `bias` (O,).

    Args:
        cut: what the tp axis cuts: "out" (rows of the weight), "in" (columns), or None: the weight is whole on every rank.
    """

    def __init__(self, size_in: int, size_out: int, topo: Topology, std: float, bias: bool = False, cut: str | None = None):
        super().__init__()
        axis = "tp" if cut else None
        self.weight = shard_param((size_out, size_in), topo, axis, dim=_DIM.get(cut or "out", 0), init=normal(std))
        self.bias = shard_param((size_out,), topo, axis if cut == "out" else None, init=ZEROS) if bias else None

    def forward(self, x_I: torch.Tensor) -> torch.Tensor:
        """(..., I) -> (..., O), in the dtype of x."""
        bias = None if self.bias is None else cast(self.bias, x_I.dtype)
        return linear(x_I, cast(self.weight, x_I.dtype), bias)


class Embedding(nn.Module):
    """`weight` (V, D), its rows cut over tp. The output is fp32: the decoder casts it once positions are added."""

    def __init__(self, vocab: int, size: int, topo: Topology, std: float):
        super().__init__()
        self.weight = shard_param((vocab, size), topo, "tp", dim=0, init=normal(std))

    def forward(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """(B, S) int64 -> (B, S, D)."""
        return F.embedding(tokens_BS, local(self.weight))
