"""Saves beside training from a GPU: the copy is taken on a stream of its own, of what was there when the save began."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_scratch.checkpoint.attempt import Attempt
from megatron_scratch.checkpoint.manifest import tensor, verify
from megatron_scratch.checkpoint.saver import Saver
from megatron_scratch.checkpoint.store import load
from megatron_scratch.config.train import CheckpointConfig
from megatron_scratch.parallel import Topology
from megatron_scratch.train.replicas import checksum

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_is_saved_is_what_was_there(asynchronous: bool, tmp_path: Path) -> None:
    topo = Topology(device=torch.device("cuda"))
    saver = Saver(CheckpointConfig(async_save=asynchronous, keep_last=1), Attempt.claim(tmp_path), topo)
    state = {f"model.{n}": torch.zeros(1024, 1024, device="cuda") for n in range(16)} | {
        "model.h": torch.ones(3, device="cuda").half()
    }
    big = torch.randn(4096, 4096, device="cuda")
    for step in (1, 2, 3):
        for _ in range(20):  # the device is behind the host when the save begins
            big = big @ big / 64
        for value in state.values():
            value.fill_(step)
        saver.start(step, state, {})
        saver.copied()
        for value in state.values():
            value.fill_(-1)
        saver.finish()
    saver.close()
    folder = tmp_path / "step_00000003"
    manifest = verify(folder)
    assert all((tensor(folder, saved) == 3).all() for name, saved in manifest.tensors.items())
    load(folder, manifest, state, topo)
    assert all((value == 3).all() for value in state.values())


def test_a_checksum_is_the_same_as_on_a_cpu() -> None:
    """Integer arithmetic that wraps around alike."""
    for values in (torch.randn(1 << 20), torch.randn(12_345).bfloat16(), torch.randint(-(2**62), 2**62, (999,))):
        assert int(checksum(values.cuda())) == int(checksum(values))
