"""The `engine` section: who holds parameters, gradients and optimizer state. One dataclass per entry."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Optional

from megatron_scratch.util.errors import UserError

INSTALL = "pip install -c constraints.txt -e '.[deepspeed]', or use engine=fsdp"


@dataclass
class EngineConfig:
    """What every engine takes: nothing but its name."""

    name: str = "ddp"


@dataclass
class DDPConfig(EngineConfig):
    """Every data-parallel rank holds all of it; gradients are summed."""

    bucket_mb: int = 25  # gradients are all-reduced in pieces of this size while backward goes on


@dataclass
class FSDPConfig(EngineConfig):
    """Parameters, gradients and optimizer state cut over the data-parallel ranks (PyTorch FSDP2), gathered layer by layer."""

    name: str = "fsdp"
    # true: weights are let go of after forward and gathered again for backward; false: more memory, one gather less; None: true
    # without a pipeline, and false with one, where each microbatch would gather again
    reshard_after_forward: Optional[bool] = None
    reduce_every_microbatch: bool = False  # true: a rank holds its part of the gradients only; a reduce-scatter a microbatch


@dataclass
class HSDPConfig(FSDPConfig):
    """FSDP inside groups of ranks, copies of the model over the groups: gathers stay inside a node."""

    name: str = "hsdp"
    replicas: Optional[int] = None  # copies of the model; None: one per node


@dataclass
class ZeroConfig(EngineConfig):
    """What DeepSpeed's ZeRO (Rajbhandari et al., arXiv 1910.02054) takes in every stage."""

    bucket_mb: int = 25  # gradients are reduced in pieces of this size
    offload_optimizer: bool = False  # optimizer state and master weights live, and are updated, in host memory


@dataclass
class Zero1Config(ZeroConfig):
    """Optimizer state cut over the data-parallel ranks."""

    name: str = "zero1"


@dataclass
class Zero2Config(ZeroConfig):
    """Gradients too."""

    name: str = "zero2"


@dataclass
class Zero3Config(ZeroConfig):
    """Parameters too: gathered where they are used."""

    name: str = "zero3"
    offload_param: bool = False  # this rank's part of the weights lives in host memory
    persist: int = 10_000  # parameters of fewer numbers (norms, biases) stay whole on every rank, and are gathered once a step


def replicas(e: Any, dp: int, nodes: int) -> int:
    """Copies of the model under hybrid sharding; 1 for every other engine.

    Raises:
        UserError: they do not divide the data-parallel ranks, or there is only one.
    """
    if not isinstance(e, HSDPConfig):
        return 1
    copies = e.replicas if e.replicas is not None else nodes
    got = f"engine.replicas={copies}" if e.replicas is not None else f"one copy per node = {copies}"
    if copies < 2:
        raise UserError(f"engine=hsdp, {got}: hybrid sharding needs at least 2 copies; give engine.replicas=N, or use engine=fsdp")
    if dp % copies:
        raise UserError(f"engine=hsdp, {got}: does not divide the data-parallel size {dp}; "
                        f"allowed: {[n for n in range(2, dp + 1) if dp % n == 0]}")  # fmt: skip
    return copies


def check_reduction(e: Any, dp: int) -> None:
    """Refuse a choice of when to reduce where nothing is reduced."""
    if getattr(e, "reduce_every_microbatch", False) and dp == 1:
        raise UserError(f"engine.reduce_every_microbatch=true has no effect with engine={e.name} on one data-parallel rank; leave "
                        "it out, or give more processes")  # fmt: skip


def check_engine(e: Any, precision: str, optim: Any, tp: int, pp: int, compiled: bool) -> None:
    """Refuse what an engine cannot do."""
    if isinstance(e, ZeroConfig) and pp > 1:
        raise UserError(f"engine={e.name} with parallel.pp={pp}: DeepSpeed's ZeRO counts one forward and one backward at a time; "
                        "use engine=ddp, fsdp or hsdp, or parallel.pp=1")  # fmt: skip
    if getattr(e, "bucket_mb", 1) < 1:
        raise UserError(f"engine.bucket_mb={e.bucket_mb} must be at least 1")
    if getattr(e, "persist", 0) < 0:
        raise UserError(f"engine.persist={e.persist} must not be negative")
    if isinstance(e, ZeroConfig) and find_spec("deepspeed") is None:
        raise UserError(f"engine={e.name} needs DeepSpeed, which is not installed; {INSTALL}")
    if isinstance(e, ZeroConfig) and precision == "fp64":
        raise UserError(f"precision=fp64 with engine={e.name}: DeepSpeed's master weights are fp32; use engine=ddp, fsdp or hsdp")
    if isinstance(e, Zero3Config) and compiled:
        raise UserError("train.compile=true with engine=zero3: compiled code cannot gather weights where they are used; "
                        "use engine=fsdp, or leave train.compile out")  # fmt: skip
    kernel = getattr(optim, "kernel", "torch")
    if getattr(e, "offload_optimizer", False) and kernel != "torch":
        raise UserError(f"optim.kernel={kernel} with engine.offload_optimizer=true: apex updates on the GPU, and the "
                        "state is in host memory; use optim.kernel=torch")  # fmt: skip
    if optim.name == "muon" and (tp > 1 or e.name != "ddp"):
        raise UserError(f"optim=muon needs whole matrices, which engine={e.name} with parallel.tp={tp} cuts; use engine=ddp and "
                        "parallel.tp=1, or optim=adamw")  # fmt: skip
