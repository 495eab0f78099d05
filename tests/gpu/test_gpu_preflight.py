"""The preflight's checks on a real GPU and with NCCL. Run: pytest tests/gpu/test_gpu_preflight.py"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_scratch.config import compose
from megatron_scratch.launch.preflight import rounds
from megatron_scratch.train import preflight

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
PORT = 29517


def test_a_healthy_gpu() -> None:
    torch.cuda.empty_cache()
    assert preflight.check_gpus(1) == ""
    assert preflight.check_gpus(torch.cuda.device_count() + 1).endswith("GPUs can be seen")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_wrong_number_of_a_product(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32 and on the tensor cores alike."""
    original = torch.matmul

    def wrong(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        product = original(a, b)
        if product.dtype == dtype:
            product[-1, -1] += 1
        return product

    monkeypatch.setattr(torch, "matmul", wrong)
    assert (
        preflight.check_compute(torch.device("cuda", 0), 8) == f"1 of {4096**2} numbers of a product in {dtype} are wrong on cuda:0"
    )


def test_one_wrong_number_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    original, made = preflight._pattern, []

    def wrong(device: torch.device, block: int) -> torch.Tensor:
        made.append(pattern := original(device, block))
        if len(made) == 2:
            pattern[-1] ^= 1 << 20
        return pattern

    monkeypatch.setitem(preflight.BLOCK, "cuda", 1 << 20)
    monkeypatch.setattr(preflight, "_pattern", wrong)
    assert preflight.check_memory(torch.device("cuda", 0), 4).startswith("1 of 4194304 numbers in the memory of cuda:0")


def test_memory_that_is_taken() -> None:
    total = torch.cuda.mem_get_info(0)[1]
    held = torch.empty(total // 6, dtype=torch.uint8, device="cuda")
    assert "are taken by somebody else" in preflight.check_gpu(0)
    del held
    torch.cuda.empty_cache()


@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="needs nvidia-smi")
def test_this_driver_knows_a_name_of_every_record() -> None:
    uuid = str(torch.cuda.get_device_properties(0).uuid)
    for fields, _ in preflight.RECORDS:
        assert any(preflight._smi(field, uuid) for field in fields), fields
    assert preflight._smi("no.such.field", uuid) == ""


def _program(folder: Path, node: str, *words: str, **env: str) -> subprocess.Popen[Any]:
    command = [sys.executable, "-m", "megatron_scratch.train.preflight", *words, f"--report={folder}", "--seconds=120"]
    return subprocess.Popen(command, env={**os.environ, "SLURMD_NODENAME": node, **env})


def test_the_program_on_a_node(tmp_path: Path) -> None:
    torch.cuda.empty_cache()
    cfg = compose.load(
        ["model=llama_tiny", "model.vocab_size=256", "launcher=slurm", "launcher.gpus_per_node=1", f"dir={tmp_path}"]
    )
    compose.save(cfg, tmp_path / "config.yaml")
    assert _program(tmp_path, "n1", "node", f"--config={tmp_path / 'config.yaml'}").wait(120) == 0
    report = json.loads((tmp_path / "n1.json").read_text())
    assert report["problems"] == {} and report["versions"]["gpu"] == torch.cuda.get_device_name(0)


@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_nccl_between_nodes(nodes: int, tmp_path: Path) -> None:
    if torch.cuda.device_count() < nodes:
        pytest.skip(f"needs {nodes} GPUs")
    names = [f"n{i}" for i in range(nodes)]
    plan = [{"nodes": names, "address": "127.0.0.1", "port": PORT, "rounds": rounds(nodes), "gpu": True, "timeout": 60}]
    (tmp_path / "plan").write_text(json.dumps(plan))
    programs = [_program(tmp_path, name, "network", CUDA_VISIBLE_DEVICES=str(i)) for i, name in enumerate(names)]
    assert [program.wait(120) for program in programs] == [0] * nodes
    for name in names:
        report = json.loads((tmp_path / f"{name}.json").read_text())
        assert sorted(report["pairs"]) == [other for other in names if other != name], report
