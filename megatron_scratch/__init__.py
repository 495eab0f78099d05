"""megatron_scratch: from raw text to a trained language model, under any layout, with the same numbers."""

__version__ = "0.1.0"
