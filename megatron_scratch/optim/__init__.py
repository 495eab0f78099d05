"""From gradients to the next weights: optimizers, which parameters get which settings, and the learning rate over time."""

from megatron_scratch.optim.groups import param_groups
from megatron_scratch.optim.schedules import lr_at

__all__ = ["lr_at", "param_groups"]
