"""A dataset that needs no data: for proofs of a layout, not of a model."""

from __future__ import annotations

import numpy as np

from megatron_scratch.data.dataset import Sample


class MadeUpSamples:
    """Sample k is a pure function of (seed, k): random ids, document starts, and every third sample mostly padding, so that ranks
    and microbatches have different numbers of predicted tokens."""

    def __init__(self, vocab_size: int, seq_len: int, seed: int) -> None:
        self.vocab_size, self.length, self.seed = vocab_size, seq_len + 1, seed

    def __getitem__(self, k: int) -> Sample:
        rng = np.random.default_rng((self.seed, k))
        tokens = rng.integers(0, self.vocab_size, self.length)
        return Sample(tokens, rng.random(self.length) < 0.15, self.length if k % 3 else self.length // 3)

    def locate(self, k: int) -> tuple[str, int]:
        return "made-up samples", k
