"""The layout: axes, collectives over them, and the contract that makes a parameter independent of them."""

from megatron_scratch.parallel.layout import local, materialize, shard_param
from megatron_scratch.parallel.topology import SINGLE, Topology

__all__ = ["SINGLE", "Topology", "local", "materialize", "shard_param"]
