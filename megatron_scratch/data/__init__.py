"""Tokens on disk to batches. No torch here: the training step turns the arrays into tensors."""

from megatron_scratch.data.dataset import Blend, EvalWindows, GPTDataset, Sample
from megatron_scratch.data.indexed import IndexedDataset, best_dtype, check_token_ids
from megatron_scratch.data.loader import Batch, DataSource, Loader, open_data
from megatron_scratch.data.tokenizer import Tokenizer, load_tokenizer
from megatron_scratch.data.writer import IndexedWriter

__all__ = ["Batch", "Blend", "DataSource", "EvalWindows", "GPTDataset", "IndexedDataset", "IndexedWriter", "Loader", "Sample",
           "Tokenizer", "best_dtype", "check_token_ids", "load_tokenizer", "open_data"]  # fmt: skip
