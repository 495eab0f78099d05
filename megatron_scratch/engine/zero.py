"""ZeRO stages 1, 2 and 3 by DeepSpeed (Rajbhandari et al., arXiv 1910.02054): optimizer state, gradients, parameters cut over dp.

DeepSpeed holds the memory and moves the bytes. What it would do by its own rules is done here by ours: gradients are sums over
dp, partial gradients are added up over tp, the norm counts every number once, and state is named and laid out globally.

In bf16 DeepSpeed computes with bf16 copies and keeps fp32 masters; a microbatch's gradient is rounded to bf16 once (as it is under
FSDP's mixed precision) and is from there on reduced and accumulated in fp32 (in bf16 with precision.gradients=bf16).

Messages of a step over dp, for N local parameters, m microbatches, w bytes of a compute weight (2 in bf16, 4 in fp32):

    stage   gradients, fp32                      weights
    1       all-reduce 4 N, in the last one      all-gather w N, after the update, one message per optimizer group
    2       all-reduce 4 N, in each of m         the same
    3       reduce-scatter 4 N, in each of m     all-gather w N in each of m forwards, and again in each backward for what was
                                                 released: all but the next 10^9 numbers to be used (DeepSpeed's default)

Gradients travel in buckets of `bucket_mb`. Every parameter must take part in every microbatch, on every rank: DeepSpeed reduces
what comes, in the order in which it comes.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron_scratch.config.engine import INSTALL, Zero3Config, ZeroConfig
from megatron_scratch.engine.base import Parts, Shapes
from megatron_scratch.engine.clip import clip_
from megatron_scratch.engine.zero_state import Stage3, Stage12
from megatron_scratch.parallel.collectives import all_reduce_world, sum_over
from megatron_scratch.parallel.layout import localize
from megatron_scratch.parallel.pieces import Pieces
from megatron_scratch.parallel.topology import Topology
from megatron_scratch.util.env import prepare_deepspeed
from megatron_scratch.util.errors import UserError

VERSION = "0.19."
STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}


class ZeroEngine:
    """DeepSpeed's engine behind ours; `cfg.name` says which stage."""

    copies = ""  # of what `state` shows: masters and optimizer state, which every stage cuts

    def __init__(self, cfg: ZeroConfig, parts: Parts) -> None:
        _refuse(cfg.name, parts)
        deepspeed = import_deepspeed(cfg.name, parts.topo.device)
        self.topo, self.clip, stage = parts.topo, parts.clip, STAGES[cfg.name]
        self.layouts = localize(parts.cores[0])  # DeepSpeed's flat buffers are made of plain tensors
        parts.fill()
        named = dict(parts.cores[0].named_parameters())
        self.local_shapes = {name: tuple(p.shape) for name, p in named.items()}  # stage 3 empties the parameters
        self.optimizer = parts.make_optimizer(named)
        if any("muon" in group for group in self.optimizer.param_groups):
            raise UserError(f"optim=muon needs whole matrices, and engine={cfg.name} cuts them into flat ranges; use engine=ddp, "
                            "or optim=adamw")  # fmt: skip
        bf16 = parts.compute_dtype == torch.bfloat16
        initial = {name: p.detach().cpu() for name, p in named.items()} if bf16 else {}
        self.wrapped = _initialize(deepspeed, parts.models[0], self.optimizer, parts.topo, _config(cfg, stage, parts))
        self.owned = (Stage3 if stage == 3 else Stage12)(self.wrapped.optimizer, named)
        self.scale = parts.topo.size("dp") if stage == 3 else 1  # stage 3 averages over dp, and cannot be told to sum
        self.reduced = False  # whether gradients are whole: from the last microbatch to `update` or `drop`
        for name, value in initial.items():  # DeepSpeed has taken its masters from weights that it had rounded
            part = self.owned.parts[name]
            part.of(self.owned.flats[part.group]).copy_(value.flatten()[part.start : part.start + part.numel])

    def forward(self, *args: Any) -> torch.Tensor:
        return self.wrapped(*args)  # type: ignore[no-any-return]

    @contextmanager
    def microbatch(self, last: bool) -> Iterator[None]:
        self.wrapped.set_gradient_accumulation_boundary(last)
        yield
        if last:
            self.reduced = True
            # Alike on all tp ranks of a dp index: local shapes are, hence the ranges are.
            sum_over([g for name, g in self.owned.gradients().items() if self.layouts[name].partial], self.topo, "tp")

    def backward(self, loss: torch.Tensor) -> None:
        self.wrapped.backward(loss * self.scale, scale_wrt_gas=False)

    @torch.no_grad()
    def norm(self, scale: float | None = None) -> torch.Tensor:
        assert scale is None, "config refuses precision=fp16 here"
        gradients, total = self.owned.gradients(), torch.zeros((), device=self.topo.device)
        for counts in (True, False):
            if parts := [g for name, g in gradients.items() if self._counts(name) == counts]:
                squares = torch.stack(torch._foreach_norm(parts, 2, dtype=torch.float32)).square().sum().to(total.device)
                total += squares if counts else 0.0 * squares  # 0, and not a number where one of them is not finite
        return all_reduce_world(total, self.topo).sqrt()

    def update(self, lr: float, norm: torch.Tensor) -> None:
        held = list(self.owned.gradients().values())
        if self.clip > 0 and held:
            clip_(held, norm.to(held[0].device), self.clip)  # which is not the norm's where the optimizer is offloaded
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.wrapped.step()
        self.reduced = False

    def drop(self) -> None:
        with self.owned.overflowed():
            self.wrapped.step()
        self.reduced = False

    def _counts(self, name: str) -> bool:
        """Whether this rank's range of a parameter is the one to count: all of them where tp cuts it, one where tp copies it."""
        return any(p.is_shard() for p in self.layouts[name].placements) or self.topo.index("tp") == 0

    def state(self) -> dict[str, Any]:
        out: dict[str, Any] = {}
        gradients = self.owned.gradients() if self.reduced else {}
        for name, part in self.owned.parts.items():
            flat = self.owned.flats[part.group]
            out[f"model.{name}"] = self._pieces(name, part.of(flat))
            for key, value in self.optimizer.state.get(flat, {}).items():
                whole = value.shape == flat.shape  # else it counts for the group; each parameter has its own in a checkpoint
                out[f"optim.{name}.{key}"] = self._pieces(name, part.of(value)) if whole else value.clone()
            if self.reduced:
                out[f"grad.{name}"] = self._pieces(name, gradients.get(name, flat.new_empty(0)).to(flat.dtype))
        return out

    def _pieces(self, name: str, flat: torch.Tensor) -> Pieces:
        layout, part = self.layouts[name], self.owned.parts[name]
        return Pieces.of_range(layout.shape, self.local_shapes[name], layout.offset(), part.start, flat.detach(),
                               self.topo.device, self._counts(name))  # fmt: skip

    def load(self, shapes: Shapes, fill: Callable[[dict[str, Any]], None]) -> None:
        self.optimizer.state.clear()  # a run that goes back may hold more than the checkpoint does
        for full, (shape, dtype) in shapes.items():
            name, _, key = full.removeprefix("optim.").rpartition(".")
            if full.startswith("optim.") and name in self.layouts:
                flat = self.owned.flats[self.owned.parts[name].group]
                if key not in self.optimizer.state[flat]:
                    whole = shape == self.layouts[name].shape and key != "step"
                    fresh = torch.zeros(flat.shape if whole else shape, dtype=dtype, device=flat.device)
                    self.optimizer.state[flat][key] = fresh
        state = self.state()
        fill(state)
        for name, part in self.owned.parts.items():
            for key, value in self.optimizer.state.get(self.owned.flats[part.group], {}).items():
                if not isinstance(state[f"optim.{name}.{key}"], Pieces):
                    value.copy_(state[f"optim.{name}.{key}"])
        self.owned.publish()


