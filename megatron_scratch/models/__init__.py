"""The decoder and its parts. `decoder.py` is the place to start reading."""

from megatron_scratch.models.cache import KVCache
from megatron_scratch.models.decoder import Decoder
from megatron_scratch.models.flops import count_parameters, flops_per_token
from megatron_scratch.models.objective import cross_entropy_sum, linear_cross_entropy_sum

__all__ = ["Decoder", "KVCache", "count_parameters", "cross_entropy_sum", "flops_per_token", "linear_cross_entropy_sum"]
