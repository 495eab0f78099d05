"""Arguments of verbs that work on a finished run instead of composing one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from megatron_scratch.util.errors import UserError


@dataclass
class InspectArgs:
    """`data inspect DIR`: a prepared folder or a Megatron prefix."""

    data: str = ""
    document: Optional[int] = None  # show this document
    sample: Optional[int] = None  # show this training sample, and where it comes from
    seq_len: int = 256  # of the sample
    seed: int = 1234  # of the sample


@dataclass
class EvalArgs:
    """`eval RUN`: a run directory or one of its checkpoints."""

    run: str = ""
    data: Optional[str] = None  # a dataset folder or prefix; None: the run's own validation set
    split: str = "valid"  # of a dataset folder: valid | train
    batches: Optional[int] = None  # micro-batches; None: all of it
    micro_batch_size: int = 16
    precision: Optional[str] = None  # None: the run's


@dataclass
class GenerateArgs:
    """`generate RUN`: sampling from a trained model."""

    run: str = ""
    prompt: str = ""  # empty: start of a document
    max_new_tokens: int = 200
    temperature: float = 1.0  # 0: greedy
    top_k: Optional[int] = None  # keep the k likeliest
    top_p: Optional[float] = None  # keep the likeliest that together reach p
    seed: int = 0
    stop_at_eod: bool = True

    def check(self) -> None:
        """Refuse settings that mean nothing."""
        if not self.run:
            raise UserError("give the run: `megatron-scratch generate RUN [prompt=TEXT]`")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if self.temperature < 0:
            raise UserError(f"temperature={self.temperature} must be 0 (greedy) or more")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise UserError("temperature=0 takes the likeliest token, so top_k and top_p have no effect; leave them out")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k={self.top_k} must be at least 1, or null")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} must be in (0, 1], or null")
