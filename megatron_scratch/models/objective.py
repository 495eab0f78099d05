"""The training objective: next-token cross entropy in fp32, summed; the trainer divides by the global number of tokens.

Per token with logits l, label y and Z = sum exp(l):  loss = log Z - l_y + z log(Z)^2  (z-loss: PaLM, arXiv 2204.02311).

Over tp the vocabulary is cut: each rank computes the logits of its own ids, and a chunk's logits are never brought together. What
travels per token is two numbers of each rank, log Z over its ids and the label's logit (0 where another rank has it):
log Z = logsumexp over ranks of theirs. The gradient of the hidden states is then each rank's part of a sum over tp.

Legend: B batch, S sequence, N = B S tokens, C tokens of a chunk, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from megatron_scratch.models.gemm import product
from megatron_scratch.parallel.collectives import all_gather
from megatron_scratch.parallel.topology import SINGLE, Topology

IGNORE = -100  # label of a token that is not trained on
CHUNK_LOGITS = 2**25  # logits alive at once by default, 128 MiB in fp32: 667 tokens of a 50,304 vocabulary, 32,768 of 1,024


def cross_entropy_sum(logits_BSV: torch.Tensor, labels_BS: torch.Tensor, z_loss: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """The plain one, the yardstick: all logits at once, in fp32 (fp64 stays).

    Args:
        logits_BSV: (..., V); columns of -inf are allowed and take no part.
        labels_BS: (...) int64, IGNORE where a token does not count.
        z_loss: weight of log(Z)^2.

    Returns:
        (sum of losses, number of tokens that count), scalars on the device, of the loss's dtype and int64.
    """
    logits_NV, labels_N = logits_BSV.flatten(0, -2), labels_BS.flatten()
    logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    loss = F.cross_entropy(logits_NV, labels_N, ignore_index=IGNORE, reduction="sum")
    if z_loss:
        log_z_N = torch.logsumexp(logits_NV, dim=-1)
        loss = loss + z_loss * torch.where(labels_N == IGNORE, 0.0, log_z_N.square()).sum()
    return loss, (labels_N != IGNORE).sum()


def linear_cross_entropy_sum(
    hidden_BSD: torch.Tensor, weight_VD: torch.Tensor, labels_BS: torch.Tensor, z_loss: float = 0.0, chunk: int | None = None,
    topo: Topology = SINGLE, first_id: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """`cross_entropy_sum(hidden @ weight^T, labels)` without ever holding all logits.

    The head and the loss are computed for `chunk` tokens at a time, and so are their gradients, in the forward pass: the
    backward pass only scales them. Memory: 1 chunk of logits + the gradients of hidden and weight, instead of 3 times N x V.
    At a vocabulary of 50,304 that is what decides the peak (Cut Cross-Entropy, arXiv 2411.09009, shows the size of it).

    Args:
        weight_VD: fp32 master weight, cast to the dtype of hidden for the products; its gradient is summed in fp32. Over tp: this
            rank's rows, of which there may be none.
        chunk: tokens at a time; the same on every tp rank; default: as many as give CHUNK_LOGITS logits.
        first_id: the id of this rank's first row.
    """
    labels_N = labels_BS.flatten()
    assert chunk is not None or topo.size("tp") == 1, "each chunk is a message: all tp ranks must cut alike"
    chunk = chunk or chunk_tokens(weight_VD.shape[0])
    loss = _LinearCrossEntropy.apply(hidden_BSD.flatten(0, -2), weight_VD, labels_N, z_loss, chunk, topo, first_id)
    return loss, (labels_N != IGNORE).sum()  # type: ignore[return-value]


def chunk_tokens(rows: int) -> int:
    """Tokens of a chunk on a rank that computes `rows` logits a token."""
    return max(1, CHUNK_LOGITS // max(1, rows))


class _LinearCrossEntropy(torch.autograd.Function):
    """With p = softmax(l):  d loss / d l = p (1 + 2 z log Z) - onehot(y), on tokens that count."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, labels_N: torch.Tensor, z_loss: float, chunk: int,
        topo: Topology, first_id: int,
    ) -> torch.Tensor:  # fmt: skip
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        weight = weight_VD.to(hidden_ND.dtype)
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=hidden_ND.device)
        d_hidden = torch.empty_like(hidden_ND) if need_hidden else None
        d_weight = torch.zeros_like(weight_VD, dtype=wide) if need_weight else None
        for first in range(0, hidden_ND.shape[0], chunk):
            part = slice(first, first + chunk)
            logits_CV = product(hidden_ND[part], weight).to(wide)
            part_loss, d_logits_CV = _chunk_loss(logits_CV, labels_N[part], z_loss, topo, first_id)
            loss += part_loss
            d_logits_CV = d_logits_CV.to(hidden_ND.dtype)
            if d_hidden is not None:
                d_hidden[part] = product(d_logits_CV, weight.t())
            if d_weight is not None:
                d_weight += product(d_logits_CV.t(), hidden_ND[part].t())
        ctx.save_for_backward(d_hidden, d_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        d_hidden, d_weight = (None if d is None else d * grads[0].to(d.dtype) for d in ctx.saved_tensors)
        return d_hidden, d_weight, None, None, None, None, None


def _chunk_loss(
    logits_CV: torch.Tensor, labels_C: torch.Tensor, z_loss: float, topo: Topology, first_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of a chunk, the same on every tp rank, and its gradient by this rank's logits, which takes their place."""
    counts_C = labels_C != IGNORE
    mine_C = counts_C & (labels_C >= first_id) & (labels_C < first_id + logits_CV.shape[1])
    column_C1 = (labels_C - first_id).where(mine_C, 0).unsqueeze(1)
    log_z_C = torch.logsumexp(logits_CV, dim=-1)
    has_rows = logits_CV.shape[1] > 0  # a rank whose ids are all padding has none, and takes part in the message all the same
    label_C = logits_CV.gather(1, column_C1).squeeze(1).where(mine_C, 0.0) if has_rows else torch.zeros_like(log_z_C)
    if topo.size("tp") > 1:
        both_R2C = all_gather(torch.stack((log_z_C, label_C)), topo, "tp")
        log_z_C, label_C = torch.logsumexp(both_R2C[:, 0], dim=0), both_R2C[:, 1].sum(0)
    losses_C = log_z_C - label_C + z_loss * log_z_C.square()
    d_logits_CV = logits_CV.sub_(log_z_C.unsqueeze(1)).exp_()
    if z_loss:
        d_logits_CV.mul_((1.0 + 2.0 * z_loss * log_z_C).unsqueeze(1))
    if has_rows:
        d_logits_CV.scatter_add_(1, column_C1, -mine_C.unsqueeze(1).to(d_logits_CV.dtype))
    d_logits_CV.mul_(counts_C.unsqueeze(1))
    return torch.where(counts_C, losses_C, 0.0).sum(), d_logits_CV
