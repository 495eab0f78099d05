"""apex's kernels without apex: what is refused, when torch does it instead, and the wiring, by a stand-in with its signatures."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from runs import TINY

from megatron_scratch import registry
from megatron_scratch.config import ModelConfig, compose
from megatron_scratch.config.model import check_model
from megatron_scratch.config.optim import AdamWConfig, check_optim, use_apex
from megatron_scratch.engine import Engine
from megatron_scratch.models import Decoder, norms
from megatron_scratch.optim import optimizers, param_groups
from megatron_scratch.parallel import SINGLE, materialize
from megatron_scratch.train import build
from megatron_scratch.util.errors import UserError

KEYS = {"optim.kernel": "amp_C", "model.norm_kernel": "fused_layer_norm_cuda"}
OPTIMIZER = """
import torch

class FusedAdam(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True, weight_decay=0.0,
                 amsgrad=False, set_grad_none=True, capturable=False, master_weights=False):
        assert adam_w_mode and not capturable
        super().__init__(params, dict(lr=lr, bias_correction=bias_correction, betas=betas, eps=eps, weight_decay=weight_decay))

    def zero_grad(self):
        raise AssertionError("takes no arguments, unlike torch's")

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            b1, b2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                assert p.numel(), "the kernel is not launched when the last tensor is empty"
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                m = state["exp_avg"].mul_(b1).add_(p.grad, alpha=1 - b1)
                v = state["exp_avg_sq"].mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                m, v = m / (1 - b1 ** group["step"]), v / (1 - b2 ** group["step"])
                p -= group["lr"] * (m / (v.sqrt() + group["eps"]) + group["weight_decay"] * p)
"""
NORMS = """
import torch.nn.functional as F

def fused_rms_norm_affine(input, weight, normalized_shape, eps=1e-6, memory_efficient=False):
    assert input.dtype == weight.dtype, "as in apex's kernels"
    return F.rms_norm(input, normalized_shape, weight, eps)

def fused_layer_norm_affine(input, weight, bias, normalized_shape, eps=1e-6, memory_efficient=False):
    assert input.dtype == weight.dtype == bias.dtype, "as in apex's kernels"
    return F.layer_norm(input, normalized_shape, weight, bias, eps)
"""


def install(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


NVIDIA = {"apex/__init__.py": "", "apex/optimizers/__init__.py": OPTIMIZER, "apex/normalization/__init__.py": "",
          "apex/normalization/fused_layer_norm.py": NORMS}  # fmt: skip
MODULES = {"amp_C.py": "", "fused_layer_norm_cuda.py": ""}
LIBRARIES = {"apex/_extensions/_amp_C.abi3.so": "", "_fused_layer_norm_cuda.so": ""}


@pytest.fixture(autouse=True)
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that is searched for packages; an apex that this environment may have is out of sight."""
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "apex"}
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(p for p in sys.path if not (Path(p or ".") / "apex").is_dir())])
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        del sys.modules[name]
    sys.modules.update(hidden)


