"""Raw text to an indexed dataset and its tokenizer: `data prepare` and `data inspect`. No torch."""

from megatron_scratch.corpus.pipeline import prepare
from megatron_scratch.corpus.view import inspect

__all__ = ["inspect", "prepare"]
