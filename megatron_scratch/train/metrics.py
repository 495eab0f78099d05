"""What a device can do and holds: its peak FLOP/s, of which MFU is a part, and its memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from typing import Any

import torch

from megatron_scratch.config.train import TrainConfig
from megatron_scratch.models.gemm import product

# Dense bf16 peak of one GPU in TFLOP/s (vendors' data sheets, without sparsity).
PEAK_TFLOPS = {"H100 PCIe": 756.0, "H100": 989.0, "H200": 989.0, "GH200": 989.0, "A100": 312.0, "B200": 2250.0, "L40S": 362.0}


def peak_flops(cfg: TrainConfig, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that MFU is a fraction of: as given, the GPU's data sheet, or the matmul rate that this process measures."""
    if cfg.peak_tflops is not None:
        return cfg.peak_tflops * 1e12
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = [tflops for gpu, tflops in PEAK_TFLOPS.items() if gpu in name]
        if known:
            return known[0] * 1e12
    return measured_flops(device, dtype)


def measured_flops(device: torch.device, dtype: torch.dtype, n: int = 1024, rounds: int = 12) -> float:
    """Best of a few n x n x n products by the layers' own kernel (2n^3 FLOPs each): on a CPU the only peak that means anything."""
    a = torch.ones(n, n, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(rounds):
        synchronize(device)
        start = time.perf_counter()
        product(a, a)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def synchronize(device: torch.device) -> None:
    """Wait for the device, where there is one to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def mark(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> Any:
    """This moment: of the host's clock or, on a GPU, in its stream of work, for which no host waits."""
    if device.type != "cuda":
        return clock()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(begin: Any, end: Any) -> float:
    """Seconds from one mark to another. The device has passed both."""
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000


def memory_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: allocated on the GPU, or resident of this process (Linux counts KiB)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