@pytest.fixture
def apex(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in, and a CPU that counts as a GPU."""
    install(packages, {**NVIDIA, **MODULES})
    for module in (norms, optimizers):
        monkeypatch.setattr(module, "use_apex", lambda key, kernel, device, dtype: use_apex(key, kernel, "cuda", dtype))


SOURCE = r"take NVIDIA's \(PyPI's apex is another package\) from NGC's PyTorch image, or build .* at github.com/NVIDIA/apex"


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(("files", "problem"), [
    ({}, "apex is not installed"),
    ({"apex/__init__.py": "raise AssertionError('imported')", "apex/models.py": ""}, "the installed apex is not NVIDIA's"),
    ({"apex/setup.py": "", "apex/apex/optimizers/__init__.py": ""}, "the installed apex is not NVIDIA's"),  # its sources, beside us
    ({"apex.py": ""}, "the installed apex is not NVIDIA's"),
    (NVIDIA, "the installed apex was built without its CUDA extensions"),
])  # fmt: skip
def test_the_right_apex_or_a_refusal(key: str, files: dict[str, str], problem: str, packages: Path) -> None:
    install(packages, files)
    with pytest.raises(UserError, match=f"{key}=apex: {problem}.*; {SOURCE}.*; or use {key}=torch, or {key}=auto") as caught:
        use_apex(key, "apex")
    assert "\n" not in str(caught.value)
    assert not use_apex(key, "auto") and "apex" not in sys.modules


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("extensions", [MODULES, LIBRARIES])
def test_a_whole_apex_is_used_where_it_can(key: str, extensions: dict[str, str], packages: Path) -> None:
    install(packages, {**NVIDIA, **extensions})
    for kernel in ("apex", "auto"):
        assert use_apex(key, kernel, "cuda", "torch.float32")
    assert not use_apex(key, "torch")
    for device, dtype, problem in (("cpu", "torch.float32", "CUDA devices only, and this process has cpu"),
                                   ("cuda", "torch.float64", "no kernels for precision=fp64")):  # fmt: skip
        assert not use_apex(key, "auto", device, dtype)
        with pytest.raises(UserError, match=f"{key}=apex: apex .*{problem}"):
            use_apex(key, "apex", device, dtype)


def test_sections_check_it_before_anything_is_built() -> None:
    cfg = compose.load(["optim=adamw_apex", "model.norm_kernel=apex"])
    assert cfg.optim.name == "adamw"  # what checkpoints compare
    with pytest.raises(UserError, match="optim.kernel=apex: apex is not installed"):
        check_optim(cfg.optim)
    with pytest.raises(UserError, match="model.norm_kernel=apex: apex is not installed"):
        check_model(cfg.model)
    with pytest.raises(UserError, match="optim.kernel='triton' is not known; allowed: torch, apex, auto"):
        check_optim(AdamWConfig(kernel="triton"))
    assert "norm_kernel" in build.FREE_MODEL_FIELDS


def test_auto_is_torch_without_apex() -> None:
    named = {"a.weight": torch.nn.Parameter(torch.ones(3))}
    optimizer = registry.build("optim", AdamWConfig(kernel="auto"), groups=param_groups(named.items(), AdamWConfig()))
    assert type(optimizer) is torch.optim.AdamW
    assert norms.RMSNorm(4, 1e-5, False, SINGLE, kernel="auto").compute is norms.rms_norm
    assert norms.LayerNorm(4, 1e-5, True, SINGLE, kernel="auto").compute is norms.layer_norm


def engine(kernel: str) -> Engine:
    cfg = compose.load([*TINY, "model.vocab_size=257", f"optim.kernel={kernel}"])
    return build.build_engine(cfg, SINGLE)[1]


def train(made: Engine, first: int, last: int) -> dict[str, torch.Tensor]:
    """Steps with gradients that only depend on the step. Returns a copy of the state."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for p in made.named.values():
            p.grad = torch.randn(p.shape, generator=generator)
        made.update(1e-2 / (step + 1), made.norm())
    return {name: tensor.clone() for name, tensor in made.state().items()}


def resumed(kernel: str, state: dict[str, torch.Tensor]) -> Engine:
    made = engine(kernel)
    made.load({name: (tuple(t.shape), t.dtype) for name, t in state.items()},
              lambda live: [live[name].copy_(t) for name, t in state.items()])  # fmt: skip
    return made


def close(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert set(got) == set(want)
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype
        # The formula in another order: a few roundings (6e-8) of numbers up to 4, the steps of which are at most 1e-2.
        torch.testing.assert_close(got[name], tensor, rtol=2e-6, atol=1e-7, msg=name)


def test_five_steps_are_torchs(apex: None) -> None:
    made = engine("apex")
    assert type(made.optimizer).__module__ == "apex.optimizers"
    assert {group["weight_decay"] for group in made.optimizer.param_groups} == {0.0, 0.1}
    close(train(made, 0, 5), train(engine("torch"), 0, 5))


@pytest.mark.parametrize(("before", "after"), [("torch", "apex"), ("apex", "torch"), ("apex", "apex")])
def test_a_checkpoint_of_either_resumes_under_the_other(before: str, after: str, apex: None) -> None:
    state = train(engine(before), 0, 3)
    assert {float(t) for name, t in state.items() if name.endswith(".step")} == {3.0}
    close(train(resumed(after, state), 3, 5), train(engine("torch"), 0, 5))


def test_parameters_that_have_taken_different_steps_are_refused(apex: None) -> None:
    state = train(engine("torch"), 0, 3)
    state["optim.layers.0.mlp.up.weight.step"] += 1
    with pytest.raises(UserError, match="apex counts steps per group, and parameters in the group of .* have taken 3 to 4"):
        train(resumed("apex", state), 3, 4)


def test_an_empty_part_of_a_parameter_is_counted_but_not_handed_over(apex: None) -> None:
    named = {name: torch.nn.Parameter(torch.ones(size)) for name, size in (("a", 3), ("b", 0))}
    optimizer = registry.build("optim", AdamWConfig(kernel="apex"), groups=param_groups(named.items(), AdamWConfig()))
    for p in named.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [float(optimizer.state[p]["step"]) for p in named.values()] == [1.0, 1.0]
    assert list(optimizer.state[named["b"]]) == ["step", "exp_avg", "exp_avg_sq"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "bias"), [("rmsnorm", False), ("layernorm", True), ("layernorm", False)])
def test_norms_and_their_gradients_are_torchs(name: str, bias: bool, dtype: torch.dtype, apex: None) -> None:
    norm = norms.norm_of(ModelConfig(norm=name, norm_kernel="apex"))(32, 1e-5, bias, SINGLE)
    assert norm.compute in (norms.apex_rms_norm, norms.apex_layer_norm)
    materialize(norm, 1, torch.device("cpu"))
    torch.manual_seed(0)
    for p in norm.parameters():
        torch.nn.init.normal_(p, 1.0, 0.3)
    x, grad = torch.randn(3, 5, 32).to(dtype).requires_grad_(), torch.randn(3, 5, 32).to(dtype)
    weights = [p.to(dtype) for p in norm.parameters()]
    want = F.rms_norm(x, (32,), *weights, 1e-5) if name == "rmsnorm" else F.layer_norm(x, (32,), *weights, eps=1e-5)
    got = norm(x)
    leaves = (x, *norm.parameters())
    assert torch.equal(got, want) and got.dtype == dtype
    for ours, theirs in zip(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad), strict=True):
        assert torch.equal(ours, theirs)


def test_every_norm_of_a_model_has_the_kernel(apex: None) -> None:
    cfg = ModelConfig(vocab_size=8, qk_norm=True, num_layers=2, norm_kernel="auto")
    found = [module.compute for module in Decoder(cfg, SINGLE).modules() if isinstance(module, norms.RMSNorm)]
    assert found == [norms.apex_rms_norm] * (2 * 4 + 1)
