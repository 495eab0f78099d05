"""Shared by the parity tests."""

from __future__ import annotations

import pytest
import torch
from cells import References

from megatron_scratch.engine.zero import import_deepspeed


@pytest.fixture(scope="session")
def references() -> References:
    """Runs of one process, and DeepSpeed imported before ranks are forked: here once, instead of 2 s in each of them."""
    import_deepspeed("zero1", torch.device("cpu"))
    return References()
