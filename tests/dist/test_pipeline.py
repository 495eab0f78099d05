"""Pieces of a pipeline by themselves: what a stage holds, weight gradients that come later, memory between microbatches."""

from __future__ import annotations

import pytest
import torch
from ranks import run_ranks

from megatron_scratch.config import compose
from megatron_scratch.data.made_up import MadeUpSamples
from megatron_scratch.models.gemm import deferred_linear, linear
from megatron_scratch.parallel import Topology
from megatron_scratch.parallel.deferred import WeightGradients
from megatron_scratch.train import build, forked
from megatron_scratch.train.batches import BatchPlan
from megatron_scratch.train.step import TrainStep
from megatron_scratch.util.env import Rank

TINY = ["model=llama_tiny", "model.vocab_size=60", "model.num_layers=4", "model.hidden_size=32", "model.num_kv_heads=2",
        "model.ffn_size=64", "model.max_seq_len=16", "train.seq_len=16", "train.micro_batch_size=1"]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_deferred_weight_gradient_is_the_same_product(dtype: torch.dtype, bias: bool) -> None:
    g = torch.Generator().manual_seed(0)
    x, weight, b = (torch.randn(size, generator=g) for size in ((6, 5), (4, 5), (4,)))
    found = []
    for later in (None, WeightGradients()):
        leaves = [t.clone().requires_grad_() for t in (x, weight, b)]
        args = [*(leaf.to(dtype) for leaf in leaves[: 2 + bias]), *([] if bias else [None])]
        y = linear(*args) if later is None else deferred_linear(*args, later)
        y.square().sum().backward()
        if later is not None:
            assert leaves[1].grad is None and leaves[0].grad is not None, "only the input gradient is there"
            later.take()()
            assert not later.left
        found.append([y.detach(), *(leaf.grad for leaf in leaves[: 2 + bias])])
    for now, then in zip(*found, strict=True):  # a fused product and bias round once, these twice: half a unit of the dtype each
        assert (then - now).norm() <= (2 * torch.finfo(dtype).eps if bias else 0.0) * now.norm()


def test_work_taken_for_one_microbatch_does_not_touch_the_next() -> None:
    later, weight = WeightGradients(), torch.ones(2, 2, requires_grad=True)
    works = []
    for scale in (1.0, 10.0):
        deferred_linear(torch.full((1, 2), scale, requires_grad=True), weight, None, later).sum().backward()
        works.append(later.take())
    works[1]()
    assert torch.equal(weight.grad, torch.full((2, 2), 10.0))
    works[0]()
    assert torch.equal(weight.grad, torch.full((2, 2), 11.0))


def _config(*words: str, world: int = 2) -> object:
    cfg = compose.load([*TINY, *words])
    cfg.launcher.processes = world
    return cfg


def _names(rank: Rank, cfg: object) -> list[str]:
    models, _ = build.build_engine(cfg, build.topology(cfg, rank, torch.device("cpu")))
    return [name for model in models for name, _ in model.decoder.named_parameters() if "attention.out" in name or "." not in name[6:]]


@pytest.mark.parametrize("tied", [False, True])
def test_a_rank_builds_only_its_own_layers_under_their_global_names(tied: bool) -> None:
    cfg = _config("parallel.pp=2", "parallel.schedule=zbv_zero_bubble", f"model.tie_embeddings={tied}", "parallel.stages=[1,1,1,1]")
    head = "embed.weight" if tied else "head.weight"
    ends = ["embed.weight", "layers.0.attention.out.weight", head, "layers.3.attention.out.weight", "norm.weight"]
    found = forked.run_ranks(2, _names, cfg)
    assert sorted(found[0]) == sorted(ends)
    assert found[1] == ["layers.1.attention.out.weight", "layers.2.attention.out.weight"]


