"""Raw text to an indexed dataset and its tokenizer: `data prepare` and `data inspect`. No torch."""

from megatron_scratch.corpus.pipeline import prepare
from megatron_scratch.corpus.report import inspect

__all__ = ["inspect", "prepare"]
