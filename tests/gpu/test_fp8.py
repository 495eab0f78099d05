"""fp8 products on a GPU that has them, against their emulation and through whole runs. Run: pytest tests/gpu/test_fp8.py"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from runs import TINY

from megatron_scratch.cli import main
from megatron_scratch.models.fp8 import CAPABILITY, fp8_linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() < CAPABILITY, reason="needs fp8 units"),
    pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao"),
]
RECIPES = pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])


@RECIPES
def test_the_kernels_compute_what_is_emulated(recipe: str) -> None:
    """Both round alike; the sums are in another order, and the tensor cores' own, so at most a few roundings of bf16 apart."""
    torch.manual_seed(0)
    x, weight, grad = (torch.randn(*size, device="cuda", dtype=torch.bfloat16) for size in ((64, 96), (128, 96), (64, 128)))
    found = []
    for emulate in (True, False):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        y = fp8_linear(recipe, emulate)(*leaves)
        found.append([y, *torch.autograd.grad(y, leaves, grad)])
    for emulated, got in zip(*found, strict=True):
        assert got.dtype == torch.bfloat16
        assert (got.double() - emulated.double()).norm() < 1e-2 * emulated.double().norm()


@RECIPES
@pytest.mark.parametrize("compiled", [False, True])
def test_it_trains_as_bf16_does(recipe: str, compiled: bool, corpus: Path, tmp_path: Path) -> None:
    losses = {}
    for precision in ("bf16", "fp8"):
        words = [f"precision.recipe={recipe}", f"train.compile={str(compiled).lower()}"] if precision == "fp8" else []
        assert main(["train", *TINY, f"data.dir={corpus}", f"dir={tmp_path / precision}", "train.steps=20", "launcher.processes=1",
                     f"precision={precision}", *words]) == 0  # fmt: skip
        rows = (json.loads(line) for line in (tmp_path / precision / "metrics.jsonl").read_text().splitlines())
        losses[precision] = [row["loss"] for row in rows if "loss" in row]
    assert losses["fp8"] != losses["bf16"]
    assert losses["fp8"][-1] == pytest.approx(losses["bf16"][-1], rel=0.05)


def test_two_gpus(corpus: Path, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    assert main(["train", *TINY, f"data.dir={corpus}", f"dir={tmp_path}", "train.steps=4", "launcher.processes=2",
                 "precision=fp8", "engine=fsdp"]) == 0  # fmt: skip