def _trained(rank: Rank, cfg: object) -> tuple[int, int, int]:
    """(gradient bytes held between microbatches, at most; buffers left after the step; schedules made)."""
    topo = build.topology(cfg, rank, torch.device("cpu"))
    _, engine = build.build_engine(cfg, topo)
    passes = build.build_passes(cfg, engine, topo)
    held, inner = [0], passes.pipeline.accumulate

    def accumulate(stage: int) -> None:
        inner(stage)
        held.append(_gradient_bytes(engine.calls[stage]))

    passes.pipeline.accumulate = accumulate
    step = TrainStep(passes, build.loader(cfg, MadeUpSamples(60, 16, 0), topo), BatchPlan(cfg.train), topo, lambda _: 1e-3, None,
                     lambda: False)  # fmt: skip
    torch.distributed.send_object_list = None  # how torch would send shapes around, had it to infer them
    for number in range(2):
        step(number)
    (schedule,) = passes.pipeline.schedules.values()
    stages = getattr(schedule, "_stages", None) or [schedule._stage]
    infos = [i for s in stages for table in (s.args_recv_info, s.grad_recv_info) for row in table.values() for i in row]
    return max(held), sum(info.buffer is not None for info in infos), len(passes.pipeline.schedules)


def _gradient_bytes(model: torch.nn.Module) -> int:
    from megatron_scratch.engine.fsdp import _groups

    total = 0
    for parameter in (p for group in _groups(model) for p in group.fsdp_params):
        whole = getattr(parameter, "_unsharded_param", None)
        for tensor in (parameter.unsharded_accumulated_grad, getattr(whole, "grad", None), parameter.sharded_param.grad):
            tensor = getattr(tensor, "_local_tensor", tensor)
            total += 0 if tensor is None else tensor.nbytes
    return total


@pytest.mark.parametrize("schedule", ["1f1b", "zbv_zero_bubble"])
def test_gradients_are_held_whole_until_the_last_microbatch_or_in_parts(schedule: str) -> None:
    """The trade that engine.reduce_every_microbatch offers, in exact bytes: whole fp32 gradients, or 1/dp of them."""
    sizes = {}
    for every in (False, True):
        cfg = _config("parallel.pp=2", f"parallel.schedule={schedule}", "engine=fsdp", "precision=bf16", "train.global_batch_size=8",
                      f"engine.reduce_every_microbatch={every}", world=4)  # fmt: skip
        found = forked.run_ranks(4, _trained, cfg)
        sizes[every] = [held for held, _, _ in found]
        assert all(left == 0 for _, left, _ in found), "no buffer of a message outlives its microbatch"
        assert all(made == 1 for _, _, made in found)
    for whole, part in zip(sizes[False], sizes[True], strict=True):
        assert 0 < part <= whole / 2 * 1.02, (whole, part)


def test_the_ends_of_a_pipeline_swap() -> None:
    def swapped(topo: Topology) -> float:
        from megatron_scratch.parallel.collectives import swap

        return float(swap(torch.tensor([float(topo.rank)]), topo, "pp", 1 - topo.index("pp")))

    assert run_ranks(2, swapped, degrees={"pp": 2}) == [1.0, 0.0]


def _weight_copies(rank: Rank, cfg: object) -> int:
    """Different bf16 tensors of the size of one weight that backward keeps, over all microbatches in flight."""
    topo = build.topology(cfg, rank, torch.device("cpu"))
    _, engine = build.build_engine(cfg, topo)
    step = TrainStep(build.build_passes(cfg, engine, topo), build.loader(cfg, MadeUpSamples(60, 16, 0), topo), BatchPlan(cfg.train),
                     topo, lambda _: 1e-3, None, lambda: False)  # fmt: skip
    kept: set[int] = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype == torch.bfloat16 and tuple(tensor.shape) in ((32, 64), (64, 32)):  # qkv, gate, up, down
            kept.add(tensor.untyped_storage().data_ptr())
            alive.append(tensor)
        return tensor

    alive: list[torch.Tensor] = []  # so that no address comes twice
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step(0)
    return len(kept)


def test_microbatches_in_flight_share_the_weights_that_they_compute_with() -> None:
    cfg = _config("parallel.pp=2", "parallel.schedule=gpipe", "precision=bf16", "train.global_batch_size=8",
                  "parallel.stages=[2,2]")  # fmt: skip
    assert forked.run_ranks(2, _weight_copies, cfg) == [8, 8], "four of each of two layers, not of each of 8 microbatches"
