"""The `engine` section: who holds parameters, gradients and optimizer state. One dataclass per entry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

from megatron_scratch.util.errors import UserError


@dataclass
class EngineConfig:
    """What every engine takes: nothing but its name."""

    name: str = "ddp"


@dataclass
class DDPConfig(EngineConfig):
    """Every data-parallel rank holds all of it; gradients are summed (PyTorch DistributedDataParallel)."""

    bucket_mb: int = 25  # gradients are all-reduced in pieces of this size while backward goes on


@dataclass
class FSDPConfig(EngineConfig):
    """Parameters, gradients and optimizer state cut over the data-parallel ranks (PyTorch FSDP2), gathered layer by layer."""

    name: str = "fsdp"
    reshard_after_forward: bool = True  # false: gathered weights are kept for backward: more memory, one gather less


@dataclass
class HSDPConfig(FSDPConfig):
    """FSDP inside groups of ranks, copies of the model over the groups: gathers stay inside a node."""

    name: str = "hsdp"
    replicas: Optional[int] = None  # copies of the model; None: one per node


@dataclass
class ZeroConfig(EngineConfig):
    """DeepSpeed's ZeRO (arXiv 1910.02054). 1: optimizer state is cut over the data-parallel ranks; 2: gradients too."""

    name: str = "zero1"
    bucket_mb: int = 25  # gradients are reduced in pieces of this size
    offload_optimizer: bool = False  # optimizer state and master weights live, and are updated, in host memory


@dataclass
class Zero3Config(ZeroConfig):
    """ZeRO stage 3: parameters are cut as well, and gathered where they are used."""

    name: str = "zero3"
    offload_param: bool = False  # this rank's part of the parameters lives in host memory


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


def check_engine(e: Any) -> None:
    """Refuse settings that no engine can work with."""
    if getattr(e, "bucket_mb", 1) < 1:
        raise UserError(f"engine.bucket_mb={e.bucket_mb} must be at least 1")
