"""The feed-forward half of a block. Plain: down(f(up(x))). Gated: down(f(gate(x)) * up(x)) (Shazeer, arXiv 2002.05202).

`gate` and `up` are separate parameters, so that each is a plain shard of one global tensor under any tp.

Under tp each rank holds F/t of the features: one entrance, one exit, whatever the number of matrices.

Legend: N tokens, n the part of them on this rank under sequence parallelism, D hidden, F feed-forward width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import nn

from megatron_scratch.config.model import ModelConfig
from megatron_scratch.models.linear import ColumnParallelLinear, RowParallelLinear, column_parallel
from megatron_scratch.parallel.topology import Topology


def residual_std(cfg: ModelConfig) -> float:
    """Init of the projections that write to the residual stream: there are 2 per layer, so the sum keeps the size of one."""
    return cfg.init_std / math.sqrt(2 * cfg.num_layers) if cfg.scale_residual_init else cfg.init_std


class Plain(nn.Module, ABC):
    """down(f(up(x))), with `activation` from the subclass."""

    def __init__(self, cfg: ModelConfig, topo: Topology):
        super().__init__()
        self.up = ColumnParallelLinear(cfg.hidden_size, cfg.ffn, topo, cfg.init_std, cfg.bias)
        self.down = RowParallelLinear(cfg.ffn, cfg.hidden_size, topo, residual_std(cfg), cfg.bias)

    @abstractmethod
    def activation(self, x: torch.Tensor) -> torch.Tensor:
        """f, element by element."""

    def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
        """(n or N, D) -> the same."""
        (up_NF,) = column_parallel(x_ND, self.up)
        return self.down(self.activation(up_NF))


class Gated(Plain):
    """down(f(gate(x)) * up(x)), with `activation` from the subclass."""

    def __init__(self, cfg: ModelConfig, topo: Topology):
        super().__init__(cfg, topo)
        self.gate = ColumnParallelLinear(cfg.hidden_size, cfg.ffn, topo, cfg.init_std, cfg.bias)

    def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
        """(n or N, D) -> the same."""
        gate_NF, up_NF = column_parallel(x_ND, self.gate, self.up)
        return self.down(self.activation(gate_NF) * up_NF)


class GELU(Plain):
    """x Phi(x), exact (Hendrycks & Gimpel, arXiv 1606.08415)."""

    def activation(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x)


class GELUTanh(Plain):
    """GELU by its tanh approximation, as in GPT-2."""

    def activation(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x, approximate="tanh")


class SiLU(Plain):
    """x sigmoid(x), not gated."""

    def activation(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(x)


class ReLU2(Plain):
    """max(x, 0)^2 (So et al., arXiv 2109.08668)."""

    def activation(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x).square()


class SwiGLU(Gated):
    """Gated with SiLU, as in Llama."""

    def activation(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(x)


class GEGLU(Gated):
    """Gated with the exact GELU."""

    def activation(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x)
