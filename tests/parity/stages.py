"""The pipeline's part of the parity matrix as data: every combination of degree, schedule, engine, tp, recomputation and stages."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from megatron_scratch.config import Config, compose

SCHEDULES = ("gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv_zero_bubble", "dualpipev")
ENGINES = ("ddp", "fsdp", "hsdp")
RECOMPUTE = ("none", "selective", "full")
# Dropout, because what is recomputed, or sent to another rank, has to draw the same masks; tied weights lie on two stages.
MODELS = (["model=gpt2_tiny", "model.tie_embeddings=true", "model.dropout=0.1"],
          ["model=llama_tiny", "model.tie_embeddings=false"],
          ["model=llama_tiny", "model.tie_embeddings=true", "data.mask_documents=true"])  # fmt: skip


@dataclass(frozen=True)
class Cell:
    pp: int
    schedule: str
    engine: str
    tp: int
    recompute: str
    virtual: int

    def __str__(self) -> str:
        return f"pp{self.pp}-{self.schedule}-{self.engine}-tp{self.tp}-{self.recompute}-virtual{self.virtual}"

    @property
    def deal(self) -> int:
        """A number that varies from cell to cell, to deal out what is not an axis of the matrix."""
        return sum(values.index(value) for values, value in ((SCHEDULES, self.schedule), (ENGINES, self.engine),
                                                             (RECOMPUTE, self.recompute))) + self.tp + self.pp // 4  # fmt: skip

    def config(self, *more: str) -> Config:
        dp = 4 if self.engine == "hsdp" else 2
        microbatches = 2 * self.pp + 2 * (self.schedule == "dualpipev")
        words = [*MODELS[self.deal % len(MODELS)], f"parallel.pp={self.pp}", f"parallel.schedule={self.schedule}",
                 f"parallel.virtual_stages={self.virtual}", f"parallel.tp={self.tp}", f"parallel.recompute={self.recompute}",
                 f"engine={self.engine}", "precision=fp64", "train.micro_batch_size=2",
                 f"train.global_batch_size={2 * dp * microbatches}", "model.num_layers=9"]  # fmt: skip
        words += ["engine.replicas=2"] if self.engine == "hsdp" else []
        cfg = compose.load([*words, *more])
        cfg.launcher.processes = dp * self.tp * self.pp
        return cfg


CELLS = [Cell(*values) for values in product((2, 4), SCHEDULES, ENGINES, (1, 2), RECOMPUTE, (1, 2))]


def illegal(cell: Cell) -> str:
    """Words of the refusal of a cell that cannot be; empty for a legal one."""
    fits = {"gpipe": (1,), "1f1b": (1,), "interleaved_1f1b": (2,), "interleaved_zero_bubble": (1, 2), "zbv_zero_bubble": (2,),
            "dualpipev": (2,)}  # fmt: skip
    words = f"parallel.virtual_stages={cell.virtual} with parallel.schedule={cell.schedule}"
    return "" if cell.virtual in fits[cell.schedule] else words


def covering() -> set[Cell]:
    """Every schedule with every engine, the other choices dealt out; no more than eight ranks."""
    chosen = set()
    for (s, schedule), (e, engine) in product(enumerate(SCHEDULES), enumerate(ENGINES)):
        wide = (s + e) % 2 == 0 and engine != "hsdp"  # pp 4, or tp 2
        virtual = {"gpipe": 1, "1f1b": 1, "interleaved_zero_bubble": 1 + e % 2}.get(schedule, 2)
        chosen.add(Cell(4 if wide else 2, schedule, engine, 1 if wide or engine == "hsdp" else 2, RECOMPUTE[(s + e) % 3], virtual))
    return chosen
