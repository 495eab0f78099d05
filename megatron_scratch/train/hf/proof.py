"""The proof that two folders hold the same model: our logits and transformers', on fixed tokens, every position, every id.

Neither model is ever in memory whole. Both are built without memory; what is outside of the layers is read once, a layer's
weights when its forward begins, and they are dropped when it ends.

Legend: B 2 rows, S positions, V true vocabulary, L layers, K the longest sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from megatron_scratch.config.model import ModelConfig
from megatron_scratch.models.decoder import Decoder
from megatron_scratch.models.hf import family_of
from megatron_scratch.parallel import SINGLE
from megatron_scratch.util.errors import RunFailed, UserError

Fetch = Callable[[str], torch.Tensor]  # a parameter's name -> its value, fp32

LENGTH = 64  # positions of a row
FAR = 256  # of a rotation: beyond, the rounding of its frequency is all that the logits would show
MARGIN = 8.0  # how far beyond the typical size the largest of some 10^6 errors may lie


@dataclass(frozen=True)
class Proof:
    """The largest difference of two logits, what rounding alone can explain, and over how many they were compared."""

    worst: float
    tolerance: float
    largest: float
    positions: int
    vocab: int

    def __str__(self) -> str:
        return (f"worst difference {self.worst:.1e} over {self.positions} positions x {self.vocab} ids, tolerance "
                f"{self.tolerance:.1e} (fp32 on both sides; largest logit {self.largest:.3g})")  # fmt: skip


def import_transformers() -> Any:
    """
    Raises:
        UserError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError("the result is proved against transformers, which is not installed; run: "
                        "pip install 'megatron-scratch[hf]'") from error  # fmt: skip
    return transformers


def probe(cfg: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens_BS, positions_BS): ids from the first to the last of the vocabulary, shuffled; one row of adjacent positions, and one
    that spans the context (up to `FAR` of a rotation)."""
    assert cfg.vocab_size is not None
    length = min(LENGTH, cfg.max_seq_len)
    last = min(cfg.max_seq_len - 1, FAR if cfg.position == "rope" else cfg.max_seq_len)
    ids = torch.arange(2 * length) * (cfg.vocab_size - 1) // (2 * length - 1)
    tokens = ids[torch.randperm(2 * length, generator=torch.Generator().manual_seed(0))].view(2, length)
    steps = torch.arange(length)
    return tokens, torch.stack((steps, steps * last // max(length - 1, 1)))


def tolerance(cfg: ModelConfig, largest: float, positions_BS: torch.Tensor) -> float:
    """What rounding explains of a difference between logits, the largest of which is `largest`.

    fp32 rounds at u = 2^-24. A sum of K products in another order differs by some sqrt(K) u of its size (Higham & Mary,
    doi 10.1137/18M1226312), and 2 L + 1 such sums lie one behind the other: errors independent of each other add up to
    sqrt((2 L + 1) K) u. A frequency of a stretched rotation, which is computed in other steps there, may be rounded otherwise: it
    turns position P by P u.
    """
    longest = max(cfg.hidden_size, cfg.ffn, cfg.num_heads * cfg.head_size)
    far = int(positions_BS.max()) if cfg.position == "rope" and cfg.rope.scaling != "none" else 0
    return MARGIN * 2.0**-24 * (math.sqrt((2 * cfg.num_layers + 1) * longest) + far) * largest


@torch.no_grad()
def our_logits(cfg: ModelConfig, fetch: Fetch, tokens_BS: torch.Tensor, positions_BS: torch.Tensor) -> torch.Tensor:
    """(B, S, V) of our model, by the plain kernels, in fp32."""
    decoder = Decoder(replace(cfg, attention="reference", norm_kernel="torch"), SINGLE)
    give_buffers(decoder)
    lend(decoder, {f"layers.{i}": layer for i, layer in decoder.layers.items()}, fetch)
    return decoder.eval().logits(decoder(tokens_BS, positions_BS))[..., : cfg.vocab_size]


def give_buffers(model: nn.Module) -> None:
    """Memory and values for the buffers of a model without memory."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
        if hasattr(module, "reset_buffers"):
            module.reset_buffers()


