"""Precisions: what is refused, what stays in fp32, in which dtype gradients are added up, the loss scaler, fp8 by emulation."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))

from cells import Cell, References, compare
from refused import refused_in_one_line

from megatron_scratch.config import Config, check, compose
from megatron_scratch.config.precision import FP32, PrecisionConfig
from megatron_scratch.config.shrink import shrink
from megatron_scratch.engine.fsdp import _groups
from megatron_scratch.engine.zero import ZeroEngine, import_deepspeed
from megatron_scratch.models import attend, norms, objective, positions
from megatron_scratch.models.fp8 import fp8_linear, use_fp8
from megatron_scratch.models.gemm import linear, product
from megatron_scratch.parallel import SINGLE, Topology
from megatron_scratch.parallel.layout import full
from megatron_scratch.parallel.traffic import Traffic
from megatron_scratch.train import build, forked, parity
from megatron_scratch.train.passes import to_device
from megatron_scratch.train.scaler import LossScaler, loss_scaler
from megatron_scratch.util.env import Rank
from megatron_scratch.util.errors import RunFailed, UserError

HALF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # the largest relative error of one rounding
DTYPES = pytest.mark.parametrize("dtype", HALF, ids=["bf16", "fp16"])
NORM = 1e-5  # of a sum of some 10^5 squares in fp32; a norm in bf16 is off by 1e-3
NEEDS_TORCHAO = pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao")
MICRO = "train.micro_batch_size=8"

# (processes, overrides, what the message must contain)
REFUSED = [
    (2, ["precision=fp32", "precision.gradients=bf16", "engine=fsdp", MICRO], ["gradients=bf16 has no effect", "bf16, fp8"]),
    (2, ["precision=bf16", "precision.scale=8", MICRO], ["precision.scale=8.0 has no effect", "fp16"]),
    (2, ["precision=bf16", "precision.recipe=rowwise", MICRO], ["precision.recipe=rowwise has no effect", "fp8"]),
    (2, ["precision=bf16", "precision.gradients=bf16", MICRO], ["engine=ddp", "fp32 masters", "engine=fsdp"]),
    (1, ["precision=bf16", "precision.gradients=bf16", "engine=fsdp"], ["no effect on one data-parallel rank"]),
    (2, ["precision=bf16", "precision.gradients=fp16", "engine=fsdp", MICRO], ["precision.gradients='fp16'", "fp32, bf16"]),
    (2, ["precision=fp16", "engine=zero2", MICRO], ["precision=fp16", "engine=zero2", "fsdp"]),
    (1, ["precision=fp16", "precision.scale=0.5"], ["precision.min_scale=1.0", "precision.scale=0.5"]),
    (1, ["precision=fp16", "precision.backoff=1"], ["backoff=1.0", "between 0 and 1"]),
    (1, ["precision=fp16", "precision.growth_interval=0"], ["growth_interval=0", "at least 1"]),
    (1, ["precision=fp12"], ["precision=fp12", "fp16"]),
]
FP8 = [
    (2, ["parallel.tp=2"], ["parallel.tp=2", "engine=fsdp"]),
    (1, ["engine=zero1"], ["engine=zero1", "engine=ddp"]),
    (1, ["model.ffn_size=100"], ["model.ffn_size = 100", "multiple of 16"]),
    (1, ["train.seq_len=6", "train.micro_batch_size=1"], ["= 6", "multiple of 16"]),
    (1, ["precision.recipe=blockwise"], ["precision.recipe='blockwise'", "tensorwise, rowwise"]),
    (1, ["precision.scale=8"], ["precision.scale=8.0 has no effect"]),
]


@pytest.mark.parametrize(("world", "overrides", "words"), REFUSED, ids=[" ".join(r[1]) for r in REFUSED])
def test_refused_in_one_line(world: int, overrides: list[str], words: list[str]) -> None:
    refused_in_one_line(world, overrides, words)


@pytest.mark.parametrize(("world", "overrides", "words"), FP8, ids=[" ".join(r[1]) for r in FP8])
def test_fp8_is_refused_where_it_cannot_be(
    world: int, overrides: list[str], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for section in ("engine", "precision"):  # as if DeepSpeed and torchao were there
        monkeypatch.setattr(f"megatron_scratch.config.{section}.find_spec", lambda name: True)
    refused_in_one_line(world, ["precision=fp8", *overrides], words)


def test_fp8_needs_torchao_and_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = compose.load(["precision=fp8", "model.vocab_size=64"])
    monkeypatch.setattr("megatron_scratch.config.precision.find_spec", lambda name: None)
    with pytest.raises(UserError, match="precision=fp8 needs torchao, which is not installed"):
        check(cfg, 1)
    monkeypatch.setattr("megatron_scratch.config.precision.find_spec", lambda name: True)
    check(cfg, 1)
    with pytest.raises(UserError, match="precision=fp8 on a CPU: fp8 products need a GPU of capability 8.9 or above"):
        build.build_engine(cfg, SINGLE)
    with pytest.raises(UserError, match="precision=fp8 has no parity.*fp16"):
        parity.tolerance(cfg)


# What stays in fp32. Each proof takes the dtype of the activations, and fails if what it is about were computed in it.


def _rows(dtype: torch.dtype, *size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(0)).to(dtype)


def _error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float(((got.double() - exact).norm() / exact.norm()).detach())


def norm_statistics(dtype: torch.dtype) -> None:
    """Of 4096 numbers around 3, and of numbers whose squares are beyond fp16: one rounding, that of the result. The spread of
    numbers around 3 is a difference of large sums: with statistics in bf16 LayerNorm's would be off by a tenth."""
    one = torch.ones(4096)
    for x in (_rows(dtype, 32, 4096) + 3, (_rows(dtype, 32, 4096) * 3000).clamp(-60000, 60000)):
        rms, layer = norms.rms_norm(x, one, 1e-5), norms.layer_norm(x, one, one * 0, 1e-5)
        assert rms.dtype == layer.dtype == dtype
        assert _error(rms, F.rms_norm(x.double(), (4096,), eps=1e-5)) < HALF[dtype]
        assert _error(layer, F.layer_norm(x.double(), (4096,), eps=1e-5)) < HALF[dtype]


