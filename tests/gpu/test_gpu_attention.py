"""Every attention backend on a GPU against the truth in fp64, and in a training step, eager and compiled. Run: pytest tests/gpu"""

from __future__ import annotations

import pytest
import torch
from shapes import shapes

from megatron_scratch import registry
from megatron_scratch.config import compose
from megatron_scratch.config.attention import CAPABLE
from megatron_scratch.models import attend, attend_check, attend_flash
from megatron_scratch.models.attend import make_mask
from megatron_scratch.models.attend_check import ALLOWED, CASES, Case, worst
from megatron_scratch.parallel import Topology
from megatron_scratch.train import build
from megatron_scratch.train.doctor import doctor

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
              pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")]  # fmt: skip

GPU = torch.device("cuda", 0)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES = shapes((1, 7, 129, 1000), (64, 128))


def need(name: str, dtype: torch.dtype = torch.bfloat16) -> None:
    problem = attend_flash.choose(GPU, dtype)[1] if name == "flash_attn" else ""
    if problem:
        pytest.skip(problem)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("name", list(CAPABLE))
def test_error_is_at_most_twice_that_of_sdpa(name: str, precision: str) -> None:
    if precision not in CAPABLE[name].dtypes:
        pytest.skip(f"{name} has no {precision}")
    need(name, DTYPES[precision])
    wrong = {}
    for case in CASES if name == "flex" else SHAPES:  # a kernel to compile for each
        torch.compiler.reset()
        error = worst(registry.get("attention", name), case, DTYPES[precision], GPU)
        if error > ALLOWED:
            wrong[case] = error
    assert not wrong


def test_auto_takes_flash_attn_where_there_is_one() -> None:
    need("flash_attn")
    assert attend.chosen(GPU, torch.bfloat16, 64, make_mask(64, 64, None, None, GPU)) is attend_flash.flash_attn
    assert attend_check.trusted("flash_attn", GPU, torch.bfloat16, 64)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["auto", "flex", "flash_attn"])
def test_a_step_is_that_with_sdpa(name: str, compiled: bool, documents: bool) -> None:
    need(name)
    found = []
    for backend in ("sdpa", name):
        cfg = compose.load(["model=llama_tiny", "model.num_layers=3", "model.head_dim=64", "model.vocab_size=64", "precision=bf16",
                            "model.sliding_window=50", f"model.attention={backend}", f"train.compile={compiled}"])  # fmt: skip
        _, engine = build.build_engine(cfg, Topology(device=GPU))
        ids = torch.randint(0, 64, (2, 130), generator=torch.Generator().manual_seed(0)).to(GPU)
        numbers = (torch.arange(129, device=GPU) // 40).expand(2, 129).contiguous() if documents else None
        loss = engine.forward(ids[:, :-1], ids[:, 1:].contiguous(), None, numbers) / 258
        engine.backward(loss)
        found.append((loss.item(), engine.norm().item()))
        torch.compiler.reset()
    assert found[1] == pytest.approx(found[0], rel=1e-2)  # bf16


def test_memory_of_fused_kernels_is_linear() -> None:
    """8192 keys, window and documents: the mask alone would take 64 MiB a row, the probabilities 2 GiB a head."""
    case = Case(8192, 8192, 8, 2, 64, window=1000, documents=True)
    for name in ("flex", "flash_attn"):
        if name == "flash_attn" and attend_flash.choose(GPU, torch.bfloat16)[1]:
            continue
        q, k, v, grad = case.tensors(torch.bfloat16, GPU)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        mask = make_mask(8192, 8192, 1000, case.mask(GPU).documents_BT, GPU, dense=False)
        for _ in range(2):  # the first compiles
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            registry.get("attention", name)(*leaves, mask, 0.0).backward(grad)
        assert torch.cuda.max_memory_allocated() - before < 12 * q.numel() * q.element_size()  # 16 MiB each of q, out, d_q


def test_doctor_finds_nothing_wrong() -> None:
    lines: list[str] = []
    assert doctor(lines.append), "\n".join(lines)
