"""Where a token stands: a vector added to its embedding (learned, sinusoidal), a rotation of queries and keys (rope), or nothing.

Every entry has the same three methods, so that the decoder never asks which one it holds:
`add(x_ND, positions_N)`, `rotation(positions_BS, dtype)` -> (cos, sin) or None, `check(last)`.

Legend: B batch, S sequence, N flat tokens (all, or this rank's part), D hidden, K features of a head, P = K/2 pairs of them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from megatron_scratch import registry
from megatron_scratch.config.model import ModelConfig, RopeConfig
from megatron_scratch.parallel.layout import local, normal, shard_param
from megatron_scratch.parallel.topology import Topology
from megatron_scratch.util.errors import UserError

Rotation = tuple[torch.Tensor, torch.Tensor]  # cos and sin, each (B or 1, S, 1, P)


class NoPosition(nn.Module):
    """No position at all: the causal mask alone tells order (Kazemnejad et al., arXiv 2305.19466)."""

    def __init__(self, cfg: ModelConfig, topo: Topology):
        super().__init__()

    def add(self, x_ND: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
        return x_ND

    def rotation(self, positions_BS: torch.Tensor, dtype: torch.dtype) -> Rotation | None:
        return None

    def check(self, last: int) -> None:
        """Refuse a last position that this kind cannot represent. It is a number on the host: nothing waits for the device."""


class Learned(NoPosition):
    """A table of vectors, `weight` (max_seq_len, D), as in GPT-2."""

    def __init__(self, cfg: ModelConfig, topo: Topology):
        super().__init__(cfg, topo)
        self.length = cfg.max_seq_len
        shape = (cfg.max_seq_len, cfg.hidden_size)
        self.weight = shard_param(shape, topo, init=normal(cfg.init_std), partial=topo.sequence_parallel)

    def add(self, x_ND: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
        return x_ND + F.embedding(positions_N, local(self.weight))

    def check(self, last: int) -> None:
        if last >= self.length:
            raise UserError(f"position {last} is beyond the learned table of model.max_seq_len={self.length} positions; "
                            "shorten the text, or use model.position=rope")  # fmt: skip


class Sinusoidal(NoPosition):
    """sin and cos of geometric wavelengths, interleaved (Vaswani et al., arXiv 1706.03762, 3.5). Any length."""

    def __init__(self, cfg: ModelConfig, topo: Topology):
        super().__init__(cfg, topo)
        self.size = cfg.hidden_size
        self.register_buffer("frequencies", torch.empty(-(-self.size // 2), device="meta"), persistent=False)

    def reset_buffers(self) -> None:
        self.frequencies.copy_(unscaled(RopeConfig(), self.size)[0])

    def add(self, x_ND: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
        angles = positions_N.unsqueeze(-1).float() * self.frequencies
        wave = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., : self.size]
        return x_ND + wave


class Rope(NoPosition):
    """Rotates pair p of a query or key by the angle position x frequency_p (Su et al., arXiv 2104.09864), in fp32 angles."""

    def __init__(self, cfg: ModelConfig, topo: Topology):
        super().__init__(cfg, topo)
        self.cfg, self.size, self.factor = cfg.rope, cfg.head_size, 1.0
        self.register_buffer("frequencies", torch.empty(self.size // 2, device="meta"), persistent=False)

    def reset_buffers(self) -> None:
        frequencies, self.factor = registry.get("rope_scaling", self.cfg.scaling)(self.cfg, self.size)
        self.frequencies.copy_(frequencies)

    def rotation(self, positions_BS: torch.Tensor, dtype: torch.dtype) -> Rotation | None:
        angles_BSP = positions_BS.unsqueeze(-1).float() * self.frequencies
        cos, sin = angles_BSP.cos() * self.factor, angles_BSP.sin() * self.factor
        return cos.to(dtype).unsqueeze(-2), sin.to(dtype).unsqueeze(-2)


def rotate(x_BSHK: torch.Tensor, rotation: Rotation | None) -> torch.Tensor:
    """Turn pairs (p, p + K/2) of every head by the angles of its position; the pairing is that of the published Llama weights."""
    if rotation is None:
        return x_BSHK
    cos, sin = rotation
    a, b = x_BSHK.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def unscaled(cfg: RopeConfig, size: int) -> tuple[torch.Tensor, float]:
    """theta^(-2p/size): (frequencies (ceil(size/2),) in radians per token, factor on cos and sin)."""
    return 1.0 / cfg.theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size), 1.0


def linear_scaled(cfg: RopeConfig, size: int) -> tuple[torch.Tensor, float]:
    """Every position divided by `factor` (position interpolation, arXiv 2306.15595)."""
    return unscaled(cfg, size)[0] / cfg.factor, 1.0


def llama3_scaled(cfg: RopeConfig, size: int) -> tuple[torch.Tensor, float]:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones left alone, with a linear passage between."""
    plain = unscaled(cfg, size)[0]
    turns = cfg.original_max_seq_len / (2 * math.pi / plain)  # rotations over the original length
    keep = ((turns - cfg.low_freq_factor) / (cfg.high_freq_factor - cfg.low_freq_factor)).clamp(0.0, 1.0)
    return (1.0 - keep) * plain / cfg.factor + keep * plain, 1.0


def yarn_scaled(cfg: RopeConfig, size: int) -> tuple[torch.Tensor, float]:
    """YaRN (Peng et al., arXiv 2309.00071): as llama3, but the passage is linear in the index of the pair; cos and sin grow too."""

    def pair_with(turns: float) -> float:  # the (real-valued) pair that makes so many rotations over the original length
        return size * math.log(cfg.original_max_seq_len / (turns * 2 * math.pi)) / (2 * math.log(cfg.theta))

    low = max(math.floor(pair_with(cfg.beta_fast)), 0)
    high = min(math.ceil(pair_with(cfg.beta_slow)), size - 1)
    ramp = (torch.arange(size // 2, dtype=torch.float32) - low) / max(high - low, 0.001)  # 0.001: no division by zero
    stretch = ramp.clamp(0.0, 1.0)
    plain = unscaled(cfg, size)[0]
    factor = cfg.attention_factor if cfg.attention_factor is not None else 0.1 * math.log(max(cfg.factor, 1.0)) + 1.0
    return plain / cfg.factor * stretch + plain * (1.0 - stretch), factor
