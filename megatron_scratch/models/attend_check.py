"""Is an attention backend right on this machine? Its errors beside those of plain `sdpa` in the same precision, truth in fp64.

Legend: B batch, S queries, T keys (the queries are the last S of them), H query heads, G key/value heads, K features of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

from megatron_scratch import registry
from megatron_scratch.models.attend import AttendMask, Backend, make_mask, reference, sdpa

ROUNDING = 0.2  # of finfo.eps: one rounding, as a part of a norm. Half a spacing / sqrt(3) is 0.29 eps of 1 and 0.14 of 2
ALLOWED = 2.0  # times the error of `sdpa`, or of one rounding where that has less
SANE = 8.0  # eps: beyond it `sdpa` itself is wrong. It has up to 3.5 in fp32 (1024 keys), 0.6 in bf16; a wrong mask has 0.1 / eps


@dataclass(frozen=True)
class Case:
    """A shape and a mask."""

    queries: int
    keys: int
    heads: int = 4
    groups: int = 2
    size: int = 64
    window: int | None = None
    documents: bool = False
    batch: int = 2

    def mask(self, device: torch.device) -> AttendMask:
        return make_mask(self.queries, self.keys, self.window, self._documents(device), device)

    def _documents(self, device: torch.device) -> torch.Tensor | None:
        """A document starts at every eleventh token of the first row, every sixteenth of the second, ..."""
        if not self.documents:
            return None
        every = 11 + 5 * torch.arange(self.batch).unsqueeze(1)
        return (torch.arange(self.keys) // every).to(device)

    def tensors(self, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
        """q, k, v and a gradient of the output: normal numbers, from the CPU's generator, so that all devices get the same."""
        generator = torch.Generator().manual_seed(0)
        shapes = [(self.queries, self.heads), (self.keys, self.groups), (self.keys, self.groups), (self.queries, self.heads)]
        found = [torch.randn(self.batch, *s, self.size, generator=generator, dtype=torch.float32) for s in shapes]
        return [x.to(device, dtype) for x in found]


# Sequences where there are few queries: of a handful of rows the norm is luck, for `matmul` 1.6 to 4 times that of sdpa, of many
# 1.7 to 1.9.
MANY = 64
CASES = (Case(129, 129), Case(64, 64, 4, 4, 32, window=7), Case(97, 97, 4, 1, documents=True),
         Case(97, 97, window=20, documents=True), Case(3, 40, batch=MANY), Case(1, 33, batch=MANY))  # fmt: skip


def run(backend: Backend, tensors: list[torch.Tensor], mask: AttendMask, backward: bool = True) -> list[torch.Tensor]:
    """The output, and with `backward` the gradients of q, k and v."""
    *qkv, grad = tensors
    with torch.inference_mode(False), torch.set_grad_enabled(backward):
        qkv = [x.clone().requires_grad_(backward) for x in qkv]
        out = backend(*qkv, mask, 0.0)
        return [out.detach(), *(torch.autograd.grad(out, qkv, grad.clone()) if backward else ())]


def worst(backend: Backend, case: Case, dtype: torch.dtype, device: torch.device, backward: bool = True) -> float:
    """The largest error, over output and gradients, as a multiple of `sdpa`'s. Right is what stays within ALLOWED."""
    tensors, mask = case.tensors(dtype, device), case.mask(device)
    got, plain = run(backend, tensors, mask, backward), run(sdpa, tensors, mask, backward)
    truth = run(reference, [x.double() for x in tensors], mask, backward)
    return max(multiple(*outputs, tensors[-1]) for outputs in zip(got, plain, truth, strict=True))


def multiple(got: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, grad: torch.Tensor) -> float:
    """The error of `got` against the fp64 truth as a multiple of that of `plain`; infinite for a wrong shape, dtype or
    value, or where `plain` itself is wrong."""
    if got.shape != truth.shape or got.dtype != plain.dtype:
        return float("inf")
    scale = truth.norm() or grad.double().norm()  # one query, one key: d_q is a difference of two terms as large as the gradient
    one = torch.finfo(plain.dtype).eps * scale
    error, usual = (got - truth).norm(), (plain - truth).norm()
    if not bool(error.isfinite() & (usual <= SANE * one)):
        return float("inf")
    return float(error / torch.maximum(usual, ROUNDING * one))


@cache
def trusted(name: str, device: torch.device, dtype: torch.dtype, size: int) -> bool:
    """Whether a backend passes all cases here, with heads of `size`. Looked at once per process; what raises has not passed."""
    try:
        cases = (replace(case, size=size) for case in CASES)
        return all(worst(registry.get("attention", name), case, dtype, device) <= ALLOWED for case in cases)
    except Exception:  # a broken package raises anything: it is then left alone, and `doctor` shows what it said
        return False
