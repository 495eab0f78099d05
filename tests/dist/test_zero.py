"""DeepSpeed's ZeRO: norms, weights and optimizer state are those of one plain process, in every stage and layout.

The model has what can go wrong: weights cut over tp, a copy on every tp rank, a parameter whose gradient is partial over tp, sizes
that divide by nothing, two optimizer groups, more parameters than a rank owns.
"""

from __future__ import annotations

import math
import random
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from megatron_scratch.checkpoint import store
from megatron_scratch.checkpoint.manifest import verify
from megatron_scratch.checkpoint.store import load, save
from megatron_scratch.config.engine import Zero3Config, ZeroConfig
from megatron_scratch.config.model import ModelConfig
from megatron_scratch.config.optim import MuonConfig
from megatron_scratch.engine import Parts, zero
from megatron_scratch.models.decoder import Decoder
from megatron_scratch.optim import optimizers, param_groups
from megatron_scratch.parallel import SINGLE, Topology, local, materialize, shard_param
from megatron_scratch.parallel.layout import ONES, normal
from megatron_scratch.parallel.pieces import Pieces, boxes
from megatron_scratch.train.objective import LanguageModel
from megatron_scratch.util.errors import UserError

ROWS, LR = 8, 1e-2
MICRO = (ROWS, 1, 2)  # rows of a microbatch, step by step: their number changes, as it does while a batch grows
State = dict[str, Any]
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def deepspeed() -> None:
    """Imported once: the forked ranks inherit it."""
    zero.import_deepspeed("zero1", CPU)


def _sendable(topo: Topology, fn: Callable[..., Any], *args: Any) -> Any:
    """Tensors travel through the pipe as numpy's: torch's would be shared memory of a rank that is gone by then."""
    return tree_map(lambda x: x.numpy() if isinstance(x, torch.Tensor) else x, fn(topo, *args))


def ranks(world: int, fn: Callable[..., Any], *args: Any, degrees: dict[str, int] | None = None, detail: bool = False) -> list[Any]:
    """Without torch's checks that all ranks issue the same collectives: they make each ten times slower, and stage 3 has many."""
    answers = run_ranks(world, _sendable, fn, *args, degrees=degrees, detail=detail)
    return tree_map(lambda x: torch.as_tensor(x) if isinstance(x, np.ndarray) else x, answers)


class _Sum(torch.autograd.Function):
    """Add up over tp; the gradient passes as it is."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None


class Core(nn.Module):
    """|tanh((x * c) A^T) B E^T|^2, the rows of A and B cut over tp: each tp rank has a part of the gradient of c."""

    def __init__(self, topo: Topology) -> None:
        super().__init__()
        self.topo = topo
        self.a, self.b = (shard_param((6, 5), topo, "tp", dim=0, init=normal(0.5)) for _ in range(2))
        self.c = shard_param((5,), topo, init=ONES, partial=True)
        self.e = shard_param((3, 5), topo, init=normal(0.3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh((x.to(self.c.dtype) * local(self.c)) @ local(self.a).t()) @ local(self.b)
        group = self.topo.group("tp")
        h = h if group is None else _Sum.apply(h, group)
        return (h @ local(self.e).t()).float().square().sum()


class Wrapper(nn.Module):
    def __init__(self, topo: Topology) -> None:
        super().__init__()
        self.core = Core(topo)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.core(x)


def _optimizer(kind: str, named: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    groups = [{"params": [p for p in named.values() if p.ndim == ndim], "lr_scale": ndim / 2} for ndim in (2, 1)]
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9, fused=True)
    if kind == "lion":
        return optimizers.Lion(groups, lr=0.0, betas=(0.9, 0.99))
    # With torch's eps of 1e-8 a gradient near 0 moves a weight by +-lr, whatever its size: rounding would be all one sees.
    return torch.optim.AdamW(groups, lr=0.0, eps=1e-3, fused=True)


def _config(name: str, offload: bool = False) -> ZeroConfig:
    if name == "zero3":
        # persist 0, or stage 3 would not cut such small parameters at all
        return Zero3Config(name, offload_optimizer=offload, offload_param=offload, persist=0)
    return ZeroConfig(name, offload_optimizer=offload)


def build(
    topo: Topology, name: str, clip: float = 0.5, dtype: torch.dtype = torch.float32, kind: str = "adamw", offload: bool = False
) -> zero.ZeroEngine:
    model = Wrapper(topo)
    fill = partial(materialize, model.core, 5, topo.device)
    parts = Parts((model,), (model.core,), fill, partial(_optimizer, kind), topo, clip, dtype)
    return zero.ZeroEngine(_config(name, offload), parts)


def batch(step: int) -> torch.Tensor:
    return torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(step))


def whole(state: State) -> dict[str, torch.Tensor]:
    return {key: value.full() if isinstance(value, Pieces) else value.clone() for key, value in state.items()}


def steps(engine: zero.ZeroEngine, topo: Topology, which: range) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train, with an evaluation before each step; norms, and the last step's gradients."""
    norms, grads = [], {}
    for step in which:
        mine = batch(step).chunk(topo.size("dp"))[topo.index("dp")].split(MICRO[step % 3])
        with torch.no_grad():
            engine.forward(mine[0])
        for i, x in enumerate(mine):
            with engine.microbatch(last=i == len(mine) - 1):
                engine.backward(engine.forward(x) / ROWS)
        grads = {k: v for k, v in whole(engine.state()).items() if k.startswith("grad.")}
        norm = engine.norm()
        engine.update(LR, norm)
        norms.append(norm.item())
    return norms, grads