@dataclass(frozen=True)
class _Ranks:
    """Who is where, in the words that DeepSpeed asks in (Megatron's `mpu`)."""

    topo: Topology

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._group("dp")

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._group("tp")

    def get_data_parallel_world_size(self) -> int:
        return self.topo.size("dp")

    def get_model_parallel_world_size(self) -> int:
        return self.topo.size("tp")

    def get_data_parallel_rank(self) -> int:
        return self.topo.index("dp")

    def get_model_parallel_rank(self) -> int:
        return self.topo.index("tp")

    def _group(self, axis: str) -> dist.ProcessGroup:
        if self.topo.mesh is not None:
            return self.topo.axes[axis].get_group()
        assert dist.group.WORLD is not None
        return dist.group.WORLD


def import_deepspeed(engine: str, device: torch.device) -> Any:
    """DeepSpeed, quiet, and kept from compiling anything while it runs.

    Raises:
        UserError: it is not installed, or of a version whose insides `zero_state` does not know.
    """
    prepare_deepspeed(device.index or 0, device.type == "cpu")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what its modules warn of while they are imported is not ours to mend
            import deepspeed
            import deepspeed.ops
            import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  (it imports this one late, and torch's compiler with it)
    except ImportError as error:
        raise UserError(f"engine={engine} needs DeepSpeed, which cannot be imported ({error}); "
                        f"{INSTALL}") from error  # fmt: skip
    if not deepspeed.__version__.startswith(VERSION):
        raise UserError(f"engine={engine} is made for DeepSpeed {VERSION}*, and {deepspeed.__version__} is installed; "
                        f"{INSTALL}")  # fmt: skip
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Shared-memory collectives on CPUs would be built by a C++ compiler in every new environment, for 80 s; gloo does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # torch 2.13 renamed two collectives that DeepSpeed calls by their old names, in hooks that run in the midst of the model.
    warnings.filterwarnings("ignore", message=".*(all_gather_into_tensor|reduce_scatter_tensor)", category=FutureWarning)
    return deepspeed


def _refuse(engine: str, parts: Parts) -> None:
    if parts.compute_dtype not in (torch.float32, torch.bfloat16):
        raise UserError(f"engine={engine} computes in fp32 or bf16 with fp32 masters, not in {parts.compute_dtype}; "
                        "use engine=ddp or engine=fsdp")  # fmt: skip
    for axis in ("pp", "cp"):
        if parts.topo.size(axis) > 1:
            raise UserError(f"engine={engine} composes with parallel.tp only, and parallel.{axis}={parts.topo.size(axis)}; "
                            "use engine=ddp or engine=fsdp")  # fmt: skip
    if STAGES[engine] == 3 and any(module._compiled_call_impl is not None for module in parts.models[0].modules()):
        raise UserError("train.compile=true: compiled layers do not see the weights that engine=zero3 gathers in its hooks; "
                        "use train.compile=false, or engine=fsdp")  # fmt: skip


def _config(cfg: ZeroConfig, stage: int, parts: Parts) -> dict[str, Any]:
    """DeepSpeed's own configuration. Counting microbatches, clipping and the norm are not left to it."""
    elements = cfg.bucket_mb * 2**20 // 4
    host = {"device": "cpu", "pin_memory": parts.topo.device.type == "cuda"}
    gradients = "bf16" if parts.gradient_dtype == torch.bfloat16 else "fp32"
    zero: dict[str, Any] = {
        "stage": stage, "reduce_bucket_size": elements, "allgather_bucket_size": elements,
        "stage3_prefetch_bucket_size": elements,
        "compute_grad_norm": stage == 3 or cfg.offload_optimizer,  # where DeepSpeed cannot do without its own
    }  # fmt: skip
    if cfg.offload_optimizer:
        zero["offload_optimizer"] = host
    if isinstance(cfg, Zero3Config):
        zero["stage3_param_persistence_threshold"] = cfg.persist
        if cfg.offload_param:
            zero["offload_param"] = host
    return {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": 0.0,
        "gradient_allreduce_op": "mean" if stage == 3 else "sum",
        "communication_data_type": gradients, "data_types": {"grad_accum_dtype": gradients},
        "bf16": {"enabled": parts.compute_dtype == torch.bfloat16, "check_grad_overflow": False},
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "zero_optimization": zero,
    }  # fmt: skip


def _initialize(deepspeed: Any, model: nn.Module, optimizer: torch.optim.Optimizer, topo: Topology, config: dict[str, Any]) -> Any:
    """DeepSpeed's engine around the model."""
    if not dist.is_initialized():  # one process: DeepSpeed wants a group all the same
        backend = "cpu:gloo,cuda:nccl" if topo.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    # Stage 1 in bf16 would get another optimizer, which keeps all fp32 gradients on every rank and insists on its own norm.
    # DeepSpeed's ZeRO optimizer does stage 1 as well: here it is the choice for every stage.
    engine, choose = deepspeed.DeepSpeedEngine, "_do_optimizer_sanity_check"
    original = getattr(engine, choose)
    setattr(engine, choose, lambda *_: "zero_optimization")
    try:
        return deepspeed.initialize(model=model, optimizer=optimizer, mpu=_Ranks(topo), config=config)[0]
    finally:
        setattr(engine, choose, original)
