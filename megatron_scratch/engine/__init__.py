"""Sharding engines behind one protocol."""

from megatron_scratch.engine.base import Engine, Parts

__all__ = ["Engine", "Parts"]
