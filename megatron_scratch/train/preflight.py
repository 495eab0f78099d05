"""Is this node fit to train on? One process a node looks, before the ranks are started, and writes down what it found.

    python -m megatron_scratch.train.preflight node --report FOLDER --seconds N --config FILE
    python -m megatron_scratch.train.preflight network --report FOLDER --seconds N

`node` looks at one node by itself: GPUs that compute and hold what is written, memory, disks, versions. `network` lets nodes talk
(preflight_network.py). Both answer in the file FOLDER/NODE.json: a sick node may be unable to answer in any other way, or at all.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_scratch import __version__, registry
from megatron_scratch.checkpoint.manifest import committed
from megatron_scratch.config import Config, compose
from megatron_scratch.models import Decoder
from megatron_scratch.parallel import SINGLE
from megatron_scratch.train.preflight_network import talk
from megatron_scratch.util.env import node_name, temporary_folder
from megatron_scratch.util.files import write_json
from megatron_scratch.util.machine import die_with_parent

GIB = 1 << 30
TILE = 512  # rows and columns of the product that a large one is made of
REPEATS = {"cpu": 3, "cuda": 20}
BLOCK = {"cpu": 1 << 20, "cuda": 1 << 28}  # numbers of 4 bytes in a block of memory
CPU_BLOCKS = 16
WRITTEN = 0.8  # of a GPU's free memory is written and read back
FREE = {"gpu": 0.9, "host": 0.1}  # of the memory must be free before we begin; the host's also holds caches that others need
DISK = 8 << 20  # bytes
SMI_SECONDS = 60.0
# What nvidia-smi is asked: names of a field, the newest first (drivers before 535 say throttle for event), and what it means if the
# value is none of the FINE ones, which also stand for "this GPU does not know".
FINE = ("0", "no", "not active", "[n/a]", "n/a", "[not supported]", "")
RECORDS = (
    (("ecc.errors.uncorrected.volatile.total",), "uncorrected memory errors"),
    (("remapped_rows.failure",), "memory that it could not repair"),
    (
        ("clocks_event_reasons.hw_slowdown", "clocks_throttle_reasons.hw_slowdown"),
        "clocks slowed down by the hardware (heat or power)",
    ),
)

Problem = str  # what is wrong, or nothing


def check_compute(device: torch.device, repeat: int = 1) -> Problem:
    """Every number of a product must be right, in fp32 and on GPUs in bf16 (tensor cores), again and again.

    The factors are small and mostly zeros: every partial sum is an integer of at most 256, which also bf16 holds, so that no order
    of adding up and no rounding on the way can make a difference.

    Args:
        repeat: the product has (repeat * 512) rows and columns.
    """
    number = torch.arange(TILE * TILE).reshape(TILE, TILE)
    a, b = (number % 7 == 0) * (1 + number % 3), (number % 5 == 0) * (1 + number % 2)
    deep = min(repeat, 2)
    want = (deep * (a @ b)).repeat(repeat, repeat).to(device)  # of integers, on the CPU
    for dtype in (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,):
        left, right = a.repeat(repeat, deep).to(device, dtype), b.repeat(deep, repeat).to(device, dtype)
        for _ in range(REPEATS[device.type]):
            if wrong := int((torch.matmul(left, right) != want).sum()):
                return f"{wrong} of {want.numel()} numbers of a product in {dtype} are wrong on {device}"
    return ""


def check_memory(device: torch.device, blocks: int = CPU_BLOCKS) -> Problem:
    """What is written to memory is what is read, once all of it is written; then the same with every bit the other way round."""
    held = [_pattern(device, i) for i in range(blocks)]
    for turned in (False, True):
        for block in held if turned else ():
            block.bitwise_not_()
        wrong = sum(int(((~block if turned else block) != _pattern(device, i)).sum()) for i, block in enumerate(held))
        if wrong:
            return (
                f"{wrong} of {blocks * BLOCK[device.type]} numbers in the memory of {device} are read other than they were written"
            )
    return ""


def _pattern(device: torch.device, block: int) -> torch.Tensor:
    return torch.arange(block, block + BLOCK[device.type], dtype=torch.int32, device=device)


def check_gpus(expected: int) -> Problem:
    """As many GPUs as were asked for, all of them free, right, and without errors in their own records."""
    if not expected:
        return ""
    found = torch.cuda.device_count()
    if found < expected:
        return f"{found} of {expected} GPUs can be seen"
    return next(filter(None, map(check_gpu, range(expected))), "")


def check_gpu(number: int) -> Problem:
    """One GPU."""
    device = torch.device("cuda", number)
    free, total = torch.cuda.mem_get_info(device)
    if free < FREE["gpu"] * total:
        return f"{(total - free) / GIB:.1f} of {total / GIB:.0f} GiB of GPU {number} are taken by somebody else"
    blocks = max(1, int(WRITTEN * free) // (4 * BLOCK["cuda"]) - 2)  # less what reading takes
    problem = check_compute(device, 8) or check_memory(device, blocks)
    torch.cuda.empty_cache()
    return problem or check_records(number, str(torch.cuda.get_device_properties(device).uuid))


def check_records(number: int, uuid: str) -> Problem:
    """What nvidia-smi, where there is one, says of a GPU. A field that no driver here knows is no problem of the GPU's."""
    for fields, meaning in RECORDS if shutil.which("nvidia-smi") else ():
        value = next(filter(None, (_smi(field, uuid) for field in fields)), "")
        if value.lower() not in FINE:
            return f"GPU {number} has {meaning}: {fields[0]} is {value}"
    return ""


