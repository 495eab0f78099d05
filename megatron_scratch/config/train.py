"""The sections about the run itself: `train`, `parallel`, `checkpoint`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from megatron_scratch.config.model import VOCAB_MULTIPLE, ModelConfig
from megatron_scratch.config.profile import ProfileConfig
from megatron_scratch.config.remote import check_url
from megatron_scratch.config.samples import SamplesConfig
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
    layers_every: int = 0  # steps between rows of layers.jsonl, statistics of each layer; 0: none
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    z_loss: float = 0.0  # weight of log(Z)^2, which keeps logits from drifting (PaLM, arXiv 2204.02311: 1e-4)
    compile: bool = False  # torch.compile, block by block
    canonical_reduction: bool = False  # dp 1, 2, 4, ... give the same bits, at a price: docs/resuming.md
    threads: Optional[int] = None  # CPU threads per process; None: the machine's cores / processes on it (canonical_reduction: 1)
    peak_tflops: Optional[float] = None  # denominator of MFU; None: the GPU's dense bf16 peak, or this CPU's measured matmul


@dataclass
class ParallelConfig:
    """Degrees of the layout. Data parallelism is what is left of the world."""

    tp: int = 1
    sequence_parallel: Optional[bool] = None  # between tensor-parallel layers a rank keeps 1/tp of the tokens; None: with tp > 1
    overlap: bool = False  # tp messages of backward travel while matrices are multiplied; the same bits, see docs/parallel.md
    pp: int = 1
    schedule: str = "1f1b"  # of the pipeline: an entry of config/pipeline.py
    virtual_stages: Optional[int] = None  # stages on each pipeline rank; None: what the schedule needs, 1 or 2
    stages: Optional[list[int]] = None  # layers of each stage, first to last; None: balanced by cost
    cp: int = 1
    ep: int = 1
    recompute: str = "none"  # none | full | selective | ops | budget: what backward computes again instead of keeping it
    recompute_every: int = 1  # full: every n-th layer
    recompute_save: list[str] = field(default_factory=list)  # ops: whose results are kept: attention, matmul
    recompute_budget: Optional[float] = None  # budget: the part of the activations that is kept, 0 to 1
    offload_activations: bool = False  # what is kept for backward waits in host memory


@dataclass
class CheckpointConfig:
    """Checkpoints are folders `checkpoints/step_XXXXXXXX`, committed by one rename."""

    every: int = 0  # steps; 0: only at the end and when stopped
    keep_last: int = 2  # newest ones kept; 0: all
    keep_every: int = 0  # steps that are kept for ever; 0: none
    async_save: bool = False  # training goes on while another process writes; costs memory for one copy of this rank's share
    resume: str = "auto"  # auto: the newest in the run directory | never | PATH of a run or of one checkpoint
    remote: Optional[str] = None  # s3://bucket/prefix, gs://..., file:///...: checkpoints are brought there beside training


@dataclass
class BenchConfig:
    """`bench`: real steps on made-up tokens."""

    steps: int = 10
    warmup: int = 3


@dataclass
class ParityConfig:
    """`parity`: the config, shrunk, under its layout and in one process."""

    steps: int = 3


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


def check_canonical(t: TrainConfig, p: ParallelConfig, engine: str, dp: int) -> None:
    """Refuse where sums cannot have one order."""
    if not t.canonical_reduction:
        return
    if engine != "ddp":
        raise UserError(f"train.canonical_reduction=true with engine={engine}, which adds gradients up in an order of its own; "
                        "use engine=ddp")  # fmt: skip
    if p.pp > 1:
        raise UserError(f"train.canonical_reduction=true with parallel.pp={p.pp}: a schedule adds gradients up in an order of its "
                        "own; use parallel.pp=1")  # fmt: skip
    if dp & (dp - 1):
        near = [2 ** (dp.bit_length() - 1), 2 ** dp.bit_length()]
        raise UserError(f"train.canonical_reduction=true on {dp} data-parallel ranks, which are no subtrees of a binary tree; "
                        f"nearest that are: {', '.join(str(n * p.tp) for n in near)} processes")  # fmt: skip


def microbatches(t: TrainConfig, dp: int) -> dict[str, int]:
    """Microbatches of a step on a data-parallel rank, by the key that they come from: with a ramp, the fewest and each size."""
    unit = t.micro_batch_size * dp
    out = {f"train.global_batch_size={t.global_batch_size}": t.global_batch_size // unit}
    if t.ramp.start is not None:
        sizes = range(t.ramp.start, t.global_batch_size, t.ramp.increment)
        out |= {f"train.ramp at a batch of {size}": size // unit for size in sizes}
    return out


def check_parallel(p: ParallelConfig) -> None:
    """Degrees that this version has, and options that can take effect."""
    for key in ("tp", "pp"):
        if getattr(p, key) < 1:
            raise UserError(f"parallel.{key}={getattr(p, key)} must be at least 1")
    if p.virtual_stages is not None and p.virtual_stages < 1:
        raise UserError(f"parallel.virtual_stages={p.virtual_stages} must be at least 1, or null for what the schedule needs")
    for axis, word in {"cp": "context", "ep": "expert"}.items():
        if getattr(p, axis) != 1:
            raise UserError(f"parallel.{axis}={getattr(p, axis)}: {word} parallelism is not in this version; allowed: 1")
    if p.tp == 1:
        for key, on in (("sequence_parallel", p.sequence_parallel), ("overlap", p.overlap)):
            if on:
                raise UserError(f"parallel.{key}=true has no effect with parallel.tp=1; leave it out, or give parallel.tp=N")


def check_tensor(m: ModelConfig, t: TrainConfig, p: ParallelConfig) -> None:
    """Refuse a model that does not divide over tp; the vocabulary always does, as it is padded to a multiple of 128."""
    tp = p.tp
    if VOCAB_MULTIPLE % tp:
        fit = [n for n in range(1, VOCAB_MULTIPLE + 1) if VOCAB_MULTIPLE % n == 0]
        raise UserError(
            f"parallel.tp={tp} does not divide {VOCAB_MULTIPLE}, to whose multiples vocabularies are padded; allowed: {fit}"
        )
    for key, size in (("num_heads", m.num_heads), ("ffn_size", m.ffn)):
        if size % tp:
            raise UserError(f"model.{key}={size} is not divisible by parallel.tp={tp}; nearest that are: "
                            f"{', '.join(str(n) for n in (size // tp * tp, (size // tp + 1) * tp) if n)}")  # fmt: skip
    if m.kv_heads % tp and tp % m.kv_heads:
        raise UserError(f"model.num_kv_heads={m.kv_heads} and parallel.tp={tp}: one must divide the other (heads are dealt out, or "
                        "each is copied to several ranks)")  # fmt: skip
    if tp > m.kv_heads and m.fused_qkv:
        raise UserError(f"parallel.tp={tp} is more than model.num_kv_heads={m.kv_heads}: key/value heads are then copied to "
                        "several ranks, which the fused weight cannot be; give model.fused_qkv=false")  # fmt: skip
    tokens = t.micro_batch_size * t.seq_len
    if p.sequence_parallel is not False and tokens % tp:
        raise UserError(f"train.micro_batch_size={t.micro_batch_size} x train.seq_len={t.seq_len} = {tokens} tokens are not "
                        f"divisible by parallel.tp={tp}; change one, or give parallel.sequence_parallel=false")  # fmt: skip


def check_checkpoint(c: CheckpointConfig) -> None:
    for key in ("every", "keep_last", "keep_every"):
        if getattr(c, key) < 0:
            raise UserError(f"checkpoint.{key}={getattr(c, key)} must not be negative")
    if c.async_save and not c.every:
        raise UserError("checkpoint.async_save=true has no effect with checkpoint.every=0, as the save at the end is waited for; "
                        "give checkpoint.every=N, or leave it out")  # fmt: skip
    if c.remote is not None:
        check_url("checkpoint.remote", c.remote)
