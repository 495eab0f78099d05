"""Checkpoints: any layout to any layout, committed atomically, hashed, without executable content."""

from megatron_scratch.checkpoint.storage import CorruptCheckpoint
from megatron_scratch.checkpoint.store import committed, load, newest_valid, save, verify

__all__ = ["CorruptCheckpoint", "committed", "load", "newest_valid", "save", "verify"]
