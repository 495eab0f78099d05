"""Optimizers over the groups of `param_groups`. State is plain tensors per parameter (`step`, `exp_avg`, ...), saved by name.

Each entry is a function (cfg, groups) -> torch optimizer. Parameters are fp32 master weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from megatron_scratch.config.optim import AdamWConfig, LionConfig, MuonConfig, SGDConfig, use_apex
from megatron_scratch.optim.apex import fused_adam

Groups = list[dict[str, Any]]


def adamw(cfg: AdamWConfig, groups: Groups) -> torch.optim.Optimizer:
    """AdamW with decoupled decay. Fused also on a CPU: 67 ms a step for 42M parameters against 1320 ms of the loop."""
    first = groups[0]["params"][0]
    if use_apex("optim.kernel", cfg.kernel, first.device.type, str(first.dtype)):
        return fused_adam(cfg, groups)
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=tuple(cfg.betas), eps=cfg.eps, fused=True)


def sgd(cfg: SGDConfig, groups: Groups) -> torch.optim.Optimizer:
    """SGD with momentum; `weight_decay` is added to the gradient (L2), as ever in SGD."""
    return torch.optim.SGD(groups, lr=cfg.lr, momentum=cfg.momentum, nesterov=cfg.nesterov, fused=True)


def lion(cfg: LionConfig, groups: Groups) -> torch.optim.Optimizer:
    """Lion (arXiv 2302.06675)."""
    return Lion(groups, lr=cfg.lr, betas=tuple(cfg.betas))


def muon(cfg: MuonConfig, groups: Groups) -> torch.optim.Optimizer:
    """Muon on the matrices inside the layers, AdamW on all else, in one optimizer with one state."""
    return Muon(_split_for_muon(groups), cfg)


class Lion(torch.optim.Optimizer):
    """update = sign(b1 m + (1 - b1) g);  w -= lr (update + decay w);  m = b2 m + (1 - b2) g. One state tensor: `exp_avg`."""

    def __init__(self, groups: Groups, lr: float, betas: tuple[float, float]):
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update. `closure` is not used here; it is torch's signature."""
        assert closure is None
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
            grads = [p.grad for p in weights]
            averages = [_state(self, p, "exp_avg") for p in weights]
            b1, b2 = group["betas"]
            updates = torch._foreach_lerp(averages, grads, 1.0 - b1)
            torch._foreach_sign_(updates)
            torch._foreach_mul_(weights, 1.0 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(weights, updates, alpha=-group["lr"])
            torch._foreach_lerp_(averages, grads, 1.0 - b2)
        return None


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal (Jordan 2024, kellerjordan.github.io/posts/muon; scaled as in arXiv 2502.16982).

    Groups with `muon` true: m = mu m + (1 - mu) g; u = orthogonalize(lerp(g, m, mu) if nesterov else m);
    w = w (1 - lr decay) - lr 0.2 sqrt(max(rows, columns)) u. State: `momentum_buffer`. The factor gives u the size of an AdamW
    update (rms about 0.2), so that AdamW's lr and decay carry over. Other groups: AdamW, with torch's kernel; state as there.
    """

    def __init__(self, groups: Groups, cfg: MuonConfig):
        super().__init__(groups, {"lr": cfg.lr, "weight_decay": cfg.weight_decay, "muon": False})
        self.cfg = cfg

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update. `closure` is not used here; it is torch's signature."""
        assert closure is None
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if group["muon"]:
                for p in weights:
                    self._orthogonal_step(p, group)
            elif weights:
                self._adamw_step(weights, group)
        return None

    def _orthogonal_step(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        grad, mu = p.grad, self.cfg.momentum
        momentum = _state(self, p, "momentum_buffer").lerp_(grad, 1.0 - mu)
        update = orthogonalize(torch.lerp(grad, momentum, mu) if self.cfg.nesterov else momentum, self.cfg.ns_steps)
        p.mul_(1.0 - group["lr"] * group["weight_decay"])
        p.add_(update, alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)

    def _adamw_step(self, weights: list[torch.Tensor], group: dict[str, Any]) -> None:
        steps = [_state(self, p, "step", scalar=True) for p in weights]
        averages, squares = ([_state(self, p, key) for p in weights] for key in ("exp_avg", "exp_avg_sq"))
        torch._foreach_add_(steps, 1.0)
        torch._fused_adamw_(
            weights, [p.grad for p in weights], averages, squares, [], steps, lr=group["lr"], beta1=self.cfg.betas[0],
            beta2=self.cfg.betas[1], weight_decay=group["weight_decay"], eps=self.cfg.eps, amsgrad=False, maximize=False,
        )  # fmt: skip


def _state(optimizer: torch.optim.Optimizer, p: torch.Tensor, key: str, scalar: bool = False) -> torch.Tensor:
    """The state tensor `key` of `p`, zeros at first; `scalar`: one fp32 number beside the parameter, as torch keeps `step`."""
    state = optimizer.state[p]
    if key not in state:
        state[key] = torch.zeros((), device=p.device) if scalar else torch.zeros_like(p, memory_format=torch.preserve_format)
    return state[key]


def orthogonalize(matrix: torch.Tensor, steps: int) -> torch.Tensor:
    """Nearly U V^T of matrix = U S V^T, by `steps` rounds of a quintic Newton-Schulz iteration in bf16.

    The coefficients are Jordan's: they trade exactness (singular values end in about 0.7 .. 1.2) for steepness at 0.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.bfloat16()
    x = x.t() if tall else x  # the Gram matrix is then the smaller one
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.t()
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.t() if tall else x).to(matrix.dtype)


def _split_for_muon(groups: Groups) -> Groups:
    """Each group in two: matrices inside the layers, and the rest."""
    out = []
    for group in groups:
        for wanted in (True, False):
            keep = [i for i, (n, p) in enumerate(zip(group["names"], group["params"], strict=True)) if _is_hidden(n, p) == wanted]
            if keep:
                part = {key: [group[key][i] for i in keep] for key in ("params", "names")}
                out.append({**group, **part, "muon": wanted})
    return out


def _is_hidden(name: str, p: torch.Tensor) -> bool:
    """A matrix between two hidden spaces; tables that are looked up, and the head, are not. It is whole: `config.engine` refuses
    layouts that cut it."""
    return p.ndim == 2 and not re.match(r"(embed|position|head)\.", name)