def plain(clip: float, kind: str = "adamw") -> tuple[list[float], State]:
    """The yardstick: one process, no engine, whole batches."""
    core = Core(SINGLE)
    materialize(core, 5, CPU)
    named = dict(core.named_parameters())
    optimizer, norms, grads = _optimizer(kind, named), [], {}
    for step in range(3):
        (core(batch(step)) / ROWS).backward()
        grads = {f"grad.{n}": p.grad.clone() for n, p in named.items()}
        norms.append(nn.utils.clip_grad_norm_(named.values(), clip or math.inf).item())
        for group in optimizer.param_groups:
            group["lr"] = LR * group["lr_scale"]
        optimizer.step()
        optimizer.zero_grad()
    state = {f"optim.{n}.{k}": v for n, p in named.items() for k, v in optimizer.state[p].items()}
    return norms, {**{f"model.{n}": p.detach() for n, p in named.items()}, **state, **grads}


def check(got: tuple[list[float], State], want: tuple[list[float], State], rel: float, absolute: float) -> None:
    assert got[0] == pytest.approx(want[0], rel=rel)
    assert set(got[1]) == set(want[1])
    for name, value in want[1].items():
        torch.testing.assert_close(got[1][name], value, rtol=rel, atol=absolute, msg=lambda text, n=name: f"{n}: {text}")


def _run(topo: Topology, name: str, cases: list[tuple[float, str, bool]]) -> list[tuple[list[float], State]]:
    """Three steps for each (clip, optimizer, offload), one engine after the other in the same process."""
    out = []
    for clip, kind, offload in cases:
        engine = build(topo, name, clip, kind=kind, offload=offload)
        assert all(key.startswith("model.") for key in engine.state()), "a fresh engine has no optimizer state"
        norms, grads = steps(engine, topo, range(3))
        out.append((norms, {**whole(engine.state()), **grads}))
    return out


FAST = {("zero1", 2, 1), ("zero1", 1, 2), ("zero2", 2, 1), ("zero2", 2, 2), ("zero3", 4, 1), ("zero3", 2, 2)}
MATRIX = [
    pytest.param(name, dp, tp, marks=() if (name, dp, tp) in FAST else pytest.mark.full)
    for name in zero.STAGES
    for dp, tp in ((2, 1), (4, 1), (1, 2), (2, 2))
]


@pytest.mark.parametrize(("name", "dp", "tp"), MATRIX)
def test_equals_one_process(name: str, dp: int, tp: int) -> None:
    cases = [(0.5, "adamw", False), (0.0, "sgd", False), (0.5, "sgd", True)]
    for answers in ranks(dp * tp, _run, name, cases, degrees={"tp": tp}, detail=dp * tp == 2):
        for case, got in zip(cases, answers, strict=True):
            # 8 rows are summed in another order: gradients of up to 4 are off by some ulp of 2.4e-7. AdamW divides by at least
            # eps = 1e-3 and multiplies by lr = 1e-2: at most 10 times that for the weights.
            check(got, plain(*case[:2]), rel=5e-6, absolute=5e-6)


@pytest.mark.parametrize("name", ["zero1", "zero3"])
def test_one_process_without_a_group(name: str) -> None:
    """In a fork of its own, which has no process group until DeepSpeed needs one; Lion, whose sign forgives no wrong gradient."""
    cases = [(0.0, "lion", False), (0.5, "adamw", True)]
    for got, case in zip(ranks(1, _alone, name, cases)[0], cases, strict=True):
        check(got, plain(*case[:2]), rel=5e-6, absolute=5e-6)


def _alone(topo: Topology, name: str, cases: list[tuple[float, str, bool]]) -> list[tuple[list[float], State]]:
    dist.destroy_process_group()
    return _run(SINGLE, name, cases)


def _bf16(topo: Topology, name: str) -> list[tuple[State, State]]:
    engine = build(topo, name, dtype=torch.bfloat16)
    fresh = whole(engine.state())
    return [(fresh, steps(engine, topo, range(1, 2))[1]), (whole(engine.state()), {})]


