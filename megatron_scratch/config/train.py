"""The sections about the run itself: `train`, `parallel`, `engine`, `precision`, `checkpoint`, `logging`, `launcher`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from megatron_scratch.util.errors import UserError


@dataclass
class BatchRamp:
    """Grow the batch from `start` by `increment` sequences, evenly over the first `samples` sequences (GPT-3, Megatron)."""

    start: Optional[int] = None  # None: no ramp
    increment: int = 1
    samples: int = 0


@dataclass
class TrainConfig:
    """Batch sizes are in sequences. One step consumes `global_batch_size` x `seq_len` tokens, whatever the layout."""

    steps: int = 1000
    seq_len: int = 256
    global_batch_size: int = 16
    micro_batch_size: int = 16  # sequences per forward pass on one data-parallel rank
    ramp: BatchRamp = field(default_factory=BatchRamp)
    eval_every: int = 0  # 0: only at the end
    eval_batches: Optional[int] = None  # global batches per evaluation; None: the whole validation set
    log_every: int = 10
    z_loss: float = 0.0  # weight of log(Z)^2, which keeps logits from drifting (PaLM, arXiv 2204.02311: 1e-4)
    compile: bool = False  # torch.compile, block by block
    threads: Optional[int] = None  # CPU threads per process; None: the machine's cores / processes on it
    peak_tflops: Optional[float] = None  # denominator of MFU; None: the GPU's dense bf16 peak, or this CPU's measured matmul


@dataclass
class ParallelConfig:
    """Degrees of the layout. Data parallelism is what is left of the world."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1


@dataclass
class EngineConfig:
    """Who holds parameters, gradients and optimizer state, and reduces gradients."""

    name: str = "ddp"
    bucket_mb: int = 25  # gradients are all-reduced in pieces of this size while backward goes on


@dataclass
class PrecisionConfig:
    """fp32: everything. bf16: bf16 compute, fp32 master weights, gradients, reductions, norm statistics, softmax and loss."""

    name: str = "fp32"


@dataclass
class CheckpointConfig:
    """Checkpoints are folders `checkpoints/step_XXXXXXXX`, committed by one rename."""

    every: int = 0  # steps; 0: only at the end and when stopped
    keep_last: int = 2  # newest ones kept; 0: all
    keep_every: int = 0  # steps that are kept for ever; 0: none
    resume: str = "auto"  # auto: the newest in the run directory | never | PATH of a run or of one checkpoint


@dataclass
class LoggingConfig:
    """JSONL is always on; this is what a person sees."""

    name: str = "console"


@dataclass
class LauncherConfig:
    """local: this machine, as many processes as given."""

    name: str = "local"
    processes: Optional[int] = None  # None: all local GPUs, or the fewest that the layout needs


@dataclass
class BenchConfig:
    """`bench`: real steps on made-up tokens."""

    steps: int = 10
    warmup: int = 3


def check_batch(t: TrainConfig, dp: int) -> None:
    """Refuse batch sizes that cannot be cut into equal microbatches over `dp` data-parallel ranks."""
    for key in ("steps", "seq_len", "global_batch_size", "micro_batch_size", "log_every"):
        if getattr(t, key) < 1:
            raise UserError(f"train.{key}={getattr(t, key)} must be at least 1")
    sizes = [("train.global_batch_size", t.global_batch_size)]
    if t.ramp.start is None and t.ramp != BatchRamp():
        raise UserError(
            f"train.ramp has increment={t.ramp.increment} and samples={t.ramp.samples} but no start; give train.ramp.start"
        )
    if t.ramp.start is not None:
        if t.ramp.start < 1 or t.ramp.increment < 1 or t.ramp.samples < 0:
            raise UserError(f"train.ramp={{start: {t.ramp.start}, increment: {t.ramp.increment}, samples: {t.ramp.samples}}} "
                            "must have start and increment of at least 1 and samples of at least 0")  # fmt: skip
        if (t.global_batch_size - t.ramp.start) % t.ramp.increment or t.ramp.start > t.global_batch_size:
            raise UserError(f"train.ramp: from start={t.ramp.start} in increments of {t.ramp.increment} the batch never "
                            f"becomes train.global_batch_size={t.global_batch_size}")  # fmt: skip
        sizes += [("train.ramp.start", t.ramp.start), ("train.ramp.increment", t.ramp.increment)]
    unit = t.micro_batch_size * dp
    for key, size in sizes:
        if size % unit:
            near = ", ".join(str(n) for n in (size // unit * unit, (size // unit + 1) * unit) if n)
            raise UserError(f"{key}={size} is not divisible by train.micro_batch_size={t.micro_batch_size} x data-parallel size "
                            f"{dp} = {unit}; nearest that are: {near}")  # fmt: skip


def check_parallel(p: ParallelConfig) -> None:
    names = {"tp": "tensor", "pp": "pipeline", "cp": "context", "ep": "expert"}
    for axis, word in names.items():
        if getattr(p, axis) != 1:
            raise UserError(f"parallel.{axis}={getattr(p, axis)}: {word} parallelism is not in this version; allowed: 1")


def check_checkpoint(c: CheckpointConfig) -> None:
    for key in ("every", "keep_last", "keep_every"):
        if getattr(c, key) < 0:
            raise UserError(f"checkpoint.{key}={getattr(c, key)} must not be negative")
