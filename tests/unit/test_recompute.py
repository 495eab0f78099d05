"""Recomputation changes no bit, keeps what it says, and refuses what cannot take effect; what is kept is what the formulas say."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_scratch.config import Config, check, compose
from megatron_scratch.config.recompute import OPERATORS
from megatron_scratch.models.decoder import Decoder
from megatron_scratch.models.dropout import dropout
from megatron_scratch.models.gemm import onednn_is_faster
from megatron_scratch.parallel import SINGLE, recompute
from megatron_scratch.parallel.layout import materialize
from megatron_scratch.parallel.recompute import Cost, mixture
from megatron_scratch.train import activations, build
from megatron_scratch.util.errors import UserError

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
import activation_memory

TINY = ["model=gpt2_tiny", "model.vocab_size=99", "model.num_layers=4", "model.hidden_size=32", "model.attention=sdpa",
        "train.seq_len=24", "train.micro_batch_size=2"]  # fmt: skip
FULL, SELECTIVE, OFFLOAD = "parallel.recompute=full", "parallel.recompute=selective", "parallel.offload_activations=true"
OPS, SAVE = "parallel.recompute=ops", "parallel.recompute_save=[matmul,attention]"
BUDGET = ["parallel.recompute=budget", "parallel.recompute_budget=0.5"]
MODES = [[FULL], [FULL, "parallel.recompute_every=2"], [SELECTIVE], [OPS, SAVE], [OPS, "parallel.recompute_save=[matmul]"], BUDGET,
         [OFFLOAD], [FULL, OFFLOAD], [SELECTIVE, OFFLOAD]]  # fmt: skip


def decoder_of(words: list[str]) -> Decoder:
    cfg = compose.load([*TINY, *words])
    check(cfg, 1)
    model = build.build_model(cfg, SINGLE).decoder
    recompute.apply(model.layers, cfg.parallel, lambda: activations.costs(model, cfg), False)
    materialize(model, cfg.seed, torch.device("cpu"))
    return model


def gradients(model: Decoder) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients, and how often an attention core was computed."""
    calls, tokens = [], torch.arange(48).view(2, 24)
    for layer in model.layers.values():
        plain = layer.attention.attend
        layer.attention.attend = lambda *args, plain=plain: (calls.append(1), plain(*args))[1]
    model(tokens, seed=7).double().square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, len(calls)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dropout_p", [0.2, 0.0])
@pytest.mark.parametrize("words", MODES, ids=" ".join)
def test_changes_no_bit(words: list[str], dropout_p: float, precision: str) -> None:
    if dropout_p == 0.0 and SELECTIVE in words:
        pytest.skip("refused")
    shared = [f"model.dropout={dropout_p}", f"precision={precision}"]
    (want, once), (got, again) = gradients(decoder_of(shared)), gradients(decoder_of([*words, *shared]))
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)
    kept = words == [OFFLOAD] or SAVE in words  # in [OPS, SAVE] the function is called again, its kernel is not
    assert again > once or kept or words == BUDGET


def test_every_nth_counts_layers_of_the_whole_model() -> None:
    cfg = compose.load([*TINY, FULL, "parallel.recompute_every=2", "model.dropout=0.2"])
    layers = dict(list(build.build_model(cfg, SINGLE).decoder.layers.items())[1:])  # a stage with layers 1 to 3
    recompute.apply(layers, cfg.parallel, dict, False)
    assert ["forward" in vars(layer) for layer in layers.values()] == [False, True, False]


