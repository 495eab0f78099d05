"""What only a GPU can show: the same losses as on the CPU, bf16, NCCL where there are two. Run: pytest tests/gpu"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from runs import TINY

from megatron_scratch import registry
from megatron_scratch.cli import main
from megatron_scratch.config import compose
from megatron_scratch.config.optim import AdamWConfig, use_apex
from megatron_scratch.data.loader import Loader, open_data
from megatron_scratch.models.norms import apex_layer_norm, apex_rms_norm, layer_norm, rms_norm
from megatron_scratch.optim import param_groups
from megatron_scratch.parallel import SINGLE, Topology
from megatron_scratch.train import build
from megatron_scratch.train.passes import to_device

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
    return total, engine.norm().item()


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


LAYOUTS = ["parallel.tp=2", "parallel.tp=2 parallel.overlap=true", "engine=fsdp", "engine=fsdp engine.reshard_after_forward=false",
           "engine=hsdp engine.replicas=2", "engine=zero1", "engine=zero2 engine.offload_optimizer=true",
           "engine=zero3 engine.offload_param=true engine.offload_optimizer=true",
           *(f"parallel.pp=2 parallel.schedule={name}" for name in ("1f1b", "zbv_zero_bubble", "interleaved_zero_bubble")),
           "engine=fsdp parallel.recompute=full",
           "parallel.tp=2 parallel.recompute=full parallel.offload_activations=true"]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_gpus_compute_what_one_computes(layout: str, corpus: Path, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    if "zero" in layout:
        pytest.importorskip("deepspeed")
    found = []
    for name, words in (("one", []), ("two", layout.split())):
        assert main(["train", *TINY, f"data.dir={corpus}", f"dir={tmp_path / name}", "optim=sgd", "optim.lr=0.1", "train.steps=4",
                     "model.num_layers=4", "train.micro_batch_size=1",
                     f"launcher.processes={1 if name == 'one' else 2}", *words]) == 0  # fmt: skip
        rows = (json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        found.append([(row["loss"], row["grad_norm"]) for row in rows if "loss" in row])
    for one, two in zip(*found, strict=True):
        assert two == pytest.approx(one, rel=1e-4), "fp32 sums in another order, four steps; TF32 is off by default"


def needs_apex(key: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec("apex") is None or not use_apex(key, "auto"), reason="needs NVIDIA's apex")


@needs_apex("optim.kernel")
def test_apex_s_adamw_is_torch_s() -> None:
    runs = []
    for kernel in ("torch", "apex"):
        torch.manual_seed(0)
        named = {n: torch.nn.Parameter(torch.randn(size, device="cuda")) for n, size in (("w", 70_000), ("norm", 5), ("none", 0))}
        cfg = AdamWConfig(lr=1e-2, kernel=kernel)
        optimizer = registry.build("optim", cfg, groups=param_groups(named.items(), cfg))
        assert type(optimizer).__name__ == ("FusedAdam" if kernel == "apex" else "AdamW")
        for _ in range(5):
            for p in named.values():
                p.grad = torch.randn_like(p)
            optimizer.step()
        runs.append((named, optimizer))
    for name, want in runs[0][0].items():
        got = runs[1][0][name]
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-7)  # a few roundings of numbers up to 4
        mine, theirs = runs[1][1].state[got], runs[0][1].state[want]
        assert list(mine) == list(theirs) and float(mine["step"]) == 5.0
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(mine[key], theirs[key], rtol=2e-6, atol=1e-7)


@needs_apex("model.norm_kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["rms", "layer", "layer without bias"])
def test_apex_s_norms_err_at_most_twice_as_much_as_torch_s(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, grad = (torch.randn(64, 384, device="cuda", dtype=dtype) for _ in range(2))
    weight, bias = torch.randn(384, device="cuda"), torch.randn(384, device="cuda")

    def run(apex: bool, to: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.to(to).requires_grad_() for t in (x, *(t.to(dtype) for t in (weight, bias)[: 1 + (name == "layer")]))]
        if name == "rms":
            y = (apex_rms_norm if apex else rms_norm)(*leaves, 1e-5)
        else:
            y = (apex_layer_norm if apex else layer_norm)(*leaves, *([None] if name != "layer" else []), 1e-5)
        return [y, *torch.autograd.grad(y, leaves, grad.to(to))]

    for ours, torchs, exact in zip(run(True, dtype), run(False, dtype), run(False, torch.float64), strict=True):
        assert ours.dtype == dtype
        assert (ours - exact).norm() <= 2 * (torchs - exact).norm() + 1e-6 * exact.norm()
