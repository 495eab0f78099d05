"""Which parameters get which settings."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch

from megatron_scratch.config.optim import OptimConfig, ParamGroup, default_groups
from megatron_scratch.util.errors import UserError


def param_groups(named_parameters: Iterable[tuple[str, torch.Tensor]], cfg: OptimConfig) -> list[dict[str, Any]]:
    """Sort parameters into the groups of `cfg.groups`; what matches none makes a last group with the optimizer's settings.

    The first pattern that matches (`re.search` on the global name) wins. Empty groups are left out.

    Returns:
        torch's groups: `params`, `lr` (to be set as multiplier x cfg.lr x lr_scale each step), `weight_decay`, and besides them
        `lr_scale` and `names`, the global names in the order of `params`.

    Raises:
        UserError: a pattern that is no regular expression, or that matches nothing (the default one may: it suits any model).
    """
    rules = [*cfg.groups, ParamGroup()]
    expressions = [_compile(rule.pattern) for rule in rules]
    members: list[list[tuple[str, torch.Tensor]]] = [[] for _ in rules]
    matched = [False] * len(rules)
    names = []
    for name, parameter in named_parameters:
        hits = [i for i, expression in enumerate(expressions) if expression.search(name)]
        members[hits[0]].append((name, parameter))
        names.append(name)
        for i in hits:
            matched[i] = True
    for rule, hit in zip(cfg.groups, matched, strict=False):
        if not hit and rule not in default_groups():
            raise UserError(f"optim.groups: the pattern {rule.pattern!r} matches no parameter; "
                            f"names look like {', '.join(names[:3])}")  # fmt: skip
    return [_group(rule, part, cfg) for rule, part in zip(rules, members, strict=True) if part]


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"optim.groups: the pattern {pattern!r} is no regular expression: {error}") from error


def _group(rule: ParamGroup, members: list[tuple[str, torch.Tensor]], cfg: OptimConfig) -> dict[str, Any]:
    return {
        "params": [parameter for _, parameter in members],
        "names": [name for name, _ in members],
        "lr": cfg.lr * rule.lr_scale,
        "lr_scale": rule.lr_scale,
        "weight_decay": cfg.weight_decay if rule.weight_decay is None else rule.weight_decay,
    }
