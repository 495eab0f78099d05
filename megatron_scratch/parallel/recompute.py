"""Activation checkpointing (Chen et al., arXiv 1604.06174; selective: Korthikanti et al., arXiv 2205.05198, section 5).

A layer keeps for backward what its operators need. Computed again, it keeps its input, and backward starts with its forward:

    full        the input of the layer; with recompute_every=n of every n-th layer, by its number in the whole model
    selective   all but the inside of softmax(q k^T) v: the largest part where probabilities are kept, and cheap to compute
    ops         the input of the layer and the results of some operators, which are not computed again
    budget      a mix of none, selective and full over the layers: the least work within a part of the memory

`apply` puts this inside of a layer's own forward, so that whatever wraps the layer later (torch.compile, FSDP, DDP, DeepSpeed) has
it inside of itself, and no name of a parameter changes. Nothing of a random generator is kept: a dropout mask is a function of
what it is for (`models/dropout.py`), so the second forward draws the masks of the first. Collectives are issued again too, by all
tp ranks alike: how many stand before the last kept tensor does not depend on the rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from megatron_scratch.config.recompute import OPERATORS
from megatron_scratch.config.train import ParallelConfig
from megatron_scratch.util.errors import UserError


@dataclass(frozen=True)
class Cost:
    """Of one layer in one mode: bytes that it keeps for backward, and FLOPs that backward does again."""

    kept: int
    again: int


Costs = Mapping[str, Cost]  # none, selective, full -> Cost


def apply(layers: Mapping[str, nn.Module], cfg: ParallelConfig, costs: Callable[[], Costs], compiled: bool) -> None:
    """Make layers compute again what the config says, in place.

    Args:
        layers: global number -> layer, alike. selective needs `layer.attention.core`.
        costs: of one of them; asked for only where there is a budget.
        compiled: whether layers are going to be compiled. What is computed again is then compiled from inside too: torch.compile
            leaves a checkpointed region with messages in it alone, with everything below.

    Raises:
        UserError: the budget is less than what full recomputation keeps.
    """
    chosen = mixture(costs(), len(layers), cfg.recompute_budget) if cfg.recompute_budget is not None else None
    for place, (number, layer) in enumerate(layers.items()):
        skipped = cfg.recompute == "full" and int(number) % cfg.recompute_every
        wrap(layer, "none" if skipped else cfg.recompute if chosen is None else chosen[place], cfg.recompute_save, compiled)
        if cfg.offload_activations:
            layer.forward = _offloaded(layer.forward)  # type: ignore[method-assign]


def wrap(layer: Any, mode: str, save: list[str] | None = None, compiled: bool = False) -> None:
    """One layer."""
    if mode == "selective":
        layer.attention.core = _again(layer.attention.core, compiled)
    elif mode == "full":
        layer.forward = _again(layer.forward, compiled)
    elif mode == "ops":
        names = frozenset(name for friendly in save or () for name in OPERATORS[friendly])
        contexts = partial(create_selective_checkpoint_contexts, partial(_policy, names))
        layer.forward = _again(layer.forward, compiled, context_fn=contexts)


def unwrap(layer: Any) -> None:
    """Take it off again."""
    layer.__dict__.pop("forward", None)
    layer.attention.__dict__.pop("core", None)


def _again(function: Callable[..., Any], compiled: bool, **options: Any) -> Callable[..., Any]:
    if compiled:
        function = torch.compile(function)

    def again(*args: Any) -> Any:  # not a `partial`, which torch.compile would leave as it is, with all that it calls
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **options)

    return again


def _policy(names: frozenset[str], context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """By name, not by object: optional kernels are imported at their first use."""
    return CheckpointPolicy.MUST_SAVE if op.name() in names else CheckpointPolicy.PREFER_RECOMPUTE


def mixture(costs: Costs, layers: int, budget: float) -> list[str]:
    """The mode of each layer: the fewest FLOPs again with at most `budget` of the bytes that `layers` layers keep.

    Layers that are alike leave only the numbers of each mode to choose, and all of those are tried. The first layers compute most
    again: when their turn comes in backward, what the others kept is gone already.

    Raises:
        UserError: as above, with the least possible budget.
    """
    limit = budget * layers * costs["none"].kept
    tried = []
    for full in range(layers + 1):
        for selective in range(layers + 1 - full):
            counts = {"full": full, "selective": selective, "none": layers - full - selective}
            kept = sum(count * costs[mode].kept for mode, count in counts.items())
            if kept <= limit:
                tried.append((sum(count * costs[mode].again for mode, count in counts.items()), kept, full, counts))
    if not tried:
        least = costs["full"].kept / costs["none"].kept
        raise UserError(f"parallel.recompute_budget={budget} is less than what is kept when all layers are computed again; "
                        f"allowed: {least:.3f} (rounded up) to 1, or parallel.recompute=full")  # fmt: skip
    return [mode for mode, count in min(tried, key=lambda t: t[:3])[3].items() for _ in range(count)]


def _offloaded(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with saved_tensors_hooks(_to_host, _from_host):
            return function(*args, **kwargs)

    return run


def _to_host(x: torch.Tensor) -> tuple[torch.device | None, torch.Tensor]:
    """A copy in host memory; parameters and their views stay where they are. On one stream the copy back cannot be too early."""
    owner = x if x._base is None else x._base
    if isinstance(owner, nn.Parameter) or x.ndim == 0:
        return None, x
    copy = torch.empty_like(x, device="cpu", pin_memory=x.device.type == "cuda")
    return x.device, copy.copy_(x, non_blocking=True)


def _from_host(packed: tuple[torch.device | None, torch.Tensor]) -> torch.Tensor:
    device, x = packed
    return x if device is None else x.to(device, non_blocking=True)
