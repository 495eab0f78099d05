"""The parity matrix as data: every combination of layout, engine, model, accumulation and sequence parallelism."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import product

from megatron_scratch.config import Config, compose
from megatron_scratch.config.shrink import shrink, small_world, vet
from megatron_scratch.train import parity

STEPS = 2
ENGINES = ("ddp", "fsdp", "hsdp", "zero1", "zero2", "zero3")
MODELS = {
    "gpt2": ["model=gpt2_tiny", "model.tie_embeddings=true"],
    "gpt2_untied": ["model=gpt2_tiny", "model.tie_embeddings=false"],
    "llama": ["model=llama_tiny", "model.tie_embeddings=false"],
    "llama_tied": ["model=llama_tiny", "model.tie_embeddings=true"],
    "scratch": ["model=scratch_tiny", "model.tie_embeddings=false"],
    "scratch_tied": ["model=scratch_tiny", "model.tie_embeddings=true"],
}


@dataclass(frozen=True)
class Cell:
    tp: int
    engine: str
    model: str
    accumulation: int
    sequence_parallel: bool

    def __str__(self) -> str:
        return f"tp{self.tp}-{self.engine}-{self.model}-accumulate{self.accumulation}-{'sp' if self.sequence_parallel else 'plain'}"

    @property
    def precision(self) -> str:
        """fp64 shows errors of logic that fp32's tolerance could hide; DeepSpeed's masters are fp32."""
        return "fp32" if self.engine.startswith("zero") else "fp64"

    def config(self, *more: str) -> Config:
        dp = 4 if self.engine == "hsdp" else 2
        words = [*MODELS[self.model], f"parallel.tp={self.tp}", f"engine={self.engine}", f"precision={self.precision}",
                 "train.micro_batch_size=2", f"train.global_batch_size={2 * dp * self.accumulation}",
                 f"parallel.sequence_parallel={str(self.sequence_parallel).lower()}"]  # fmt: skip
        words += ["engine.replicas=2"] if self.engine == "hsdp" else []
        words += ["model.fused_qkv=false"] if self.model.startswith("llama") and self.tp > 2 else []
        cfg = compose.load([*words, *more])
        cfg.launcher.processes = dp * self.tp
        return cfg


CELLS = [Cell(*values) for values in product((1, 2, 4), ENGINES, MODELS, (1, 4), (True, False))]


def covering() -> set[Cell]:
    """Every (tp, engine) once, with the other choices dealt out so that each meets each engine and each tp; legal ones only."""
    names, chosen = list(MODELS), set()
    for (r, tp), (e, engine) in product(enumerate((1, 2, 4)), enumerate(ENGINES)):
        chosen.add(Cell(tp, engine, names[(e + r) % len(names)], (1, 4)[(e + r) % 2], tp > 1 and (e + r + e // 2) % 2 == 0))
    return chosen


class References:
    """The run of one process, computed once for all layouts that are compared with it."""

    def __init__(self) -> None:
        self.known: dict[str, list[parity.Trace]] = {}

    def __call__(self, small: Config) -> list[parity.Trace]:
        one = parity.single(small)
        key = json.dumps([asdict(part) for part in (one.model, one.train, one.precision, one.optim)], default=str)
        if key not in self.known:
            self.known[key] = parity.reference(small, STEPS)
        return self.known[key]


def compare(cfg: Config, references: References) -> list[parity.Row]:
    """Vet, shrink and compare a config as the verb does."""
    world = small_world(cfg)
    vet(cfg, world)
    small, _ = parity.comparable(shrink(cfg, world))
    return parity.compare(small, world, STEPS, references(small))