def softmax(dtype: torch.dtype) -> None:
    """4096 equal scores: the mean of all values. A sum of 4096 ones is 256 in bf16 and 2048 in fp16, where adding 1 changes nothing
    any more."""
    q, k, v = torch.zeros(1, 1, 2, 16, dtype=dtype), _rows(dtype, 1, 4096, 2, 16), _rows(dtype, 1, 4096, 2, 16) + 1
    mask = attend.make_mask(1, 4096, None, None, q.device)
    for backend in (attend.reference, attend.sdpa, attend.matmul):
        assert _error(backend(q, k, v, mask), v.double().mean(1, keepdim=True)) < HALF[dtype], backend


def loss(dtype: torch.dtype) -> None:
    """Cross entropy of the logits as they are, over 8192 ids and 512 tokens, against fp64."""
    hidden, weight = _rows(dtype, 512, 32).requires_grad_(), _rows(torch.float32, 8192, 32).requires_grad_()
    labels = torch.arange(512) * 16
    found, _ = objective.linear_cross_entropy_sum(hidden, weight, labels, chunk=128)
    logits = product(hidden.detach(), weight.detach().to(dtype)).double()
    assert found.dtype == torch.float32
    assert _error(found, F.cross_entropy(logits, labels, reduction="sum")) < 1e-6
    found.backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32 and hidden.grad is not None and hidden.grad.dtype == dtype


def rotary_angles(dtype: torch.dtype) -> None:
    """Position 30,000: an angle in fp32 is off by 0.002 at most, in bf16 by 64, in fp16 by 8."""
    rope = positions.Rope(compose.load(["model=llama_tiny"]).model, SINGLE)
    rope.to_empty(device="cpu").reset_buffers()
    found = rope.rotation(torch.tensor([[30_000]]), dtype)
    assert found is not None and found[0].dtype == dtype
    angles = 30_000 * rope.frequencies.double()
    assert float((found[0].double().flatten() - angles.cos()).abs().max()) < HALF[dtype] + 2e-3


