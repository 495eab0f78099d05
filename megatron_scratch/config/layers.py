"""`train.layers_every`: how often statistics of each layer are written."""

from __future__ import annotations

from megatron_scratch.util.errors import UserError


def check_layers(every: int) -> None:
    """Every engine, layout and precision has them; only the number can be wrong."""
    if every < 0:
        raise UserError(f"train.layers_every={every} must be 0 (never) or a number of steps")
