"""The `optim` and `schedule` sections: one dataclass per entry, so that a key that an entry does not use is refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Optional

from megatron_scratch.util.errors import UserError, choice


@dataclass
class ParamGroup:
    """Parameters whose global name matches a regular expression (`re.search`) get these settings; the first match wins."""

    pattern: str = ""
    lr_scale: float = 1.0
    weight_decay: Optional[float] = None  # None: the optimizer's


def default_groups() -> list[ParamGroup]:
    return [ParamGroup(pattern=r"norm|bias$|embed|position", weight_decay=0.0)]


@dataclass
class OptimConfig:
    """What every optimizer takes."""

    name: str = "adamw"
    lr: float = 3e-4
    weight_decay: float = 0.1
    clip_grad_norm: float = 1.0  # 0: the norm is measured but nothing is clipped
    groups: list[ParamGroup] = field(default_factory=default_groups)


@dataclass
class AdamWConfig(OptimConfig):
    """Decoupled weight decay Adam (Loshchilov & Hutter, arXiv 1711.05101)."""

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    kernel: str = "torch"  # torch | apex (FusedAdam) | auto: apex where it is installed and there is a GPU, else torch


@dataclass
class SGDConfig(OptimConfig):
    """Stochastic gradient descent with momentum."""

    name: str = "sgd"
    momentum: float = 0.9
    nesterov: bool = False


@dataclass
class LionConfig(OptimConfig):
    """Sign of an interpolated momentum (Chen et al., arXiv 2302.06675). Wants about 1/5 of AdamW's lr, 3-5x its decay."""

    name: str = "lion"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)


@dataclass
class MuonConfig(OptimConfig):
    """Orthogonalised momentum (Newton-Schulz) on hidden matrices, AdamW on embeddings, head, norms and biases.

    The update is scaled by 0.2 sqrt(max(rows, columns)), so that AdamW's lr and decay carry over (arXiv 2502.16982).
    """

    name: str = "muon"
    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    betas: tuple[float, float] = (0.9, 0.95)  # of the AdamW part
    eps: float = 1e-8  # of the AdamW part


@dataclass
class ScheduleConfig:
    """Learning rate over steps, as a multiple of `optim.lr`; a linear warm-up comes first. `constant` is no more than this."""

    name: str = "constant"
    warmup_steps: int = 0


@dataclass
class FloorConfig(ScheduleConfig):
    """Falls to a floor, but has no end: inverse_sqrt."""

    name: str = "inverse_sqrt"
    min_lr_ratio: float = 0.1  # the floor, as a part of optim.lr


@dataclass
class DecayConfig(FloorConfig):
    """Falls to a floor by a given step: linear, cosine."""

    name: str = "cosine"
    steps: Optional[int] = None  # length of the schedule; None: train.steps


@dataclass
class WSDConfig(DecayConfig):
    """Warm-up, stable, decay (arXiv 2404.06395): constant, then down over the last `decay_ratio` of the steps."""

    name: str = "wsd"
    decay_ratio: float = 0.2
    decay: str = "linear"  # linear | sqrt (1 - sqrt(x), arXiv 2405.18392) | cosine


def schedule_steps(s: ScheduleConfig, train_steps: int) -> int:
    """Length of the schedule in steps."""
    return getattr(s, "steps", None) or train_steps


APEX_EXTENSIONS = {"optim.kernel": "amp_C", "model.norm_kernel": "fused_layer_norm_cuda"}  # compiled; apex imports them late


def use_apex(key: str, kernel: str, device: str = "cuda", dtype: str = "") -> bool:
    """Whether to use NVIDIA's apex: the one place that decides, for all its kernels. Without importing apex, or torch with it.

    Args:
        key: the setting, one of `APEX_EXTENSIONS`; `kernel` is its value.
        device: type of the device that computes.
        dtype: of the master weights, as torch spells it.

    Raises:
        UserError: apex is asked for and cannot be used. Only `auto` does without it silently.
    """
    choice(key, kernel, ("torch", "apex", "auto"))
    if kernel == "torch":
        return False
    problem = _apex_problem(APEX_EXTENSIONS[key])
    if not problem and device != "cuda":
        problem = f"apex computes on CUDA devices only, and this process has {device}"
    if not problem and dtype == "torch.float64":
        problem = "apex has no kernels for precision=fp64"
    if problem and kernel == "apex":
        raise UserError(f"{key}=apex: {problem}; or use {key}=torch, or {key}=auto, which takes apex where it can")
    return not problem


def _apex_problem(extension: str) -> str:
    """What is wrong with the installed apex and where to get the right one, or nothing."""
    spec = find_spec("apex")
    folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
    if spec is None:
        problem = "apex is not installed"
    elif not any((folder / "optimizers").is_dir() and (folder / "normalization").is_dir() for folder in folders):
        problem = "the installed apex is not NVIDIA's: it has no apex.optimizers and apex.normalization"
    elif find_spec(extension) is None and not any(_libraries(folder, extension) for folder in folders):
        problem = f"the installed apex was built without its CUDA extensions ({extension} is missing)"
    else:
        return ""
    return (f"{problem}; take NVIDIA's (PyPI's apex is another package) from NGC's PyTorch image, or build the sources at "
            "github.com/NVIDIA/apex with --cpp_ext --cuda_ext")  # fmt: skip


def _libraries(apex: Path, extension: str) -> list[Path]:
    """The files of a compiled extension, where a recent apex looks for them (apex/_custom_ops.py); before, it was a module."""
    return [found for place in (apex / "_extensions", apex, apex.parent) for found in place.glob(f"_{extension}*.so")]


def check_optim(o: Any) -> None:
    if o.lr <= 0:
        raise UserError(f"optim.lr={o.lr} must be above 0")
    if o.weight_decay < 0 or o.clip_grad_norm < 0:
        raise UserError(f"optim.weight_decay={o.weight_decay} and optim.clip_grad_norm={o.clip_grad_norm} must not be negative")
    if hasattr(o, "betas") and not all(0 <= b < 1 for b in o.betas):
        raise UserError(f"optim.betas={list(o.betas)} must both be in [0, 1)")
    if isinstance(o, AdamWConfig):
        use_apex("optim.kernel", o.kernel)


def check_schedule(s: Any, steps: int) -> None:
    if hasattr(s, "min_lr_ratio") and not 0 <= s.min_lr_ratio <= 1:
        raise UserError(f"schedule.min_lr_ratio={s.min_lr_ratio} must be in [0, 1]")
    total = schedule_steps(s, steps)
    if not 0 <= s.warmup_steps <= total:
        raise UserError(f"schedule.warmup_steps={s.warmup_steps} must be between 0 and the schedule's {total} steps")
    if hasattr(s, "decay"):
        choice("schedule.decay", s.decay, ("linear", "sqrt", "cosine"))
        if not 0 <= s.decay_ratio <= 1:
            raise UserError(f"schedule.decay_ratio={s.decay_ratio} must be in [0, 1]")
