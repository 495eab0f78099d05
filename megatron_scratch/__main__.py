"""`python -m megatron_scratch VERB ...` is `megatron-scratch VERB ...`."""

from megatron_scratch.cli import entry

entry()
