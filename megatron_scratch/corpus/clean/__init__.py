"""Cleaners: each takes a text and gives it back, changed or not, or a `Drop` that says why the document goes."""

from megatron_scratch.corpus.clean.base import Cleaner, Drop, build_cleaners, files_of

__all__ = ["Cleaner", "Drop", "build_cleaners", "files_of"]