class Computed(TorchDispatchMode):
    """How often each operator is really computed."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Computed:
        self.counts: Counter[str] = Counter()
        return super().__enter__()


def test_an_operator_that_is_kept_is_not_computed_again() -> None:
    counts = []
    for words in ([FULL], [OPS, "parallel.recompute_save=[matmul]"], [OPS, SAVE]):
        hidden = decoder_of([*words, "model.dropout=0.0"])(torch.arange(48).view(2, 24), seed=7)
        with Computed() as computed:
            hidden.sum().backward()
        counts.append([sum(computed.counts[name] for name in OPERATORS[kept]) for kept in ("attention", "matmul")])
    (attention, products), *others = counts
    assert attention == 4
    # torch's own product has kept its input before it computes, so the last of a layer's 4 is not computed again anyway.
    less = 16 if onednn_is_faster() else 12
    assert others == [[4, products - less], [0, products - less]]


def kept_by_first_layer(model: Decoder, sequences: int) -> int:
    layer, given = model.layers["0"], []
    with layer.register_forward_pre_hook(lambda _, args: given.append(args)):
        model(torch.zeros(sequences, 24, dtype=torch.long), seed=1)
    with (saved := activations.Saved(activations.tensors(given[0][1:]))):
        layer(*given[0])
    return saved.bytes


@pytest.mark.parametrize("words", [[], ["model.attention=matmul", "model.dropout=0.0"], ["model=llama_tiny"]], ids=" ".join)
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_counts_without_memory_are_those_of_real_tensors(words: list[str], mode: str) -> None:
    cfg = compose.load([*[w for w in TINY if w not in ("model=gpt2_tiny", "model.attention=sdpa") or not words], *words])
    model = build.build_model(cfg, SINGLE).decoder
    want = activations.costs(model, cfg)[mode].kept
    recompute.wrap(model.layers["0"], mode)
    materialize(model, 1, torch.device("cpu"))
    small, large = (kept_by_first_layer(model, sequences) for sequences in (2, 4))
    assert large - small == want


def test_budget_takes_the_cheapest_mix_and_refuses_what_cannot_be() -> None:
    costs = {"none": Cost(100, 0), "selective": Cost(60, 10), "full": Cost(5, 100)}
    assert mixture(costs, 4, 1.0) == ["none"] * 4
    assert mixture(costs, 4, 0.8) == ["selective"] * 2 + ["none"] * 2
    assert mixture(costs, 4, 0.5) == ["full"] + ["selective"] * 3
    assert mixture(costs, 4, 0.05) == ["full"] * 4
    with pytest.raises(UserError, match="allowed: 0.050"):
        mixture(costs, 4, 0.04)


REFUSED = [
    (["parallel.recompute=ful"], "did you mean 'full'"),
    (["parallel.recompute_every=2"], "no effect with parallel.recompute=none"),
    ([FULL, "parallel.recompute_every=9"], "allowed: 1 to 4"),
    ([FULL, SAVE], "no effect with parallel.recompute=full"),
    ([SELECTIVE, "parallel.recompute_budget=0.5"], "no effect with parallel.recompute=selective"),
    ([SELECTIVE], "no effect with model.attention=sdpa"),
    ([OPS], "which is empty"),
    ([OPS, "parallel.recompute_save=[matmuls]"], "did you mean 'matmul'"),
    ([OPS, SAVE, "model.attention=matmul"], "keeps what torch's own kernels return"),
    ([OPS, SAVE, OFFLOAD], "cannot be moved to the host"),
    ([OPS, SAVE, "engine=zero3"], "gathers are operators too"),
    ([OPS, SAVE, "model.dropout=0.1", "train.compile=true"], "out of sight"),
    ([OFFLOAD, "train.compile=true"], "very layout it had"),
    (["parallel.recompute=budget"], "above 0 and below 1"),
    (["parallel.recompute=budget", "parallel.recompute_budget=1.5"], "above 0 and below 1"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED, ids=[" ".join(words) for words, _ in REFUSED])
def test_refuses(words: list[str], message: str) -> None:
    plain = [] if any(word.startswith("model.attention") for word in words) else ["model.attention=sdpa"]
    cfg: Config = compose.load([*TINY[:-3], *TINY[-2:], *plain, "model.dropout=0.0", *words] if "model.dropout=0.1" not in words
                               else [*TINY, *words])  # fmt: skip
    with pytest.raises(UserError, match=message) as error:
        check(cfg, cfg.parallel.pp)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dropout_keeps_a_byte_per_number(dtype: torch.dtype) -> None:
    x = torch.randn(64, 32, dtype=dtype, requires_grad=True)
    with (saved := activations.Saved()):
        y = dropout(x, 0.1, torch.tensor(3), "here", SINGLE)
    assert saved.bytes == x.numel()
    y.sum().backward()
    assert x.grad is not None
    scale = torch.ones((), dtype=dtype).div_(0.9)
    assert torch.equal(x.grad, torch.where(y == 0, 0.0, scale)) and torch.equal(y, x * x.grad)


SINGLE_ROWS = [row for row in activation_memory.rows() if not any(word.startswith("parallel.tp") for word in row.words)]


@pytest.mark.parametrize("row", SINGLE_ROWS, ids=[f"{row.what}-{row.mode}-{row.formula}" for row in SINGLE_ROWS])
def test_a_layer_keeps_what_the_formulas_say(row: activation_memory.Row) -> None:
    counted, expected = activation_memory.kept(row)
    assert abs(counted / expected - 1) <= activation_memory.LIMIT