def _stepped(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    cfg = compose.load(["model=llama_tiny", "model.vocab_size=64", "model.num_layers=1", f"precision={name}"])
    _, engine = build.build_engine(cfg, SINGLE)
    tokens = torch.arange(64).view(2, 32)
    for _ in range(2):
        engine.backward(engine.forward(tokens, tokens) / 64)
        found = {k: v.clone() for k, v in engine.state().items() if k.startswith("grad.")}
        norm = engine.norm(1.0 if name == "fp16" else None)
        engine.update(1e-3, norm)
    return found | engine.state() | {"norm": norm}


def _are_fp32(dtype: torch.dtype, prefix: str) -> None:
    found = {name: t.dtype for name, t in _stepped(dtype).items() if name.startswith(prefix)}
    assert len(found) > 9 and set(found.values()) == {torch.float32}, found


def gradient_norm(dtype: torch.dtype) -> None:
    """Also where gradients are bf16 (precision.gradients), see `test_the_dtype_of_gradients`."""
    found = _stepped(dtype)
    exact = torch.cat([g.flatten() for name, g in found.items() if name.startswith("grad.")]).double().norm()
    assert found["norm"].dtype == torch.float32 and _error(found["norm"], exact) < NORM


PROOFS: dict[str, Callable[[torch.dtype], None]] = {
    "master weights": lambda dtype: _are_fp32(dtype, "model."),
    "optimizer state": lambda dtype: _are_fp32(dtype, "optim."),
    "gradients": lambda dtype: _are_fp32(dtype, "grad."),
    "gradient norm": gradient_norm,
    "norm statistics": norm_statistics,
    "softmax of attention": softmax,
    "rotary angles": rotary_angles,
    "loss": loss,
}


@DTYPES
@pytest.mark.parametrize("what", FP32)
def test_stays_in_fp32(what: str, dtype: torch.dtype) -> None:
    PROOFS[what](dtype)


def test_the_docs_have_a_row_for_each() -> None:
    text = (Path(__file__).parents[2] / "docs" / "precision.md").read_text()
    table = text.partition("| stays in fp32 |")[2].partition("\n\n")[0]
    assert tuple(line.split("|")[1].strip() for line in table.splitlines()[2:]) == FP32 and set(FP32) == set(PROOFS)


# In which dtype gradients are added up, over microbatches and over dp.


class Reductions(Traffic):
    """The dtypes of gradients that travel: of every sum over ranks of more than a few numbers."""

    dtypes: set[torch.dtype]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and "reduce" in func.__name__:
            self.dtypes |= {t.dtype for t in tree_leaves(args) if isinstance(t, torch.Tensor) and t.numel() > 100}
        return super().__torch_dispatch__(func, types, args, kwargs)


def _held(engine: Any) -> set[torch.dtype]:
    """Dtypes of what has been added up so far."""
    if isinstance(engine, ZeroEngine):
        return {g.dtype for g in engine.owned.gradients().values()} if engine.reduced else set()
    parameters = [p for group in _groups(engine.calls[0]) for p in group.fsdp_params]
    return {
        t.dtype for t in tree_leaves([(p.unsharded_accumulated_grad, p._unsharded_param.grad) for p in parameters]) if t is not None
    }


def _added_up(cfg: Config, topo: Topology) -> tuple[dict[str, torch.Tensor], list[set[torch.dtype]]]:
    """Gradients of the layers' matrices in one step, and the dtypes [of the sums, on the way]."""
    _, engine = build.build_engine(cfg, topo)
    loader = build.loader(cfg, parity.MadeUpSamples(cfg.model.vocab_size or 0, cfg.train.seq_len, cfg.seed), topo)
    batches, held = list(loader.microbatches(0, cfg.train.global_batch_size)), set()
    with Reductions(topo) as seen:
        seen.dtypes = set()
        for i, batch in enumerate(batches):
            with engine.microbatch(last=i == len(batches) - 1):
                engine.backward(engine.forward(*to_device(batch, topo.device)) / 128)
            held |= _held(engine) if topo.world > 1 else set()
    gradients = {k.removeprefix("grad."): full(v).clone() for k, v in engine.state().items() if k.startswith("grad.")}
    norm = torch.cat([g.flatten() for g in gradients.values()]).double().norm()
    assert float(engine.norm()) == pytest.approx(float(norm), rel=NORM), "whatever the dtype of the gradients"
    return {name: g for name, g in gradients.items() if g.ndim == 2 and name.startswith("layers")}, [held, seen.dtypes]


def _apart(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    assert set(found) == set(truth)
    flat, exact = (torch.cat([side[name].flatten().double() for name in truth]) for side in (found, truth))
    return _error(flat, exact)


def _distance(rank: Rank, cfg: Config, truth: dict[str, torch.Tensor]) -> tuple[float, list[list[str]]]:
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)  # as in parity
    found, dtypes = _added_up(cfg, build.topology(cfg, rank, torch.device("cpu")))
    return _apart(found, truth), [sorted(map(str, seen)) for seen in dtypes]


@pytest.mark.parametrize("engine", ["fsdp", "hsdp", "zero1", "zero2", "zero3"])
def test_the_dtype_of_gradients(engine: str) -> None:
    """A microbatch's gradient of a matrix is rounded to bf16 once, in any case. Added up in fp32 it stays at that: the distance to
    one process, which adds up in fp32 too, is that of fp32 sums in another order. In bf16 every sum is rounded again."""
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
        import_deepspeed(engine, torch.device("cpu"))
    world, errors = 4 if engine == "hsdp" else 2, {}
    for gradients in ("fp32", "bf16"):
        cfg = Cell(1, engine, "llama", 4, False).config("precision=bf16", f"precision.gradients={gradients}")
        check(cfg, world)
        small = shrink(cfg, world)
        truth, _ = _added_up(parity.single(small), SINGLE)
        answers = forked.run_ranks(world, _distance, small, truth)
        print(engine, gradients, answers)
        errors[gradients] = answers[0][0]
        want = ["torch.float32" if gradients == "fp32" else "torch.bfloat16"]
        assert all(dtypes == [want, want] for _, dtypes in answers), answers
    assert errors["fp32"] < 1e-6 < 2.0**-10 < errors["bf16"] < 2.0**-7, errors


def test_the_loss_scaler() -> None:
    scaler = LossScaler(PrecisionConfig("fp16", scale=8.0, growth_interval=2, min_scale=2.0))
    said = []
    for finite in (True, True, True, False, True, False, False):
        reason = scaler.update(finite)
        said.append((scaler.scale, scaler.good, bool(reason), scaler.stuck))
    assert said == [(8.0, 1, False, False), (16.0, 0, False, False), (16.0, 1, False, False), (8.0, 0, True, False),
                    (8.0, 1, False, False), (4.0, 0, True, False), (2.0, 0, True, False)]  # fmt: skip
    scaler.refuse_to_go_on(7)
    other = LossScaler(scaler.cfg)
    other.load(scaler.state())
    assert (other.scale, other.good) == (2.0, 0)
    assert scaler.update(False) == "gradients overflowed under the loss scale 2, the smallest one"
    with pytest.raises(RunFailed, match="step 8: gradients overflow under precision.min_scale=2 too"):
        scaler.refuse_to_go_on(8)
    assert [name for name in ("fp32", "bf16", "fp16", "fp8", "fp64") if loss_scaler(PrecisionConfig(name))] == ["fp16"]


def test_a_scale_changes_no_number_but_saves_small_ones() -> None:
    """Powers of two cancel exactly in fp32. In fp16 gradients of 1e-9 are 0 without a scale."""
    norms_of = {}
    for scale in (None, 1.0, 2.0**24):
        cfg = compose.load(["model=llama_tiny", "model.vocab_size=64", "model.num_layers=1", "precision=fp16"])
        _, engine = build.build_engine(cfg, SINGLE)
        tokens = torch.arange(64).view(2, 32)
        engine.backward(engine.forward(tokens, tokens) / 2**24 * (scale or 1.0))
        up = engine.state()["grad.layers.0.mlp.up.weight"].abs().max()
        norms_of[scale] = float(engine.norm(scale)), float(up) / (scale or 1.0)
    assert norms_of[None] == norms_of[1.0] and norms_of[1.0][1] == 0.0 < norms_of[2.0**24][1] < 6e-8


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device: numbers taken out of tensors."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_an_engine_never_waits(precision: str) -> None:
    """That is left to the training step, which looks at its numbers once."""
    cfg = compose.load(["model=llama_tiny", "model.vocab_size=64", "model.num_layers=1", f"precision={precision}"])
    _, engine = build.build_engine(cfg, SINGLE)
    tokens = torch.arange(64).view(2, 32)
    engine.backward(engine.forward(tokens, tokens) / 64)
    with Waits() as seen:
        engine.update(1e-3, engine.norm(1.0 if precision == "fp16" else None))
    assert seen.number == 0


ROWS = [("fp16", Cell(2, "ddp", "llama", 4, True), []), ("fp16", Cell(2, "ddp", "gpt2", 1, False), []),
        ("fp16", Cell(1, "fsdp", "llama_tied", 4, False), []), ("fp16", Cell(2, "fsdp", "scratch", 1, True), []),
        ("fp16", Cell(1, "hsdp", "gpt2", 1, False), []), ("fp16", Cell(2, "ddp", "llama", 1, True), ["precision.scale=1024"]),
        *(("bf16", Cell(tp, engine, "llama", 4, tp > 1), ["precision.gradients=bf16"]) for tp, engine in
          ((2, "fsdp"), (1, "hsdp"), (2, "zero1"), (1, "zero2"), (2, "zero3")))]  # fmt: skip


@pytest.mark.parametrize(("precision", "cell", "more"), ROWS, ids=[f"{p}-{cell}-{'-'.join(more)}" for p, cell, more in ROWS])
def test_equals_one_process_in(precision: str, cell: Cell, more: list[str]) -> None:
    """At most twice as far from fp32 as one process is, as in bf16."""
    cfg = cell.config(f"precision={precision}", *more)
    rows = compare(cfg, References())
    assert parity.passed(rows, parity.tolerance(cfg)), rows


# fp8, by emulation: numbers are rounded as fp8 is and multiplied in bf16, on any device.


@NEEDS_TORCHAO
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_fp8_errs_as_much_as_its_operands_are_rounded(recipe: str) -> None:
    """A rounding of e4m3 is off by up to u = 2^-4, of e5m2 by 2^-3; its mean square is below u^2 / 3, and those of two operands
    add up."""
    multiply = fp8_linear(recipe, emulate=True)
    x, weight, grad = (_rows(torch.bfloat16, *size) for size in ((64, 96), (128, 96), (64, 128)))
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    y = multiply(*leaves)
    d_x, d_weight = torch.autograd.grad(y, leaves, grad)
    e4m3, e5m2 = 2.0**-4, 2.0**-3
    other = e5m2 if recipe == "tensorwise" else e4m3
    exact = (x.double() @ weight.double().t(), grad.double() @ weight.double(), grad.double().t() @ x.double())
    for got, want, (a, b) in zip((y, d_x, d_weight), exact, ((e4m3, e4m3), (other, e4m3), (other, e4m3)), strict=True):
        assert got.dtype == torch.bfloat16
        assert 2.0**-8 < _error(got, want) < math.hypot(a, b) / math.sqrt(3)


@NEEDS_TORCHAO
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_fp8_layers_and_no_others(recipe: str) -> None:
    """The loss is within a hundredth of bf16's, gradients within a quarter; the head is not among the layers."""
    found = {}
    for fp8 in (False, True):
        cfg = compose.load(["model=llama_tiny", "model.vocab_size=64", "model.tie_embeddings=false", "precision=bf16"])
        model = build.build_model(cfg, SINGLE)
        if fp8:
            use_fp8(model.decoder.layers.values(), recipe, emulate=True)
            changed = {name for name, m in model.decoder.named_modules() if getattr(m, "multiply", linear) is not linear}
            assert len(changed) == 5 * cfg.model.num_layers and all(name.startswith("layers.") for name in changed), changed
        build.materialize(model.decoder, cfg.seed, SINGLE.device)
        tokens = torch.arange(64).view(2, 32)
        loss = model(tokens, tokens) / 64
        loss.backward()
        found[fp8] = loss.item(), {name: p.grad for name, p in model.decoder.named_parameters()}
    assert found[True][0] != found[False][0] and found[True][0] == pytest.approx(found[False][0], rel=1e-2)
    for name, grad in found[True][1].items():
        assert _error(grad, found[False][1][name].double()) < 0.25, name


@NEEDS_TORCHAO
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_fp8_over_ranks(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales are of one microbatch and one weight: the same ones on every rank, so that layers' gradients are those of one process,
    but for a sum in another order."""
    monkeypatch.setattr(build, "refuse_device", lambda device: None)
    monkeypatch.setattr(build, "use_fp8", partial(use_fp8, emulate=True))
    small = shrink(Cell(1, engine, "llama", 4, False).config("precision=fp8"), 2)
    truth, _ = _added_up(parity.single(small), SINGLE)
    plain, _ = _added_up(parity.single(small, "bf16"), SINGLE)
    assert _apart(plain, truth) > 1e-2, "it is fp8 indeed"
    assert all(error < 1e-6 for error, _ in forked.run_ranks(2, _distance, small, truth))
