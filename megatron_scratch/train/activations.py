"""What a layer keeps for backward, counted on tensors that have shapes and no memory: exact, in a moment, for any size.

A layer runs under `FakeTensorMode` on the device of the run, so that it takes the same kernels, once for a microbatch and once for
two. The difference is what a microbatch keeps: what does not grow with the tokens (weights, casts of weights, tables of
positions) is not in it. Every storage counts once, whole, as a view keeps all of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from megatron_scratch.config import Config
from megatron_scratch.config.attention import wants_dense
from megatron_scratch.models.attend import make_mask
from megatron_scratch.models.decoder import Decoder
from megatron_scratch.parallel.layout import local
from megatron_scratch.parallel.recompute import Cost, unwrap, wrap
from megatron_scratch.parallel.tensor import token_part


class Saved(saved_tensors_hooks):
    """Counts the bytes of the storages that autograd keeps inside, but for `known` ones."""

    def __init__(self, known: Sequence[torch.Tensor] = ()) -> None:
        self.storages: dict[int, Any] = {}  # held until the end: an address must not come back
        self.known = {x.untyped_storage()._cdata for x in known}
        super().__init__(self._see, lambda x: x)

    def _see(self, x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        self.storages[storage._cdata] = storage
        return x

    @property
    def bytes(self) -> int:
        return sum(s.nbytes() for key, s in self.storages.items() if key not in self.known)


@dataclass(frozen=True)
class Count:
    """Of a forward of one layer."""

    kept: int  # bytes
    flops: int
    core: int  # of these, FLOPs of softmax(q k^T) v


def costs(decoder: Decoder, cfg: Config) -> dict[str, Cost]:
    """Cost of a layer in each of the modes that a budget mixes."""
    one = cfg.train.micro_batch_size
    plain = count(decoder, cfg, "none", one)
    # Attention by a kernel whose FLOPs nobody counts is no free one.
    again = {"none": 0, "selective": plain.core or plain.flops, "full": plain.flops}
    kept = {mode: count(decoder, cfg, mode, 2 * one).kept - count(decoder, cfg, mode, one).kept for mode in again}
    return {mode: Cost(kept[mode], again[mode]) for mode in again}


def count(decoder: Decoder, cfg: Config, mode: str, sequences: int) -> Count:
    """One forward of the first layer, which is on the meta device and not yet wrapped; collectives send nothing."""
    layer, topo = next(iter(decoder.layers.values())), decoder.topo
    parts = {name: local(p).detach() for name, p in layer.named_parameters()}
    wrap(layer, mode)
    flops = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    inside: list[int] = []
    core = layer.attention.core

    def counted(*args: Any) -> torch.Tensor:
        before = flops.get_total_flops()
        out = core(*args)
        inside.append(flops.get_total_flops() - before)
        return out

    try:
        layer.attention.core = counted
        with FakeTensorMode(), flops:
            parameters = {
                name: torch.empty(x.shape, dtype=x.dtype, device=topo.device, requires_grad=True) for name, x in parts.items()
            }
            x_ND, *others = _inputs(decoder, cfg, sequences)
            with (saved := Saved(tensors(others))):
                functional_call(layer, parameters, (x_ND, *others))
            return Count(saved.bytes, flops.get_total_flops(), sum(inside))
    finally:
        unwrap(layer)


def _inputs(decoder: Decoder, cfg: Config, sequences: int) -> tuple[Any, ...]:
    """What the decoder gives its layers: activations, rotation, mask, seed."""
    topo, seq, device = decoder.topo, cfg.train.seq_len, decoder.topo.device
    part = token_part(sequences * seq, topo)
    shape = (part.stop - part.start, cfg.model.hidden_size)
    x_ND = torch.empty(shape, dtype=decoder.compute_dtype, device=device, requires_grad=True)
    rows = sequences if cfg.data.mask_documents else 1
    documents = torch.zeros(rows, seq, dtype=torch.long, device=device) if cfg.data.mask_documents else None
    mask = make_mask(seq, seq, cfg.model.sliding_window, documents, device, wants_dense(cfg.model.attention))
    position = copy(decoder.position)
    position._buffers = {name: torch.empty(b.shape, dtype=b.dtype, device=device) for name, b in position._buffers.items()}
    rotation = position.rotation(torch.zeros(rows, seq, dtype=torch.long, device=device), decoder.compute_dtype)
    return x_ND, rotation, mask, torch.tensor(0) if cfg.model.dropout > 0 else None


def tensors(values: Any) -> list[torch.Tensor]:
    """All tensors in what a layer is given beside the activations: they are the same for every layer, and kept once."""
    if isinstance(values, torch.Tensor):
        return [values]
    if is_dataclass(values):
        values = [getattr(values, f.name) for f in fields(values)]
    return [x for value in values for x in tensors(value)] if isinstance(values, (list, tuple)) else []


def _product(a: Sequence[int], b: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """FLOPs of a (N, I) times b (O, I)."""
    return 2 * math.prod(a) * b[0]


def _attention(q: Sequence[int], k: Sequence[int], v: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(q, k, v)


# Kernels that torch's counter does not know.
FORMULAS = {
    torch.ops.megatron_scratch.onednn: _product,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
}
