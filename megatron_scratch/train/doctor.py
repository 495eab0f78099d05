"""`doctor`: what is on this machine, and whether what is fast here is also right."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from shutil import which

import torch
import torch.nn.functional as F

from megatron_scratch import registry
from megatron_scratch.config.attention import CAPABLE
from megatron_scratch.config.optim import use_apex
from megatron_scratch.models.attend import Backend, chosen, make_mask
from megatron_scratch.models.attend_check import ALLOWED, CASES, Case, multiple, worst
from megatron_scratch.models.attend_flash import choose
from megatron_scratch.models.gemm import linear
from megatron_scratch.models.norms import apex_rms_norm, rms_norm
from megatron_scratch.util.errors import UserError

PACKAGES = {"deepspeed": ("deepspeed",), "flash-attn": ("flash-attn", "flash-attn-3", "flash-attn-4"), "torchao": ("torchao",),
            "transformers": ("transformers",), "wandb": ("wandb",)}  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Check:
    """Something that is to be right here, in some precisions. `error` gives its error as a multiple of plain PyTorch's."""

    name: str
    error: Callable[[torch.dtype], float]
    precisions: tuple[str, ...]
    note: str = ""  # what is not checked
    missing: str = ""  # why it cannot be checked here

    def run(self) -> tuple[str, bool]:
        """A line, and whether it is right (or not here)."""
        if self.missing:
            return f"  {self.name:<24}not here: {self.missing}", True
        found, right = [], True
        for precision in self.precisions:
            try:
                error = self.error(DTYPES[precision])
                right, text = right and error <= ALLOWED, f"{error:.2f}"
            except Exception as problem:  # whatever a broken package raises is the finding
                right, text = False, " ".join(f"{type(problem).__name__}: {problem}".split())[:120]
            found.append(f"{precision} {text}")
        return f"  {self.name:<24}{'  '.join(found)}  {'ok' if right else 'FAIL'}{self.note}", right


def doctor(say: Callable[[str], None]) -> bool:
    """Say a screenful, line by line (a compiled kernel takes its time), and give whether every check passed."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    for line in _machine():
        say(line)
    say("")
    say(
        f"checks on {device.type}: worst error of outputs and gradients, as a multiple of plain PyTorch's; right: up to {ALLOWED:g}"
    )
    verdicts = []
    for check in (*_attention(device), *_layers(device)):
        line, right = check.run()
        say(line)
        verdicts.append(right)
    for line in _auto(device):
        say(line)
    return all(verdicts)


def _machine() -> Iterator[str]:
    yield f"{'python':<14}{platform.python_version()}, {platform.platform()}"
    yield f"{'torch':<14}{torch.__version__}"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    cpu = f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    yield f"{'devices':<14}{', '.join(gpus) or 'no GPU'}; {cpu}"
    for name, distributions in PACKAGES.items():
        found = [version for version in map(_version, distributions) if version]
        yield f"{name:<14}{', '.join(found) or 'not installed'}"
    yield f"{'apex':<14}{_apex() or 'ready'}"


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _apex() -> str:
    """Why NVIDIA's apex cannot be used for norms here, or nothing."""
    try:
        use_apex("model.norm_kernel", "apex", "cuda" if torch.cuda.is_available() else "cpu")
    except UserError as error:
        return str(error).partition("apex: ")[2].partition(";")[0]
    return ""


def _attention(device: torch.device) -> Iterator[Check]:
    for name, able in CAPABLE.items():
        backward = device.type != "cpu" or able.cpu_backward
        cases = CASES if name != "flex" else CASES[3:4]  # each compiles a kernel, which takes seconds
        missing = choose(device, torch.bfloat16)[1].partition(";")[0] if name == "flash_attn" else ""
        if name == "flex" and device.type == "cpu" and which("g++") is None:
            missing = "torch.compile needs g++"
        precisions = tuple(p for p in _precisions(device) if p in able.dtypes)
        error = partial(_attention_error, name, cases, device, backward)
        yield Check(f"attention {name}", error, precisions, "" if backward else ", forward only", missing)


def _precisions(device: torch.device) -> tuple[str, ...]:
    return ("fp32", "bf16", "fp16") if device.type == "cuda" else ("fp32", "bf16")


def _attention_error(name: str, cases: tuple[Case, ...], device: torch.device, backward: bool, dtype: torch.dtype) -> float:
    found = []
    for case in cases:
        torch.compiler.reset()  # after 8 versions of a kernel torch.compile gives up on it
        found.append(worst(registry.get("attention", name), case, dtype, device, backward))
    return max(found)


def _layers(device: torch.device) -> Iterator[Check]:
    """The other fast paths. Weights are numbers that bf16 has: their rounding is not the kernels' error."""
    g = torch.Generator().manual_seed(0)
    x, weight, bias, grad = (
        torch.randn(s, generator=g).bfloat16().float().to(device) for s in ((96, 384), (160, 384), (160,), (96, 160))
    )
    scale, grad_x = (torch.randn(s, generator=g).bfloat16().float().to(device) for s in ((384,), (96, 384)))

    def plain_norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], w.to(x.dtype), 1e-5)

    precisions = _precisions(device)
    yield Check("linear", partial(_layer_error, linear, F.linear, (x, weight, bias), grad), precisions)
    for name, norm, missing in (("rms_norm", rms_norm, ""), ("rms_norm by apex", apex_rms_norm, _apex())):
        fast = partial(norm, eps=1e-5)
        yield Check(name, partial(_layer_error, fast, plain_norm, (x, scale), grad_x), precisions, missing=missing)


def _layer_error(fast: Backend, plain: Backend, leaves: tuple[torch.Tensor, ...], grad: torch.Tensor, dtype: torch.dtype) -> float:
    def run(layer: Backend, to: torch.dtype) -> list[torch.Tensor]:
        inputs = [t.to(dtype).to(to).requires_grad_() for t in leaves]
        y = layer(*inputs)
        return [y.detach(), *torch.autograd.grad(y, inputs, grad.to(dtype).to(to))]

    outputs = zip(run(fast, dtype), run(plain, dtype), run(plain, torch.float64), strict=True)
    return max(multiple(*output, grad) for output in outputs)


def _auto(device: torch.device) -> Iterator[str]:
    """What `model.attention=auto` takes here, for heads of 64."""
    for keys in (1024, 4096):
        mask = make_mask(keys, keys, None, None, device)
        taken = (f"{p} {chosen(device, DTYPES[p], 64, mask).__name__}" for p in _precisions(device))
        yield f"  model.attention=auto takes, at {keys} keys: {', '.join(taken)}"
