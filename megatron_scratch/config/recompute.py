"""What backward computes again instead of keeping it: the fields `recompute*` and `offload_activations` of `parallel`."""

from __future__ import annotations

from megatron_scratch.config.model import ModelConfig
from megatron_scratch.config.train import ParallelConfig
from megatron_scratch.util.errors import UserError, choice

MODES = ("none", "full", "selective", "ops", "budget")
OWN_FIELD = {"recompute_every": "full", "recompute_save": "ops", "recompute_budget": "budget"}  # field -> the mode that reads it

# Friendly name -> operators whose results are kept. `bmm` is missing on purpose: attention by batched products masks and normalises
# its scores in place, so what was kept would be overwritten.
OPERATORS = {
    "attention": (
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
    ),
    "matmul": ("aten::mm", "aten::addmm", "aten::_scaled_mm", "megatron_scratch::onednn"),
}
FUSED = ("sdpa", "flex", "flash_attn")  # attention whose kernels keep no probabilities (sdpa: with dropout on a CPU it does)


def check_recompute(p: ParallelConfig, m: ModelConfig, engine: str, compiled: bool) -> None:
    """Refuse what is not known, what cannot take effect, and what does not work together."""
    choice("parallel.recompute", p.recompute, MODES)
    for key, mode in OWN_FIELD.items():
        if getattr(p, key) != getattr(ParallelConfig(), key) and p.recompute != mode:
            raise UserError(f"parallel.{key}={getattr(p, key)} has no effect with parallel.recompute={p.recompute}; "
                            f"leave it out, or give parallel.recompute={mode}")  # fmt: skip
    _check_full(p, m)
    _check_selective(p, m)
    _check_ops(p, m, engine)
    _check_compiled(p, m, compiled)
    if p.recompute == "budget" and (p.recompute_budget is None or not 0.0 < p.recompute_budget < 1.0):
        raise UserError(f"parallel.recompute_budget={p.recompute_budget} with parallel.recompute=budget; give the part of the "
                        "activations that is kept, above 0 and below 1")  # fmt: skip


def _check_full(p: ParallelConfig, m: ModelConfig) -> None:
    if not 1 <= p.recompute_every <= m.num_layers:
        raise UserError(f"parallel.recompute_every={p.recompute_every}: every n-th of model.num_layers={m.num_layers} layers is "
                        f"computed again; allowed: 1 to {m.num_layers}")  # fmt: skip


def _check_selective(p: ParallelConfig, m: ModelConfig) -> None:
    if p.recompute == "selective" and m.attention in FUSED and (m.dropout == 0.0 or m.attention != "sdpa"):
        raise UserError(f"parallel.recompute=selective has no effect with model.attention={m.attention}, which keeps no "
                        "probabilities; use parallel.recompute=full or budget, or leave it out")  # fmt: skip


def _check_compiled(p: ParallelConfig, m: ModelConfig, compiled: bool) -> None:
    if compiled and p.offload_activations:
        raise UserError("parallel.offload_activations=true with train.compile=true: compiled code wants what it kept back in the "
                        "very layout it had; leave one of them out")  # fmt: skip
    if compiled and p.recompute == "ops" and (p.tp > 1 or m.dropout > 0):
        raise UserError(f"parallel.recompute=ops with train.compile=true, parallel.tp={p.tp} and model.dropout={m.dropout}: "
                        "messages and dropout cut a layer into pieces whose operators are out of sight; use "
                        "parallel.recompute=full or selective, or leave train.compile out")  # fmt: skip


def _check_ops(p: ParallelConfig, m: ModelConfig, engine: str) -> None:
    if p.recompute != "ops":
        return
    for name in p.recompute_save:
        choice("parallel.recompute_save", name, OPERATORS)
    if not p.recompute_save:
        raise UserError("parallel.recompute=ops keeps what parallel.recompute_save names, which is empty; "
                        f"give some of: {', '.join(OPERATORS)}, or parallel.recompute=full to keep nothing")  # fmt: skip
    if "attention" in p.recompute_save and m.attention != "sdpa":
        raise UserError(f"parallel.recompute_save=[attention] keeps what torch's own kernels return, got model.attention="
                        f"{m.attention}; use model.attention=sdpa, or parallel.recompute_save=[matmul]")  # fmt: skip
    if engine == "zero3":
        raise UserError("parallel.recompute=ops with engine=zero3: DeepSpeed's gathers are operators too, and others in backward "
                        "than in forward; use parallel.recompute=full or selective, or engine=fsdp")  # fmt: skip
    if p.offload_activations:
        raise UserError("parallel.offload_activations=true with parallel.recompute=ops: what the operators keep cannot be moved to "
                        "the host; use parallel.recompute=none, full, selective or budget")  # fmt: skip
