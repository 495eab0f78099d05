"""Is this node fit to train on? Run on every node before the ranks are; each node writes down what it found.

`node` looks at one node by itself: GPUs that compute and hold what is written, memory, disks, versions. `network` lets nodes
add up numbers together, and times it. Both answer in a file: a sick node may be unable to answer in any other way, or at all.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_scratch.util.env import master, node_name, read_rank
from megatron_scratch.util.files import write_json
from megatron_scratch.util.machine import die_with_parent

GIB = 1 << 30
PATTERN = 1 << 20  # numbers of a written pattern; on a GPU 256 times as many
HELD = 0.1  # of a GPU's memory that may be taken before we have begun
DISK = 8 << 20  # bytes
NETWORK = {"cpu": 16 << 20, "cuda": 256 << 20}  # bytes of one all-reduce
REPEATS = 5
TIMEOUT = 60.0  # seconds for the nodes to find each other, and for one all-reduce

Problem = str  # what is wrong, or nothing


def check_compute(device: torch.device) -> Problem:
    """Products of small integers are exact in fp32 in any order of adding up: every number must be right, three times."""
    a = torch.arange(512 * 512).remainder(7).reshape(512, 512)
    b = torch.arange(512 * 512).remainder(5).reshape(512, 512)
    want = a @ b  # in int64, on the CPU: at most 512 * 6 * 4
    for _ in range(3):
        got = (a.to(device, torch.float32) @ b.to(device, torch.float32)).cpu().long()
        if wrong := int((got != want).sum()):
            return f"{wrong} of {want.numel()} numbers of a product are wrong on {device}"
    return ""


def check_pattern(device: torch.device) -> Problem:
    """What is written to memory is what is read."""
    size = PATTERN * (256 if device.type == "cuda" else 1)
    written = torch.arange(size, dtype=torch.int32, device=device)
    for flip in (0, -1):
        if wrong := int(((written ^ flip) != torch.arange(size, dtype=torch.int32, device=device) ^ flip).sum()):
            return f"{wrong} of {size} numbers are read from the memory of {device} other than they were written"
    return ""


def check_gpus(expected: int) -> Problem:
    """As many GPUs as were asked for, all of them free, right, and without errors in their own records."""
    found = torch.cuda.device_count()
    if found < expected:
        return f"{found} GPUs of {expected} can be seen"
    for number in range(expected):
        device = torch.device("cuda", number)
        free, total = torch.cuda.mem_get_info(device)
        if total - free > HELD * total:
            return f"{(total - free) / GIB:.1f} of {total / GIB:.0f} GiB of GPU {number} are taken by somebody else"
        if problem := check_compute(device) or check_pattern(device):
            return problem
    return _nvidia_smi() if expected else ""


def _nvidia_smi() -> Problem:
    query = "index,ecc.errors.uncorrected.volatile.total,clocks_event_reasons.hw_slowdown"
    if shutil.which("nvidia-smi") is None:
        return ""
    asked = subprocess.run(
        ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    for line in asked.stdout.splitlines() if asked.returncode == 0 else ():
        number, errors, slow = (word.strip() for word in line.split(","))
        if errors.isdigit() and int(errors):
            return f"GPU {number} has {errors} uncorrected memory errors"
        if slow == "Active":
            return f"GPU {number} is slowed down by its hardware (heat or power)"
    return ""


def check_disk(folder: Path) -> Problem:
    """A file is written, made durable, and read back as it was."""
    content = os.urandom(1 << 20) * (DISK >> 20)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".preflight.") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # from the disk, not from memory
            if hashlib.sha256(Path(file.name).read_bytes()).digest() != hashlib.sha256(content).digest():
                return f"{folder} gives back other bytes than were written"
    except OSError as error:
        return f"{folder}: {error.strerror}"
    return ""


def check_node(gpus: int, run: Path) -> dict[str, Any]:
    """All checks of one node; each that fails has a line."""
    cpu = torch.device("cpu")
    checks: dict[str, Callable[[], Problem]] = {
        "compute": lambda: check_compute(cpu),
        "memory": lambda: check_pattern(cpu),
        "gpus": lambda: check_gpus(gpus),
        "run directory": lambda: check_disk(run),
        "temporary directory": lambda: check_disk(Path(tempfile.gettempdir())),
    }
    found = {}
    for name, check in checks.items():
        try:
            found[name] = check()
        except Exception as error:  # whatever a broken driver raises is the answer
            found[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return {
        "problems": {name: problem for name, problem in found.items() if problem},
        "versions": {"torch": torch.__version__, "python": platform.python_version(), "cuda": torch.version.cuda or ""},
        "time": time.time(),
    }


def check_network() -> float:
    """All-reduces over one process a node: bytes that a node sends and receives a second, as ring algorithms count them."""
    rank = read_rank()
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    limit = datetime.timedelta(seconds=TIMEOUT)
    address, port = master()
    store = dist.TCPStore(address, port, rank.world, is_master=rank.rank == 0, timeout=limit)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", store=store, rank=rank.rank, world_size=rank.world, timeout=limit)
    numbers = torch.ones(NETWORK[kind] // 4, device=kind)
    seconds = []
    for _ in range(REPEATS):
        numbers.fill_(rank.rank + 1)
        started = time.perf_counter()
        dist.all_reduce(numbers)
        total = float(numbers.min()), float(numbers.max())  # waits for the device, too
        seconds.append(time.perf_counter() - started)
        if total != (rank.world * (rank.world + 1) / 2,) * 2:
            raise RuntimeError(f"a sum over {rank.world} nodes came to {total}")
    return NETWORK[kind] * 2 * (rank.world - 1) / rank.world / sorted(seconds)[REPEATS // 2]


def main() -> None:
    """`python -m megatron_scratch.train.preflight node|network --report FOLDER ...`"""
    die_with_parent()
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("node", "network"))
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--run", type=Path)
    args = parser.parse_args()
    if args.what == "node":
        report = check_node(args.gpus, args.run)
    else:
        report = {"bytes_per_second": check_network()}
    write_json(args.report / f"{node_name()}.json", report)


if __name__ == "__main__":
    from megatron_scratch.util.exits import leave_with

    leave_with(lambda: main() or 0)
