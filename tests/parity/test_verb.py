"""`megatron-scratch parity`: a table and exit code 0, or the worst parameters and 1."""

from __future__ import annotations

import pytest

from megatron_scratch.cli import main
from megatron_scratch.engine.torch_engine import TorchEngine
from megatron_scratch.train.parity import ALL


def test_equal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", "experiment=quickstart", "precision=fp64", "parallel.tp=2", "model.dropout=0.1", "optim=lion"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "layout     engine=ddp  tp=2  dp=2  sequence_parallel=True  overlap=False"
    assert [line.split()[0] for line in lines[4:8]] == ["ok"] * 4 and all(float(line.split()[-1]) < 1e-12 for line in lines[4:8])
    assert lines[8].startswith("tolerance  1e-10: fp64 rounds at") and lines[-1].startswith("equal: 4 processes and one compute")


def test_not_equal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TorchEngine, "finish_gradients", lambda self: None)  # norms keep the gradient of their own tokens
    assert main(["parity", "parallel.tp=2", "launcher.processes=2", "parity.steps=1"]) == 1
    out = capsys.readouterr().out
    failed = [line for line in out.splitlines() if line.startswith("  FAIL gradient  ")]
    assert failed and all("norm" in line or ALL in line for line in failed), "the parameters that the bug is in, and no other"
    assert "  ok   loss" in out and "NOT equal: 2 processes and one compute different numbers" in out
