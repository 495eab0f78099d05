"""`doctor`: what it shows of this machine, and that it finds what is wrong."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from megatron_scratch import cli, registry
from megatron_scratch.config.attention import CAPABLE
from megatron_scratch.models import attend_check, norms
from megatron_scratch.train import doctor as module
from megatron_scratch.train.doctor import Check, doctor

CPU = torch.device("cpu")


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Filled by `doctor(report.append)`; flex is left out, which takes 20 s to compile and has a test of its own."""
    monkeypatch.delitem(CAPABLE, "flex")
    return []


def row(report: list[str], name: str) -> str:
    (found,) = (line for line in report if line.startswith(f"  {name:<24}"))
    return found


def test_a_sound_machine(report: list[str]) -> None:
    assert doctor(report.append)
    assert report[0].startswith("python  ") and torch.__version__ in report[1]
    assert {line.split()[0] for line in report[3:9]} == {"deepspeed", "flash-attn", "torchao", "transformers", "wandb", "apex"}
    for name in ("attention reference", "attention sdpa", "attention matmul", "attention auto", "linear", "rms_norm"):
        assert row(report, name).endswith("  ok")
    assert "fp32 1.00  bf16 1.00" in row(report, "attention sdpa")
    if not torch.cuda.is_available():
        assert "not here: " in row(report, "attention flash_attn")
        assert report[-2:] == ["  model.attention=auto takes, at 1024 keys: fp32 sdpa, bf16 matmul",
                               "  model.attention=auto takes, at 4096 keys: fp32 sdpa, bf16 sdpa"]  # fmt: skip


def test_a_wrong_norm_and_a_broken_kernel(report: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def biased(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return norms.rms_norm(x, weight, eps + 1e-2)

    get = registry.get
    monkeypatch.setattr(module, "rms_norm", biased)
    monkeypatch.setattr(module.registry, "get", lambda kind, name: broken if name == "matmul" else get(kind, name))
    assert not doctor(report.append)
    assert row(report, "rms_norm").endswith("FAIL") and row(report, "linear").endswith("ok")
    assert "fp32 OSError: no such library" in row(report, "attention matmul") and row(report, "attention matmul").endswith("FAIL")


def broken(*args: object) -> torch.Tensor:
    raise OSError("no such\nlibrary")


def test_a_check_s_line() -> None:
    errors = {torch.float32: 1.5, torch.bfloat16: 2.5}
    assert Check("x", errors.__getitem__, ("fp32",), ", forward only").run() == (f"  {'x':<24}fp32 1.50  ok, forward only", True)
    assert Check("x", errors.__getitem__, ("bf16", "fp32")).run() == (f"  {'x':<24}bf16 2.50  fp32 1.50  FAIL", False)
    assert Check("x", errors.__getitem__, ("fp32",), missing="no GPU").run() == (f"  {'x':<24}not here: no GPU", True)


def test_flex_is_checked_forward_only_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "which", lambda name: None)
    (check,) = (c for c in module._attention(CPU) if c.name == "attention flex")
    assert check.run() == (f"  {'attention flex':<24}not here: torch.compile needs g++", True)
    monkeypatch.setattr(module, "which", lambda name: name)
    (check,) = (c for c in module._attention(CPU) if c.name == "attention flex")
    asked: list[object] = []
    monkeypatch.setattr(module, "worst", lambda *args: asked.append(args[1:]) or 1.0)
    assert check.run() == (f"  {'attention flex':<24}fp32 1.00  bf16 1.00  ok, forward only", True)
    case = attend_check.CASES[3]
    assert asked == [(case, dtype, CPU, False) for dtype in (torch.float32, torch.bfloat16)] and case.window and case.documents


@pytest.mark.parametrize(("right", "code"), [(True, 0), (False, 1)])
def test_the_verb_s_exit_code(right: bool, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "doctor", lambda say: say("a line") or right)
    assert cli.main(["doctor"]) == code and capsys.readouterr().out == "a line\n"


def test_arguments_are_refused_without_torch() -> None:
    code = ("import sys; from megatron_scratch.cli import main; assert main(['doctor', 'model=llama_tiny']) == 2; "
            "assert 'torch' not in sys.modules")  # fmt: skip
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, capture_output=True, text=True)
    assert "doctor takes no arguments, got 'model=llama_tiny'" in done.stderr
