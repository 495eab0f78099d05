"""The products of the layers in fp8, by torchao (Micikevicius et al., arXiv 2209.05433): operands of 8 bits, sums of 32.

x, weight and dy are each multiplied by a scale that brings the largest number of a tensor (recipe tensorwise) or of a row (rowwise)
to the end of the range, and rounded: x and weight to e4m3 (4 bits of precision), dy to e5m2 (3 bits; rowwise: e4m3). Then
    y = x weight^T,   dx = dy weight,   dweight = dy^T x
are products of fp8 numbers added up in fp32. Everything else is as in bf16: activations, head, loss, fp32 masters.

Legend: N tokens, I features in, O features out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import nn

from megatron_scratch.models.linear import ColumnParallelLinear, RowParallelLinear
from megatron_scratch.util.errors import UserError

CAPABILITY = (8, 9)  # of the first GPUs with fp8 tensor cores: Ada; Hopper is 9.0

Linear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]  # x (..., I), weight (O, I), bias (O)


def refuse_device(device: torch.device) -> None:
    """
    Raises:
        UserError: it has no fp8 units.
    """
    found = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if found is None or found < CAPABILITY:
        what = "a CPU" if found is None else f"a GPU of capability {found[0]}.{found[1]}"
        raise UserError(f"precision=fp8 on {what}: fp8 products need a GPU of capability {CAPABILITY[0]}.{CAPABILITY[1]} or above; "
                        "use precision=bf16")  # fmt: skip


def use_fp8(layers: Iterable[nn.Module], recipe: str, emulate: bool = False) -> None:
    """Let every linear inside of `layers` multiply in fp8. The head and the embedding are not among them."""
    multiply = fp8_linear(recipe, emulate)
    for layer in layers:
        for module in layer.modules():
            if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
                module.multiply = multiply


def fp8_linear(recipe: str, emulate: bool = False) -> Linear:
    """x weight^T + bias with fp8 operands, forward and backward, in the dtype of x.

    Args:
        recipe: tensorwise | rowwise.
        emulate: round as fp8 does and multiply in the dtype of x, on any device: for tests.
    """
    from torchao.float8.config import Float8LinearConfig  # optional
    from torchao.float8.float8_linear import matmul_with_hp_or_float8_args
    from torchao.float8.float8_training_tensor import LinearMMConfig, ScaledMMConfig

    config = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulate)
    products = (config.gemm_config_output, config.gemm_config_grad_input, config.gemm_config_grad_weight)
    how = LinearMMConfig(*(ScaledMMConfig(emulate, p.use_fast_accum, False, config.pad_inner_dim) for p in products))

    def linear(x_I: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
        y_O = matmul_with_hp_or_float8_args.apply(x_I, weight_OI.t(), how, config)
        return y_O if bias_O is None else y_O + bias_O  # type: ignore[no-any-return]

    return linear
