"""Sharding engines behind one protocol."""

from megatron_scratch.engine.base import Engine, Parts, Staged

__all__ = ["Engine", "Parts", "Staged"]
