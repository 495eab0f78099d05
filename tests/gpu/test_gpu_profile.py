"""A profile on a GPU: kernels by what launched them, NCCL apart, a snapshot of its memory. Run: pytest tests/gpu"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import TINY

from megatron_scratch.cli import main
from megatron_scratch.report.trace import read

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

WIDE = ["model.hidden_size=1024", "model.ffn_size=4096", "model.num_heads=8", "model.num_kv_heads=8", "model.max_seq_len=512",
        "train.seq_len=512", "train.micro_batch_size=4"]  # fmt: skip


def told(folder: Path, rank: int = 0) -> dict[str, Any]:
    return json.loads((folder / f"rank_{rank:05d}.json").read_text())  # type: ignore[no-any-return]


def losses(run_dir: Path) -> list[tuple[float, float]]:
    found = (json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines())
    return [(row["loss"], row["grad_norm"]) for row in found if "loss" in row]


@pytest.mark.parametrize("words", ["precision=bf16", "precision=bf16 train.compile=true"])
def test_one_gpu(words: str, corpus: Path, tmp_path: Path) -> None:
    line = ["train", *TINY, *WIDE, *words.split(), f"data.dir={corpus}", "train.steps=8", "launcher.processes=1"]
    assert main([*line, f"dir={tmp_path / 'plain'}"]) == 0
    assert main([*line, f"dir={tmp_path / 'p'}", "train.profile.steps=[5,7]", "train.profile.memory=true"]) == 0
    assert losses(tmp_path / "p") == pytest.approx(losses(tmp_path / "plain"), rel=1e-3)  # GPUs add up in no fixed order
    folder = tmp_path / "p" / "profile" / "steps_5_7"
    found = told(folder)
    assert [s["step"] for s in found["steps"]] == [5, 6, 7]
    assert sum(found["parts"].values()) == pytest.approx(found["seconds"], rel=1e-9)
    parts = found["parts"]
    assert parts["gemm"] > 0 and parts["attention"] > 0 and parts["optimizer"] > 0 and parts["communication"] == 0
    assert parts["gemm"] > parts["attention"]
    if "compile" not in words:
        assert parts["gemm"] > parts["norm"] > 0 and parts["loss"] > 0
    events = read(folder / "rank_00000.trace.json.gz")["traceEvents"]
    kernels = [e for e in events if e.get("cat") == "kernel"]
    assert kernels and found["device"] == torch.cuda.get_device_name(0)
    busy = sum(seconds for part, seconds in parts.items() if part not in ("idle", "data", "between steps"))
    assert busy <= sum(e["dur"] for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")) / 1e6 * 1.001
    assert (folder / "rank_00000.memory.pickle").stat().st_size > 1000


@pytest.mark.parametrize("layout", ["engine=ddp", "engine=fsdp", "parallel.tp=2", "parallel.pp=2"])
def test_two_gpus_say_what_nccl_costs(layout: str, corpus: Path, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    assert main(["train", *TINY, *WIDE, f"data.dir={corpus}", f"dir={tmp_path}", "train.steps=6", "train.profile.steps=[4,5]",
                 "precision=bf16", "train.profile.ranks=null", "train.micro_batch_size=2", "launcher.processes=2",
                 layout]) == 0  # fmt: skip
    for rank in (0, 1):
        found = told(tmp_path / "profile" / "steps_4_5", rank)
        assert sum(found["parts"].values()) == pytest.approx(found["seconds"], rel=1e-9)
        assert found["parts"]["communication"] + found["hidden_communication_seconds"] > 0
