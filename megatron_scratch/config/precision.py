"""The `precision` section: the dtype that layers compute in, and what goes with it. See docs/precision.md."""

from __future__ import annotations

from dataclasses import dataclass, fields
from importlib.util import find_spec

from megatron_scratch.config.model import ModelConfig
from megatron_scratch.config.pipeline import schedule_of
from megatron_scratch.config.train import ParallelConfig
from megatron_scratch.util.errors import UserError, choice

GRADIENTS = ("fp32", "bf16")
RECIPES = ("tensorwise", "rowwise")
TILE = 16  # sizes of fp8 products have to be multiples of it (torch._scaled_mm)


@dataclass
class PrecisionConfig:
    """fp32, fp64: everything. bf16, fp16: compute; fp32 master weights, gradients, reductions, norm statistics, softmax and loss.
    fp8: as bf16, with the products of the layers in fp8. fp64 finds errors of logic that rounding hides."""

    name: str = "fp32"
    gradients: str = "fp32"  # bf16, fp8: dtype in which gradients are added up over microbatches and over dp: fp32 | bf16
    scale: float = 65536.0  # fp16: what the loss is multiplied by at first, so that small gradients are not rounded to 0
    growth_interval: int = 2000  # fp16: steps without overflow after which the scale grows
    growth: float = 2.0  # fp16: by so much
    backoff: float = 0.5  # fp16: what the scale is multiplied by when a step overflows, and is skipped
    min_scale: float = 1.0  # fp16: a step that overflows under this scale ends the run
    recipe: str = "tensorwise"  # fp8: one scale per tensor | rowwise: one per row, more exact and slower


SETTINGS = {
    "bf16": ("gradients",),
    "fp16": ("scale", "growth_interval", "growth", "backoff", "min_scale"),
    "fp8": ("gradients", "recipe"),
}


# What is computed and kept in fp32 (fp64 in fp64) whatever the dtype of the activations; docs/precision.md says where and why, and
# tests/unit/test_precision.py has a proof of each.
FP32 = ("master weights", "optimizer state", "gradients", "gradient norm", "norm statistics", "softmax of attention",
        "rotary angles", "loss")  # fmt: skip


def takes(p: PrecisionConfig, setting: str) -> bool:
    """Whether a setting means anything in this precision."""
    return setting in SETTINGS.get(p.name, ())


def check_precision(p: PrecisionConfig, engine: str, dp: int, parallel: ParallelConfig, m: ModelConfig, tokens: int) -> None:
    """Refuse settings without effect, and what a precision cannot do. `tokens` of a microbatch on one rank."""
    choice("precision.gradients", p.gradients, GRADIENTS)
    choice("precision.recipe", p.recipe, RECIPES)
    for field in fields(p):
        if field.name != "name" and getattr(p, field.name) != field.default and not takes(p, field.name):
            owners = ", ".join(name for name, settings in SETTINGS.items() if field.name in settings)
            raise UserError(f"precision.{field.name}={getattr(p, field.name)} has no effect with precision={p.name}; leave it out, "
                            f"or use one of: {owners}")  # fmt: skip
    if p.gradients == "bf16":
        _check_gradients(p, engine, dp)
    if takes(p, "scale"):
        _check_scale(p, engine)
    if takes(p, "recipe"):
        _check_fp8(engine, parallel, m, tokens)


def _check_gradients(p: PrecisionConfig, engine: str, dp: int) -> None:
    got = f"precision.gradients={p.gradients} with engine={engine}"
    if engine == "ddp":
        raise UserError(f"{got}: its gradients have the dtype of the fp32 masters; use engine=fsdp, hsdp, zero1, zero2 or zero3, "
                        "or leave it out")  # fmt: skip
    if dp == 1 and not engine.startswith("zero"):
        raise UserError(f"{got} has no effect on one data-parallel rank, which cuts and reduces nothing; leave it out")


def _check_scale(p: PrecisionConfig, engine: str) -> None:
    if engine.startswith("zero"):
        raise UserError(f"precision={p.name} with engine={engine}: DeepSpeed scales the loss by rules of its own; "
                        "use precision=bf16, or engine=ddp, fsdp or hsdp")  # fmt: skip
    if not 0 < p.min_scale <= p.scale < float("inf"):
        raise UserError(f"precision.min_scale={p.min_scale} and precision.scale={p.scale} must be finite and above 0, "
                        "the first at most the second")  # fmt: skip
    if not (p.growth > 1 and 0 < p.backoff < 1 and p.growth_interval >= 1):
        raise UserError(f"precision.growth={p.growth}, backoff={p.backoff}, growth_interval={p.growth_interval} must be above 1, "
                        "between 0 and 1, and at least 1")  # fmt: skip


def _check_fp8(engine: str, parallel: ParallelConfig, m: ModelConfig, tokens: int) -> None:
    if find_spec("torchao") is None:
        raise UserError("precision=fp8 needs torchao, which is not installed; pip install -c constraints.txt -e '.[fp8]', or use "
                        "precision=bf16")  # fmt: skip
    if parallel.tp > 1:
        raise UserError(f"precision=fp8 with parallel.tp={parallel.tp}: a rank would scale by the largest number of its part of a "
                        "matrix, and the numbers depend on the layout; use engine=fsdp, or precision=bf16")  # fmt: skip
    if parallel.pp > 1 and schedule_of(parallel).splits:
        raise UserError(f"precision=fp8 with parallel.schedule={parallel.schedule}: torchao computes both gradients at once, which "
                        "this schedule parts; use parallel.schedule=interleaved_1f1b, or precision=bf16")  # fmt: skip
    if engine.startswith("zero"):
        raise UserError(f"precision=fp8 with engine={engine}: torchao's products are not proved right on weights that DeepSpeed "
                        "moves; use engine=ddp, fsdp or hsdp, or precision=bf16")  # fmt: skip
    sizes = {"model.hidden_size": m.hidden_size, "queries: model.num_heads x head size": m.num_heads * m.head_size,
             "keys: model.num_kv_heads x head size": m.kv_heads * m.head_size, "model.ffn_size": m.ffn,
             "train.micro_batch_size x train.seq_len": tokens}  # fmt: skip
    for what, size in sizes.items():
        if size % TILE:
            raise UserError(f"precision=fp8: {what} = {size} is not a multiple of {TILE}, which fp8 products need; change it, or "
                            "use precision=bf16")  # fmt: skip