@torch.no_grad()
def their_logits(config: Any, cfg: ModelConfig, fetch: Fetch, tokens_BS: torch.Tensor, positions_BS: torch.Tensor) -> torch.Tensor:
    """(B, S, V) of transformers' model of a config (a PretrainedConfig), in fp32. `fetch` takes names of its state_dict."""
    with _parameters_on_meta():
        model = import_transformers().AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    prefix = family_of(cfg).prefix
    layers: Any = model.get_submodule(prefix.removesuffix("."))
    lend(model, {f"{prefix}{i}": layer for i, layer in enumerate(layers)}, fetch)
    return call(model, tokens_BS, positions_BS)


@torch.no_grad()
def call(model: Any, tokens_BS: torch.Tensor, positions_BS: torch.Tensor) -> torch.Tensor:
    """(B, S, V) of a model of transformers. Without a mask, positions that jump would be taken for several documents."""
    out = model.eval()(tokens_BS, position_ids=positions_BS, attention_mask=torch.ones_like(tokens_BS), use_cache=False)
    return out.logits  # type: ignore[no-any-return]


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules built inside have parameters without memory, and buffers with their values (rotations' frequencies)."""
    plain = nn.Module.register_parameter

    def register(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        empty = parameter is None or parameter.is_meta  # as it is, so that tying finds one object under two names
        plain(self, name, parameter if empty else nn.Parameter(parameter.to("meta"), requires_grad=False))

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = plain  # type: ignore[method-assign]


def lend(model: nn.Module, blocks: Mapping[str, nn.Module], fetch: Fetch) -> None:
    """Give the parameters of a model without memory their values: now, or, inside of `blocks` (by their names), when one is called.

    A parameter under two names stays one; its first name is asked for.
    """
    inside = tuple(f"{name}." for name in blocks)
    _fill(model, "", fetch, inside)
    for name, block in blocks.items():
        block.register_forward_pre_hook(lambda module, args, name=name: _fill(module, f"{name}.", fetch))
        block.register_forward_hook(lambda module, args, out: _drop(module))


def _fill(model: nn.Module, prefix: str, fetch: Fetch, leave: tuple[str, ...] = ()) -> None:
    filled: dict[int, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if leave and name.startswith(leave):
            continue
        if id(parameter) not in filled:
            value = fetch(prefix + name)
            assert value.shape == parameter.shape, f"{prefix}{name}: {tuple(value.shape)} for {tuple(parameter.shape)}"
            filled[id(parameter)] = nn.Parameter(value, requires_grad=False)
        _set(model, name, filled[id(parameter)])


def _drop(model: nn.Module) -> None:
    for name, parameter in list(model.named_parameters()):
        _set(model, name, nn.Parameter(parameter.to("meta"), requires_grad=False))


def _set(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner)._parameters[leaf] = parameter


def compare(cfg: ModelConfig, ours_BSV: torch.Tensor, theirs_BSV: torch.Tensor, positions_BS: torch.Tensor) -> Proof:
    """
    Raises:
        RunFailed: they differ by more than rounding explains.
    """
    if ours_BSV.shape != theirs_BSV.shape:
        raise RunFailed(
            f"our logits are of shape {list(ours_BSV.shape)}, transformers' of {list(theirs_BSV.shape)}; nothing is written"
        )
    largest = float(theirs_BSV.abs().max())
    worst = float((ours_BSV - theirs_BSV).abs().max())
    proof = Proof(worst, tolerance(cfg, largest, positions_BS), largest, positions_BS.numel(), ours_BSV.shape[-1])
    if not worst <= proof.tolerance:  # a NaN is no proof
        raise RunFailed(f"the logits are not transformers': {proof}; nothing is written")
    return proof