@pytest.mark.parametrize(("name", "dp", "tp"), [("zero1", 4, 1), ("zero2", 4, 1), ("zero3", 4, 1), ("zero3", 2, 2)])
def test_bf16_has_fp32_masters_and_reduces_in_fp32(name: str, dp: int, tp: int) -> None:
    core = Core(SINGLE)
    materialize(core, 5, CPU)
    masters = {f"model.{n}": p.detach().clone() for n, p in core.named_parameters()}
    core.bfloat16()
    sums = {f"grad.{n}": torch.zeros(p.shape) for n, p in core.named_parameters()}
    for x in batch(1).split(1):  # as the ranks do: each row's gradient in bf16, their sum in fp32
        (core(x) / ROWS).backward()
        for n, p in core.named_parameters():
            sums[f"grad.{n}"] += p.grad
            p.grad = None
    for (fresh, grads), (after, _) in ranks(dp * tp, _bf16, name, degrees={"tp": tp}):
        assert all(torch.equal(fresh[k], v) for k, v in masters.items()), "masters were rounded"
        assert all(v.dtype == torch.float32 for v in after.values())
        for key, value in sums.items():
            # Eight bf16 numbers summed in bf16 would be off by 8e-3 and more; over tp the parts of a sum are rounded one by one.
            torch.testing.assert_close(grads[key], value, rtol=1e-6 if tp == 1 else 3e-2, atol=1e-6 if tp == 1 else 2e-2)


def _save(topo: Topology, name: str, root: str) -> State:
    engine = build(topo, name)
    steps(engine, topo, range(2))
    save(Path(root), 2, engine.state(), {}, topo)
    return whole(engine.state())


def _load(topo: Topology, name: str, root: str, dtype: torch.dtype) -> tuple[State, list[float], State]:
    engine = build(topo, name, dtype=dtype)
    folder = Path(root) / "step_00000002"
    manifest = verify(folder)
    engine.load(store.shapes(manifest), lambda state: load(folder, manifest, state, topo))
    loaded = whole(engine.state())
    norms, grads = steps(engine, topo, range(2, 3))
    return loaded, norms, {**whole(engine.state()), **grads}


@pytest.mark.parametrize(("writer", "dp", "tp"), [("zero3", 2, 1), ("zero1", 4, 1), ("zero2", 2, 2), ("zero3", 1, 2)])
def test_any_layout_loads_what_another_wrote_bit_for_bit(writer: str, dp: int, tp: int, tmp_path: Path) -> None:
    saved = ranks(dp * tp, _save, writer, str(tmp_path), degrees={"tp": tp})[0]
    alone = {key: torch.zeros_like(value) for key, value in saved.items()}
    folder = tmp_path / "step_00000002"
    load(folder, verify(folder), alone, SINGLE)
    assert all(torch.equal(alone[key], value) for key, value in saved.items())
    for reader, world, degrees in (("zero1", 4, {}), ("zero3", 4, {"tp": 2})):
        for loaded, norms, state in ranks(world, _load, reader, str(tmp_path), torch.float32, degrees=degrees):
            assert all(torch.equal(loaded[key], value) for key, value in saved.items())
            want_norms, want = plain(0.5)
            check((norms, state), (want_norms[2:], want), rel=5e-6, absolute=5e-6)


@pytest.mark.parametrize("reader", ["zero1", "zero3"])
def test_weights_that_compute_are_taken_over_in_bf16(reader: str, tmp_path: Path) -> None:
    saved = ranks(2, _save, "zero2", str(tmp_path))[0]
    for loaded, norms, _ in ranks(2, _load, reader, str(tmp_path), torch.bfloat16):
        assert all(torch.equal(loaded[key], value) for key, value in saved.items())
        assert norms == pytest.approx(plain(0.5)[0][2:], rel=2e-2)  # rel of bf16: 4e-3; of the fresh weights' norm: 1e-1


def test_it_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    ranks(2, _run, "zero3", [(0.5, "adamw", False)])
    assert capfd.readouterr() == ("", "")


def _parts(topo: Topology = SINGLE, dtype: torch.dtype = torch.float32) -> Parts:
    model = Wrapper(SINGLE)

    def muon(named: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
        return optimizers.muon(MuonConfig(), param_groups(named.items(), MuonConfig(groups=[])))

    return Parts((model,), (model.core,), partial(materialize, model.core, 0, CPU), muon, topo, 0.0, dtype)


@pytest.mark.parametrize(("parts", "words"), [
    (_parts(dtype=torch.float64), "engine=zero2 computes in fp32 or bf16"),
    (_parts(Topology(world=2, degrees={"pp": 2})), "parallel.pp=2"),
    (_parts(), "optim=muon needs whole matrices"),
])  # fmt: skip
def test_refusals(parts: Parts, words: str) -> None:
    with pytest.raises(UserError, match=words):
        zero.ZeroEngine(ZeroConfig("zero2"), parts)


def test_stage_3_refuses_compiled_modules() -> None:
    parts = _parts()
    parts.cores[0].compile()
    with pytest.raises(UserError, match="train.compile=true"):
        zero.ZeroEngine(Zero3Config("zero3"), parts)


def test_without_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name == "deepspeed" or name.startswith("deepspeed.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match="engine=zero2 needs DeepSpeed.*pip install"):
        zero.ZeroEngine(ZeroConfig("zero2"), _parts())
