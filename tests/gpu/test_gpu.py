"""What only a GPU can show: the same losses as on the CPU, bf16, NCCL where there are two. Run: pytest tests/gpu"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from runs import TINY

from megatron_scratch.cli import main
from megatron_scratch.config import compose
from megatron_scratch.data.loader import Loader, open_data
from megatron_scratch.parallel import SINGLE, Topology
from megatron_scratch.train import build
from megatron_scratch.train.step import to_device

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def _loss_and_norm(corpus: Path, device: str, precision: str) -> tuple[float, float]:
    cfg = compose.load([*TINY, f"data.dir={corpus}", "model.vocab_size=257", f"precision={precision}"])
    topo = SINGLE if device == "cpu" else Topology(device=torch.device("cuda", 0))
    data = open_data(cfg.data, cfg.train.seq_len, cfg.seed)
    _, engine = build.build_engine(cfg, topo)
    total = 0.0
    for batch in Loader(data.train, 2).microbatches(0, 8):
        loss = engine.forward(*to_device(batch, topo.device)) / (8 * 32)
        engine.backward(loss)
        total += loss.item()
    return total, engine.step(0.0).item()


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-2)])
def test_the_gpu_computes_what_the_cpu_computes(corpus: Path, precision: str, tolerance: float) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    want, got = _loss_and_norm(corpus, "cpu", "fp32"), _loss_and_norm(corpus, "cuda", precision)
    assert got == pytest.approx(want, rel=tolerance)


@pytest.mark.parametrize("processes", [1, 2])
def test_train_resume_and_generate(processes: int, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.device_count() < processes:
        pytest.skip(f"needs {processes} GPUs")
    for steps in (4, 8):
        assert main(["train", *TINY, f"data.dir={corpus}", f"dir={tmp_path}", "precision=bf16", f"train.steps={steps}",
                     f"launcher.processes={processes}"]) == 0  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "loss" in r] == list(range(1, 9))
    assert main(["generate", str(tmp_path), "prompt=a", "max_new_tokens=4"]) == 0