def _smi(field: str, uuid: str) -> str:
    """The value of one field; empty where this driver does not know it."""
    words = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    asked = subprocess.run(words, capture_output=True, text=True, check=False, timeout=SMI_SECONDS)
    return asked.stdout.strip() if asked.returncode == 0 else ""


def check_host(meminfo: Path = Path("/proc/meminfo")) -> Problem:
    """Memory of the host that is free or can be freed. What ended without cleaning up, /dev/shm above all, is not."""
    lines = (line.split() for line in meminfo.read_text(encoding="utf-8").splitlines())
    kib = {words[0].rstrip(":"): int(words[1]) for words in lines}
    if kib["MemAvailable"] < FREE["host"] * kib["MemTotal"]:
        return f"{kib['MemAvailable'] * 1024 / GIB:.1f} of {kib['MemTotal'] * 1024 / GIB:.0f} GiB are free"
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


def check_space(cfg: Config) -> Problem:
    """Room for two checkpoints, as one is deleted only when the next has been written; those that are there count. Quotas are not
    seen here."""
    missing = max(1, 2 - len(committed(Path(cfg.dir) / "checkpoints")))
    need, free = missing * checkpoint_bytes(cfg), shutil.disk_usage(cfg.dir).free
    return f"{cfg.dir} has {free / GIB:.2f} GiB left, {missing} more checkpoints take {need / GIB:.2f}" if free < need else ""


def checkpoint_bytes(cfg: Config) -> int:
    """Weights in fp32, and what the optimizer keeps for each, as one step on a small matrix shows."""
    registry.load_plugins(cfg.plugins)
    weight = torch.nn.Parameter(torch.zeros(64, 64))
    weight.grad = torch.zeros(64, 64)
    settings = replace(cfg.optim, kernel="torch") if hasattr(cfg.optim, "kernel") else cfg.optim
    group = {"params": [weight], "names": ["layers.0.mlp.up.weight"], "lr": 0.0, "lr_scale": 1.0, "weight_decay": 0.0}
    optimizer = registry.build("optim", settings, groups=[group])
    optimizer.step()
    kept = sum(t.numel() for t in optimizer.state[weight].values() if torch.is_tensor(t) and t.ndim)
    weights = sum(p.numel() for p in Decoder(cfg.model, SINGLE).parameters())  # on the meta device: 405B take a moment
    return 4 * weights * (weight.numel() + kept) // weight.numel()


def check_node(cfg: Config) -> dict[str, Any]:
    """All checks of one node: `problems` has a line for each that fails, `versions` what must be equal on all, `time` the clock."""
    cpu = torch.device("cpu")
    gpus = cfg.launcher.gpus_per_node if cfg.launcher.gpus else 0
    checks: dict[str, Callable[[], Problem]] = {
        "compute": lambda: check_compute(cpu),
        "memory": lambda: check_host() or check_memory(cpu),
        "gpus": lambda: check_gpus(gpus),
        "run directory": lambda: check_disk(Path(cfg.dir)) or check_space(cfg),
        "temporary directory": lambda: check_disk(temporary_folder()),
    }
    found = {name: _tried(check) for name, check in checks.items()}
    problems = {name: problem for name, problem in found.items() if problem}
    return {"problems": problems, "versions": _versions(gpus), "time": time.time()}


def _tried(check: Callable[[], Problem]) -> Problem:
    try:
        return check()
    except Exception as error:  # whatever a broken driver raises is the answer
        return one_line(error)


def one_line(error: BaseException) -> str:
    """An error of any kind, as the part of a line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _versions(gpus: int) -> dict[str, str]:
    gpu = _tried(lambda: torch.cuda.get_device_name(0)) if gpus else ""
    return {"megatron_scratch": __version__, "python": platform.python_version(), "torch": torch.__version__,
            "cuda": torch.version.cuda or "", "gpu": gpu}  # fmt: skip


def main() -> None:
    """See the top of the file. This process ends after so many seconds wherever it stands, and then shows where that was."""
    die_with_parent()
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("what", choices=("node", "network"))
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--seconds", type=int, required=True)
    parser.add_argument("--config", type=Path)
    args = parser.parse_args()
    faulthandler.dump_traceback_later(args.seconds, exit=True)
    me = node_name()

    def answer(report: dict[str, Any]) -> None:
        write_json(args.report / f"{me}.json", report)

    if args.what == "node":
        answer(check_node(compose.load_file(args.config)))
        return
    plan = json.loads((args.report / "plan").read_text(encoding="utf-8"))
    group = next(group for group in plan if me in group["nodes"])
    try:
        talk(group, me, answer)
    except Exception as error:  # of torch, of the network, of a driver: the answer, too
        answer({"error": one_line(error)})


if __name__ == "__main__":
    from megatron_scratch.util.exits import leave_with

    leave_with(lambda: main() or 0)
