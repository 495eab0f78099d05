"""Optimizers against torch or their formulas, groups, and a resume from saved state that changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch

from megatron_scratch import registry
from megatron_scratch.config.optim import AdamWConfig, LionConfig, MuonConfig, OptimConfig, ParamGroup, SGDConfig
from megatron_scratch.optim import param_groups
from megatron_scratch.optim.optimizers import orthogonalize
from megatron_scratch.util.errors import UserError

SHAPES = {"embed.weight": (8, 4), "layers.0.mlp.up.weight": (6, 4), "layers.0.mlp.down.weight": (4, 6),
          "layers.0.norm.weight": (4,), "head.weight": (8, 4)}  # fmt: skip
NAMES = registry.names("optim")


def parameters() -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def set_grads(named: dict[str, torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in named.values():
        p.grad = torch.randn(p.shape, generator=generator)


def make(cfg: OptimConfig, named: dict[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
    return registry.build("optim", cfg, groups=param_groups(named.items(), cfg))


def config(name: str, **changes: object) -> OptimConfig:
    return registry.entry("optim", name).config(**{"name": name, "lr": 0.01, **changes})


def train(cfg: OptimConfig, steps: int) -> dict[str, torch.nn.Parameter]:
    named = parameters()
    optimizer = make(cfg, named)
    for step in range(steps):
        set_grads(named, step)
        optimizer.step()
    return named


def close(got: dict[str, torch.nn.Parameter], want: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    for name, tensor in want.items():
        torch.testing.assert_close(got[name].detach(), tensor.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("cfg", "build"), [
    (AdamWConfig(lr=0.01, groups=[]),
     lambda ps: torch.optim.AdamW(ps, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, foreach=False)),
    (SGDConfig(lr=0.01, nesterov=True, groups=[]),
     lambda ps: torch.optim.SGD(ps, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.1, foreach=False)),
], ids=["adamw", "sgd"])  # fmt: skip
def test_equals_torch_s_loop(cfg: OptimConfig, build) -> None:
    want = parameters()
    plain = build(list(want.values()))
    for step in range(3):
        set_grads(want, step)
        plain.step()
    close(train(cfg, 3), want)


def test_lion_is_its_formula() -> None:
    cfg = LionConfig(lr=0.01, weight_decay=0.2, groups=[])
    want = {name: p.detach().clone() for name, p in parameters().items()}
    averages = {name: torch.zeros_like(w) for name, w in want.items()}
    for step in range(3):
        named = parameters()
        set_grads(named, step)
        for name, w in want.items():
            g, m = named[name].grad, averages[name]
            w -= 0.01 * (torch.sign(0.9 * m + 0.1 * g) + 0.2 * w)
            averages[name] = 0.99 * m + 0.01 * g
    close(train(cfg, 3), want)


def test_muon_is_torch_s_muon_on_matrices_and_adamw_on_the_rest() -> None:
    cfg = MuonConfig(lr=0.01, groups=[])
    got, want = train(cfg, 3), parameters()
    hidden = [p for name, p in want.items() if "mlp" in name]
    rest = [p for name, p in want.items() if "mlp" not in name]
    theirs = [torch.optim.Muon(hidden, lr=0.01, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
              torch.optim.AdamW(rest, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)]  # fmt: skip
    for step in range(3):
        set_grads(want, step)
        for optimizer in theirs:
            optimizer.step()
    close(got, want, 2e-3)  # bf16 iterations: one rounding is 4e-3 of an update of 0.01
    close({n: got[n] for n in ("embed.weight", "head.weight")}, {n: want[n] for n in ("embed.weight", "head.weight")})


@pytest.mark.parametrize("shape", [(32, 16), (16, 32), (24, 24)])
def test_orthogonalize_brings_singular_values_near_1(shape: tuple[int, int]) -> None:
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape, generator=torch.Generator().manual_seed(0)), 5))
    assert 0.5 < float(values.min()) and float(values.max()) < 1.3


@pytest.mark.parametrize("name", NAMES)
def test_state_is_tensors_per_parameter_and_resume_changes_nothing(name: str) -> None:
    cfg = config(name)
    whole, named = train(cfg, 4), parameters()
    optimizer = make(cfg, named)
    for step in range(2):
        set_grads(named, step)
        optimizer.step()
    for p in named.values():
        assert optimizer.state[p] and all(isinstance(value, torch.Tensor) for value in optimizer.state[p].values())
    resumed = {n: torch.nn.Parameter(p.detach().clone()) for n, p in named.items()}
    second = make(cfg, resumed)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(2, 4):
        set_grads(resumed, step)
        second.step()
    assert all(torch.equal(resumed[n], whole[n]) for n in whole)


@pytest.mark.parametrize("name", NAMES)
def test_lr_scale_and_decay_per_group(name: str) -> None:
    cfg = config(name, weight_decay=0.0, groups=[ParamGroup("embed", lr_scale=0.0), ParamGroup("mlp", weight_decay=0.5)])
    start, end = parameters(), train(cfg, 1)
    assert torch.equal(start["embed.weight"], end["embed.weight"])
    none = train(config(name, weight_decay=0.0, groups=[]), 1)
    assert torch.equal(none["head.weight"], end["head.weight"])
    assert not torch.equal(none["layers.0.mlp.up.weight"], end["layers.0.mlp.up.weight"])


def test_groups_first_match_wins_and_names_follow() -> None:
    rules = [ParamGroup("norm|bias$|embed", weight_decay=0.0), ParamGroup(r"^layers\.0\.", lr_scale=0.5)]
    groups = param_groups(parameters().items(), AdamWConfig(lr=1.0, groups=rules))
    assert [g["names"] for g in groups] == [["embed.weight", "layers.0.norm.weight"],
                                            ["layers.0.mlp.up.weight", "layers.0.mlp.down.weight"], ["head.weight"]]  # fmt: skip
    assert [(g["lr"], g["lr_scale"], g["weight_decay"]) for g in groups] == [(1.0, 1.0, 0.0), (0.5, 0.5, 0.1), (1.0, 1.0, 0.1)]


def test_a_pattern_without_a_match_is_refused() -> None:
    with pytest.raises(UserError, match="the pattern 'moe' matches no parameter; names look like embed.weight"):
        param_groups(parameters().items(), AdamWConfig(groups=[ParamGroup("moe")]))
    with pytest.raises(UserError, match=r"the pattern '\(' is no regular expression"):
        param_groups(parameters().items(), AdamWConfig(groups=[ParamGroup("(")]))
    only = {"layers.0.mlp.up.weight": parameters()["layers.0.mlp.up.weight"]}
    assert len(param_groups(only.items(), AdamWConfig())) == 1  # the default pattern suits any model
