"""Tensor-parallel pieces by themselves: pairs of messages that are adjoint, the same bits with overlap, randomness, bad ids."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ranks import run_ranks

from megatron_scratch.config.model import ModelConfig
from megatron_scratch.models import Decoder
from megatron_scratch.models.dropout import dropout
from megatron_scratch.models.linear import check_ids
from megatron_scratch.parallel import SINGLE, Topology, materialize
from megatron_scratch.parallel.layout import localize
from megatron_scratch.parallel.tensor import enter, leave, token_part
from megatron_scratch.util.errors import UserError

CFG = ModelConfig(vocab_size=99, num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, ffn_size=48, max_seq_len=16,
                  fused_qkv=False, bias=True, init_std=0.2)  # fmt: skip


def _adjoint(topo: Topology, sequence: bool) -> tuple[float, float]:
    """<leave(x), y> and <x, leave'(y)>, and the same of enter, each summed over ranks as the stream of tokens is laid out."""
    topo = replace(topo, sequence_parallel=sequence)
    g = torch.Generator().manual_seed(topo.rank)
    inside, outside = torch.randn(8, 3, generator=g), torch.randn(8, 3, generator=torch.Generator().manual_seed(9))
    outside = outside[token_part(8, topo)]
    worst = 0.0
    for fn, x, y in ((leave, inside, outside), (enter, outside, inside)):
        x = x.clone().requires_grad_()
        out = fn(x, topo)
        out.backward(y)
        # Inside, each rank has a part of the sum; outside, all (plain) or some (sequence) of the tokens.
        weights = (
            (1.0 if sequence else 1 / topo.size("tp"), 1.0) if fn is leave else (1.0, 1.0 if sequence else 1 / topo.size("tp"))
        )
        both = torch.stack([(out * y).sum() * weights[0], (x * x.grad).sum() * weights[1]]).detach().double()
        torch.distributed.all_reduce(both)
        worst = max(worst, float((both[0] - both[1]).abs()))
    return worst, float(both[0].abs())


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("tp", [2, 4])
def test_enter_and_leave_are_adjoint(tp: int, sequence: bool) -> None:
    for error, size in run_ranks(tp, _adjoint, sequence, degrees={"tp": tp}):
        assert error < 1e-5 and size > 1e-2, "<A x, y> = <x, A' y>"


def _gradients(topo: Topology, sequence: bool, overlap: bool) -> dict[str, torch.Tensor]:
    decoder = Decoder(CFG, replace(topo, sequence_parallel=sequence, overlap=overlap))
    localize(decoder)
    materialize(decoder, 3, topo.device)
    ids = torch.randint(0, 99, (2, 16), generator=torch.Generator().manual_seed(0))
    loss, _ = decoder.loss_sum(decoder(ids), ids)
    loss.backward()
    return {"loss": loss.detach().clone(), **{n: p.grad.clone() for n, p in decoder.named_parameters()}}


def _overlap_changes(topo: Topology, sequence: bool) -> list[str]:
    plain, hidden = (_gradients(topo, sequence, overlap) for overlap in (False, True))
    return [name for name in plain if not torch.equal(plain[name], hidden[name])]


@pytest.mark.parametrize("sequence", [False, True])
def test_overlap_changes_no_bit(sequence: bool) -> None:
    assert run_ranks(2, _overlap_changes, sequence, degrees={"tp": 2}) == [[], []]


def _masks(topo: Topology, sequence: bool) -> list[list[float]]:
    topo = replace(topo, sequence_parallel=sequence)
    x = torch.ones(8, 4)[token_part(8, topo)]
    return dropout(x, 0.5, torch.tensor(1), "layers.0.mlp", topo).tolist()


def test_replicated_tokens_share_a_mask_and_parts_of_them_are_parts_of_it() -> None:
    whole = dropout(torch.ones(8, 4), 0.5, torch.tensor(1), "layers.0.mlp", SINGLE).tolist()
    assert {value for row in whole for value in row} == {0.0, 2.0}
    assert run_ranks(2, _masks, False, degrees={"tp": 2}) == [whole, whole]
    assert run_ranks(2, _masks, True, degrees={"tp": 2}) == [whole[:4], whole[4:]] and whole[:4] != whole[4:]


def test_masks_differ_by_site_and_microbatch() -> None:
    x = torch.ones(16, 16)
    drawn = [dropout(x, 0.5, torch.tensor(seed), site, SINGLE) for seed in (1, 2) for site in ("layers.0.mlp", "layers.1.mlp")]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
    assert torch.equal(drawn[0], dropout(x, 0.5, torch.tensor(1), "layers.0.mlp", SINGLE))
    assert dropout(x, 0.5, None, "", SINGLE) is x


def test_dropout_keeps_the_mean_and_differentiates_through_its_mask() -> None:
    x = torch.ones(200, 200, requires_grad=True)
    y = dropout(x, 0.3, torch.tensor(5), "embed", SINGLE)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    assert abs(y.detach().mean() - 1.0) < 0.02, "40,000 draws: a standard deviation of 0.0033"


def _bad_ids(topo: Topology, label: bool) -> str:
    decoder = Decoder(CFG, topo)
    localize(decoder)
    materialize(decoder, 3, topo.device)
    ids = torch.zeros(1, 16, dtype=torch.long)
    bad = ids.clone()
    bad[0, 3] = 99  # the first id of the padding: every look-up would find a row for it
    try:
        decoder.loss_sum(decoder(ids if label else bad), bad if label else ids)
    except UserError as error:
        return str(error)
    return "nothing was raised"


@pytest.mark.parametrize("label", [False, True])
def test_bad_ids_give_the_same_error_under_every_tp(label: bool) -> None:
    message = _bad_ids(SINGLE, label)
    assert f"{'label' if label else 'token id'} 99 is outside of the vocabulary" in message
    for tp in (2, 4):
        assert run_ranks(tp, _bad_ids, label, degrees={"tp": tp}) == [message] * tp


def test_ignored_labels_are_no_ids() -> None:
    check_ids(torch.tensor([0, -100]), 5, "label", ignored=-100)
    with pytest.raises(UserError, match="token id -1"):
        check_ids(torch.tensor([-1]), 5, "token id")


def _logits(topo: Topology) -> list[list[list[float]]]:
    decoder = Decoder(CFG, topo)
    localize(decoder)
    materialize(decoder, 3, topo.device)
    return decoder.logits(decoder(torch.arange(16).view(1, 16))).detach().tolist()


def test_logits_are_whole_on_every_rank() -> None:
    want = _logits(SINGLE)
    for got in run_ranks(2, _logits, degrees={"tp": 2}):
        torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=1e-5, atol=1e-5)
