"""The section `train.samples`: what the model writes while it is trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from megatron_scratch.util.errors import UserError


@dataclass
class SamplesConfig:
    """Every n steps, and at the end, the model continues each prompt; the texts go to samples.jsonl."""

    every: int = 0  # steps; 0: never
    prompts: list[str] = field(default_factory=lambda: [""])  # empty: the start of a document
    tokens: int = 64  # at most; a text may end before
    temperature: float = 0.8  # 0: greedy
    top_k: Optional[int] = None  # keep the k likeliest


def check_samples(s: SamplesConfig, seq_len: int) -> None:
    """Refuse what cannot be written. How many tokens a prompt has is known once the tokenizer is: see `refuse_long`."""
    if s.every < 0:
        raise UserError(f"train.samples.every={s.every} must be 0 (never) or a number of steps")
    if s.every == 0:
        given = [key for key, value in vars(SamplesConfig()).items() if getattr(s, key) != value]
        if given:
            raise UserError(f"train.samples.{given[0]}={getattr(s, given[0])!r} has no effect with train.samples.every=0; give "
                            "train.samples.every=N, or leave it out")  # fmt: skip
        return
    if not s.prompts:
        raise UserError("train.samples.prompts=[] leaves nothing to write; give a prompt, '' for the start of a document")
    if not 1 <= s.tokens < seq_len:
        raise UserError(f"train.samples.tokens={s.tokens}: a text has room for train.seq_len={seq_len} tokens, the prompt's too; "
                        f"allowed: 1 to {seq_len - 1}")  # fmt: skip
    if not 0 <= s.temperature < float("inf"):
        raise UserError(f"train.samples.temperature={s.temperature} must be 0 (greedy) or more")
    if s.top_k is not None and s.top_k < 1:
        raise UserError(f"train.samples.top_k={s.top_k} must be at least 1, or null")
    if s.top_k is not None and s.temperature == 0:
        raise UserError("train.samples.temperature=0 takes the likeliest token, so train.samples.top_k has no effect; leave it out")


def refuse_long(s: SamplesConfig, prompt: str, length: int, seq_len: int) -> None:
    """`length`: tokens of a prompt."""
    if length + s.tokens > seq_len:
        raise UserError(f"train.samples.prompts has {prompt!r}: its {length} tokens and train.samples.tokens={s.tokens} are beyond "
                        f"train.seq_len={seq_len}; shorten one")  # fmt: skip
