"""A config made small without changing what it is made of: for proofs on a laptop of what will run on a cluster."""

from __future__ import annotations

from copy import deepcopy
from math import sqrt

from megatron_scratch.config.attention import portable
from megatron_scratch.config.engine import HSDPConfig, Zero3Config
from megatron_scratch.config.model import ModelConfig
from megatron_scratch.config.optim import ScheduleConfig
from megatron_scratch.config.pipeline import schedule_of, virtual_stages
from megatron_scratch.config.profile import ProfileConfig
from megatron_scratch.config.samples import SamplesConfig
from megatron_scratch.config.schema import Config, check
from megatron_scratch.config.train import BatchRamp, ParallelConfig, check_parallel
from megatron_scratch.util.errors import UserError

LAYERS, HEAD, RATIO, TOKENS, VOCAB = 2, 8, 4, 16, 251  # a prime vocabulary: its padding lies on some tp ranks only
MICROBATCHES, MICRO, COPIES = 4, 2, 2
MOST_STEPS = 10  # worst error in fp32 after 3, 10 and 30 steps: 3e-6, 8e-6, 6e-5


def small_world(cfg: Config) -> int:
    """Processes that show everything a layout does: its tp, pp, cp, and two data-parallel ranks (of each replica)."""
    check_parallel(cfg.parallel)
    ranks = cfg.parallel.tp * cfg.parallel.pp * cfg.parallel.cp
    given = None if cfg.launcher.processes is None else cfg.launcher.processes // ranks
    dp = COPIES * COPIES if isinstance(cfg.engine, HSDPConfig) else COPIES
    return ranks * (dp if given is None else min(given, dp))


def vet(cfg: Config, world: int) -> None:
    """Refuse what could not be trained as it is. Where the number of processes is left open, so are the batch and the copies of the
    model that have to divide it."""
    if cfg.parity.steps < 1:
        raise UserError(f"parity.steps={cfg.parity.steps} must be at least 1")
    if cfg.parity.steps > MOST_STEPS and cfg.precision.name != "fp64":
        raise UserError(f"parity.steps={cfg.parity.steps} with precision={cfg.precision.name}: rounding grows from step to step, "
                        f"and no tolerance can be derived; allowed: up to {MOST_STEPS}, or any with precision=fp64")  # fmt: skip
    if world == 1:
        raise UserError(f"launcher.processes={cfg.launcher.processes}: one process would be compared with itself; leave it out, or "
                        "give at least 2")  # fmt: skip
    probe = deepcopy(cfg)
    if cfg.launcher.processes is None:
        probe.train.global_batch_size *= world
        if isinstance(probe.engine, HSDPConfig) and probe.engine.replicas != 1:
            probe.engine.replicas = COPIES
    probe.model.attention = portable(probe.model.attention)
    probe.model.vocab_size = probe.model.vocab_size or VOCAB
    check(probe, world if cfg.launcher.processes is None else cfg.launcher.processes)


def shrink(cfg: Config, world: int) -> Config:
    """The same parts, options and layout with 2 layers, heads of 8 features, 16 tokens, at most 4 microbatches of 2 sequences.

    The data-parallel size becomes what `world` leaves; a run of one process (for comparison) then takes the same batches.
    """
    small = deepcopy(cfg)
    p, t = small.parallel, small.train
    dp = world // (p.tp * p.pp * p.cp)
    _shrink_model(small.model, p.tp, min(t.seq_len, max(TOKENS, p.tp)))
    _shrink_pipeline(small, cfg.model.num_layers)
    p.recompute_every = min(p.recompute_every, small.model.num_layers)
    if isinstance(small.engine, HSDPConfig):
        small.engine.replicas = COPIES
    was = small.launcher.processes
    old_dp = 1 if was is None else max(1, was // (p.tp * p.pp * p.cp))
    accumulation = max(1, t.global_batch_size // (t.micro_batch_size * old_dp))
    t.micro_batch_size = min(t.micro_batch_size, MICRO)
    t.global_batch_size = t.micro_batch_size * dp * min(accumulation, max(MICROBATCHES, _microbatches(p)))
    if isinstance(small.engine, Zero3Config):  # norms and biases stay whole, as before, and matrices are gathered
        small.engine.persist = min(small.engine.persist, small.model.hidden_size)
    t.seq_len, t.ramp, t.compile = small.model.max_seq_len, BatchRamp(), False
    t.layers_every, t.samples, t.profile = 0, SamplesConfig(), ProfileConfig()
    small.launcher.processes = world
    small.schedule = ScheduleConfig()
    small.model.norm_kernel, small.model.attention = "torch", portable(small.model.attention)  # a CPU has no others
    if hasattr(small.optim, "kernel"):
        small.optim.kernel = "torch"
    small.data.check_ids = True
    return small


def _shrink_pipeline(cfg: Config, layers: int) -> None:
    """A layer or two to a stage, uneven where there are enough: stages of one size hide who has which."""
    p = cfg.parallel
    stages = p.pp * virtual_stages(p)
    cfg.model.num_layers = min(layers, LAYERS if p.pp == 1 else stages + 1)
    if p.stages is not None:
        extra = p.stages.index(max(p.stages)) if cfg.model.num_layers > stages else -1
        p.stages = [1 + (number == extra) for number in range(stages)]


def _microbatches(p: ParallelConfig) -> int:
    """Enough for a schedule to reach its steady state: more than a round, and rounds of one size."""
    return 1 if p.pp == 1 else 2 * max(1, schedule_of(p).fill) * p.pp


def _shrink_model(m: ModelConfig, tp: int, seq_len: int) -> None:
    wide, ffn = m.hidden_size, m.ffn
    heads, kv = m.num_heads, m.kv_heads
    if kv % tp == 0:  # whole key/value heads to each rank: two where there are as many, or a mix-up of their order would not show
        kv_small = 2 * tp if kv % (2 * tp) == 0 else tp
        heads_small = kv_small * min(heads // kv, RATIO)
    else:  # copies of a key/value head on several ranks
        kv_small, heads_small = kv, tp
    head = min(m.head_size, HEAD)
    per_head = wide / (heads * m.head_size)  # 1 but where head_dim is chosen freely
    m.hidden_size = max(HEAD, round(heads_small * head * per_head))
    m.head_dim = head if per_head != 1 else None
    m.num_heads, m.num_kv_heads = heads_small, None if m.num_kv_heads is None else kv_small
    m.ffn_size = max(1, round(m.hidden_size * ffn / wide / tp)) * tp
    m.vocab_size = min(m.vocab_size or VOCAB, VOCAB)
    m.max_seq_len = seq_len
    m.sliding_window = None if m.sliding_window is None else min(m.sliding_window, seq_len // 2)
    m.init_std *= sqrt(wide / m.hidden_size)  # activations keep their size
