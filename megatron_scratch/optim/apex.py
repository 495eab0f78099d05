"""AdamW by the fused kernel of NVIDIA's apex, with the state of torch's AdamW: a checkpoint of either resumes under the other.

apex (github.com/NVIDIA/apex, apex/optimizers/fused_adam.py) counts steps once per parameter group, outside of the state.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_scratch.config.optim import AdamWConfig
from megatron_scratch.util.errors import UserError


def fused_adam(cfg: AdamWConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """apex's FusedAdam with decoupled decay. State per parameter: `step` (0-dim fp32), `exp_avg`, `exp_avg_sq`."""
    from apex.optimizers import FusedAdam  # optional

    optimizer = FusedAdam(groups, lr=cfg.lr, betas=tuple(cfg.betas), eps=cfg.eps, adam_w_mode=True)
    optimizer.register_step_pre_hook(_count)
    return optimizer  # type: ignore[no-any-return]


def _count(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Before a step: the group's counter from the state, whoever wrote it last; then count this step in the state.

    Counters in the state live on the CPU, where reading one waits for nothing; a loaded one comes over once.
    """
    for group in optimizer.param_groups:
        taken = [p for p in group["params"] if p.grad is not None]
        for p in taken:
            state = optimizer.state[p]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            state["step"] = state["step"].cpu()
            if p.numel() == 0:  # a rank's part of a small parameter; as the last of a list it keeps apex from its last launch
                p.grad = None
        steps = [optimizer.state[p]["step"] for p in taken]
        counts = sorted({int(step) for step in steps})
        if len(counts) > 1:
            raise UserError(f"optim.kernel=apex counts steps per group, and parameters in the group of {group['names'][0]} have "
                            f"taken {counts[0]} to {counts[-1]}; use optim.kernel=torch")  # fmt: skip
        if counts:
            group["step"] = counts[0]  # apex adds 1
            torch._foreach_add_(steps, 1.0)
