"""Y = X A^T + b cut over tp, and the token embedding: the places where a weight meets the stream of activations.

The layers of Megatron-LM (Shoeybi et al., arXiv 1909.08053). X is the stream of tokens outside of a tensor-parallel region: all N
of them on every rank, or n = N / tp of them under sequence parallelism; what travels in either case is in `parallel/tensor.py`.
Weights are fp32 masters; `cast` reads one in the dtype of the activations. That is the whole of mixed precision here: no autocast.

Legend: N tokens, I features in, O features out, V padded vocabulary, D hidden; r this rank, t = tp.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megatron_scratch.models.gemm import deferred_linear, linear
from megatron_scratch.models.overlap import overlapped_linears
from megatron_scratch.parallel.layout import ZEROS, in_dtype, local, normal, shard_param
from megatron_scratch.parallel.tensor import enter, leave
from megatron_scratch.parallel.topology import Topology
from megatron_scratch.util.errors import UserError


def cast(parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """This rank's slice of a master weight in the dtype to compute in; its gradient comes back in fp32."""
    return in_dtype(parameter, dtype)


class ColumnParallelLinear(nn.Module):
    """Y_r = X A_r^T + b_r: A (O, I) is cut by its rows, which are the columns of A^T, so each rank computes O/t of the features.

    Holds `weight` (O, I) and, on request, `bias` (O,). Layers that read the same X are applied together by `column_parallel`, which
    enters the tensor-parallel region once for all of them.

    Args:
        copies: ranks in a row that compute the same features, where there are fewer parts to hand out than ranks (key/value heads).
            The parameters are then whole on every rank, of which each reads its part, and gradients are sums over tp.
    """

    def __init__(self, size_in: int, size_out: int, topo: Topology, std: float, bias: bool = False, copies: int = 1):
        super().__init__()
        self.topo, self.copies, self.multiply = topo, copies, linear  # `multiply`: x A^T + b; models/fp8.py puts in another
        axis = "tp" if copies == 1 else None
        self.weight = shard_param((size_out, size_in), topo, axis, init=normal(std), partial=copies > 1)
        self.bias = shard_param((size_out,), topo, axis, init=ZEROS, partial=copies > 1) if bias else None

    def forward(self, x_NI: torch.Tensor) -> torch.Tensor:
        """(n or N, I) -> (N, O/t)."""
        return column_parallel(x_NI, self)[0]

    def part(self, parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What this rank multiplies with of its weight or bias: (O/t, ...), or (O copies/t, ...)."""
        whole = cast(parameter, dtype)
        if self.copies == 1:
            return whole
        return whole.chunk(self.topo.size("tp") // self.copies)[self.topo.index("tp") // self.copies]


def column_parallel(x_NI: torch.Tensor, *layers: ColumnParallelLinear) -> list[torch.Tensor]:
    """[x A^T + b of each layer], (N, O/t) each, from x outside of the region, (n or N, I): one entrance for all of them.

    Forward: an all-gather under sequence parallelism, else nothing. Backward: a reduce-scatter, else an all-reduce.
    """
    topo, dtype = layers[0].topo, x_NI.dtype
    weights = [layer.part(layer.weight, dtype) for layer in layers]
    biases = [None if layer.bias is None else layer.part(layer.bias, dtype) for layer in layers]
    if topo.overlap:
        return list(overlapped_linears(x_NI, weights, biases, topo))
    x_NI = enter(x_NI, topo)
    return [_multiply(layer, x_NI, weight, bias) for layer, weight, bias in zip(layers, weights, biases, strict=True)]


def _multiply(
    layer: ColumnParallelLinear | RowParallelLinear, x_NI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None
) -> torch.Tensor:
    """x W^T + b inside of the region, its weight gradient at once or later."""
    deferred = layer.topo.deferred
    if deferred is not None and weight_OI.requires_grad and torch.is_grad_enabled():
        return deferred_linear(x_NI, weight_OI, bias_O, deferred)
    return layer.multiply(x_NI, weight_OI, bias_O)


class RowParallelLinear(nn.Module):
    """Y = sum over r of X_r A_r^T, plus b: A (O, I) is cut by its columns; each rank multiplies its I/t features, and the sum leads
    out of the tensor-parallel region. The bias is added once, after the sum.

    Forward: a reduce-scatter under sequence parallelism, else an all-reduce. Backward: an all-gather, else nothing.
    """

    def __init__(self, size_in: int, size_out: int, topo: Topology, std: float, bias: bool = False):
        super().__init__()
        self.topo, self.multiply = topo, linear
        self.weight = shard_param((size_out, size_in), topo, "tp", dim=1, init=normal(std))
        self.bias = shard_param((size_out,), topo, init=ZEROS, partial=topo.sequence_parallel) if bias else None

    def forward(self, x_NI: torch.Tensor) -> torch.Tensor:
        """(N, I/t) -> (n or N, O)."""
        if self.topo.size("tp") == 1:
            bias = None if self.bias is None else cast(self.bias, x_NI.dtype)
            return _multiply(self, x_NI, cast(self.weight, x_NI.dtype), bias)
        y_NO = leave(_multiply(self, x_NI, cast(self.weight, x_NI.dtype), None), self.topo)
        return y_NO if self.bias is None else y_NO + cast(self.bias, x_NI.dtype)


class VocabParallelEmbedding(nn.Module):
    """`weight` (V, D), its rows cut over tp: each rank looks up the ids that it holds, the others give zeros, and the sum leads out
    of the tensor-parallel region. The output is in the dtype of the weight: the decoder casts it once positions are added.

    Forward: a reduce-scatter under sequence parallelism, else an all-reduce. Backward: an all-gather, else nothing.
    """

    def __init__(self, vocab: int, size: int, topo: Topology, std: float):
        super().__init__()
        self.topo = topo
        self.weight = shard_param((vocab, size), topo, "tp", init=normal(std))

    def forward(self, tokens_N: torch.Tensor) -> torch.Tensor:
        """(N,) int64 -> (n or N, D)."""
        weight_VD = local(self.weight)
        if self.topo.size("tp") == 1:
            return F.embedding(tokens_N, weight_VD)
        mine_N = tokens_N - self.topo.index("tp") * weight_VD.shape[0]
        elsewhere_N = (mine_N < 0) | (mine_N >= weight_VD.shape[0])
        x_ND = F.embedding(mine_N.masked_fill(elsewhere_N, 0), weight_VD)
        return leave(x_ND.masked_fill(elsewhere_N.unsqueeze(-1), 0.0), self.topo)


def check_ids(ids: torch.Tensor, vocab_size: int, what: str, ignored: int | None = None) -> None:
    """Refuse ids outside [0, vocab_size). A look-up on one rank would fail by itself; over tp it would find them nowhere and go on.

    On a GPU the check is an assertion on the device: nothing waits for it.

    Raises:
        UserError: on a CPU, with the id.
    """
    bad = (ids < 0) | (ids >= vocab_size)
    bad = bad if ignored is None else bad & (ids != ignored)
    if ids.device.type != "cpu":
        torch._assert_async(~bad.any(), f"{what} outside of the vocabulary of {vocab_size}")
    elif bad.any():
        raise UserError(f"{what} {int(ids[bad][0])} is outside of the vocabulary: allowed: 0 to {vocab_size - 1} (model.vocab_size="
                        f"{vocab_size}); prepare the data with this model's tokenizer, or leave model.vocab_size out")  # fmt: skip
