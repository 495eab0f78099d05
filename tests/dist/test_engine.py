"""Engines: gradients, norm and weights are those of one process, for any number of ranks and microbatches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from ranks import run_ranks
from torch import nn

from megatron_scratch.config.engine import DDPConfig
from megatron_scratch.engine import Parts
from megatron_scratch.engine.buckets import Buckets
from megatron_scratch.engine.ddp import DDPEngine
from megatron_scratch.parallel import SINGLE, Topology, materialize, shard_param
from megatron_scratch.parallel.layout import normal

ROWS, STEPS = 8, 3


class Core(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (shard_param((5, 5), SINGLE, init=normal(0.5)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (torch.tanh(x @ self.a) @ self.b).square().sum()


class Wrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.core = Core()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.core(x)


def _optimizer(named: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW([{"params": list(named.values()), "lr_scale": 1.0}], lr=0.0)


def build(topo: Topology, clip: float) -> DDPEngine:
    model = Wrapper()
    fill = partial(materialize, model.core, 5, topo.device)
    return DDPEngine(DDPConfig(), Parts((model,), (model.core,), fill, _optimizer, topo, clip))


def _train(topo: Topology, micro: int, clip: float) -> tuple[list[float], dict[str, list[float]]]:
    engine, norms = build(topo, clip), []
    data = torch.randn(STEPS, ROWS, 5, generator=torch.Generator().manual_seed(0))
    for step in range(STEPS):
        mine = data[step].chunk(topo.size("dp"))[topo.index("dp")].split(micro)
        for i, x in enumerate(mine):
            with engine.microbatch(last=i == len(mine) - 1):
                engine.backward(engine.forward(x) / ROWS)
        norm = engine.norm()
        engine.update(1e-2, norm)
        norms.append(norm.item())
    return norms, {k: v.flatten().tolist() for k, v in engine.state().items()}


@pytest.mark.parametrize(("world", "micro"), [(1, 2), (2, 4), (2, 1), (4, 1)])
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_ddp_equals_one_process(world: int, micro: int, clip: float) -> None:
    norms, state = _train(SINGLE, ROWS, clip)
    for got_norms, got in [_train(SINGLE, micro, clip)] if world == 1 else run_ranks(world, _train, micro, clip):
        # fp32 sums of 8 rows in another order: a few ulp (1.2e-7) each; AdamW divides by sqrt(v), which magnifies them.
        assert got_norms == pytest.approx(norms, rel=2e-6)
        assert set(got) == set(state) and {k.split(".")[0] for k in got} == {"model", "optim"}
        for name in state:
            assert got[name] == pytest.approx(state[name], rel=2e-4, abs=1e-7), name


def test_norm_is_before_clipping() -> None:
    assert _train(SINGLE, ROWS, 0.0)[0][0] == pytest.approx(_train(SINGLE, ROWS, 0.05)[0][0], rel=1e-6)


def test_norm_and_clipping_are_torchs() -> None:
    engine, twin = build(SINGLE, 0.05), build(SINGLE, 0.0)
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(2))
    for e in (engine, twin):
        e.backward(e.forward(x))
    norm = torch.nn.utils.clip_grad_norm_(list(twin.named.values()), 0.05)
    clipped = [p.grad.clone() for p in twin.named.values()]
    seen: list[torch.Tensor] = []
    engine.optimizer.register_step_pre_hook(lambda *_: seen.extend(p.grad.clone() for p in engine.plain.values()))
    assert (ours := engine.norm()).item() == pytest.approx(norm.item(), rel=1e-6)
    engine.update(1e-2, ours)
    for got, want in zip(seen, clipped, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8)


def _reductions(topo: Topology) -> int:
    """All-reduces of gradient buckets in a step of four microbatches."""
    engine, calls = build(topo, 0.0), []
    import megatron_scratch.engine.buckets as module

    whole = module.dist.all_reduce
    module.dist.all_reduce = lambda *a, **k: (calls.append(1), whole(*a, **k))[1]
    for i in range(4):
        with engine.microbatch(last=i == 3):
            engine.backward(engine.forward(torch.ones(2, 5)))
    module.dist.all_reduce = whole
    return len(calls)


def test_gradients_are_reduced_once_a_step() -> None:
    assert run_ranks(2, _reductions) == [1, 1]


def _messages(topo: Topology) -> tuple[list[int], int, list[float]]:
    """(numbers in each message, those sent before backward was over, sums) of a step with a parameter that has no gradient."""
    parameters = [nn.Parameter(torch.full((n,), 1.0)) for n in (300_000, 3, 200, 300_000, 7)]
    buckets, sent = Buckets(parameters, topo.group("dp"), 800_000), []
    whole = buckets._send

    def send(bucket: Sequence[nn.Parameter]) -> None:
        whole(bucket)
        sent.append(sum(p.numel() for p in bucket if p.grad is not None))

    buckets._send = send  # type: ignore[method-assign]
    for last in (False, True):
        if last:
            buckets.watch()
        sum((p * (topo.rank + 1)).sum() for i, p in enumerate(parameters) if i != 1).backward()
        early = len(sent)
    buckets.finish()
    return sent, early, [p.grad[0].item() for p in parameters if p.grad is not None]


def test_buckets() -> None:
    """Cut in the order of backward, sent once each in that order, while backward goes on; then a gradient is the sum over ranks."""
    assert run_ranks(2, _messages) == [([300_007, 300_200], 1, [6.0] * 4)] * 2
