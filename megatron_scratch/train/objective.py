"""The model as the engine sees it: token ids and labels in, one loss out; or, where it writes, the logits of what comes next."""

from __future__ import annotations

import torch
from torch import nn

from megatron_scratch.models.decoder import Decoder


class LanguageModel(nn.Module):
    """A decoder and its objective under one forward, so that what wraps a module (DDP, FSDP, DeepSpeed) sees the whole of it.

    Parameter names are the decoder's own: the engine and the checkpoints never see this wrapper's prefix.
    """

    def __init__(self, decoder: Decoder, z_loss: float) -> None:
        super().__init__()
        self.decoder, self.z_loss = decoder, z_loss

    def forward(
        self, tokens_BS: torch.Tensor, labels_BS: torch.Tensor | None = None, positions_BS: torch.Tensor | None = None,
        documents_BS: torch.Tensor | None = None, seed: int | torch.Tensor | None = None, x_ND: torch.Tensor | None = None,
        last_B: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Sum of the loss over labels that are not ignored, a scalar in fp32 nats; in eval mode the cross entropy alone.
        From a stage of a pipeline that is not the last, the stream of activations.

        `seed` of this microbatch's dropout; None: no dropout. `x_ND`: the stream from the stage before. `last_B`: in place of
        labels, where in each row the last token of its text is; what comes out are the logits of the token after it, (B, V).
        """
        hidden_BSD = self.decoder(tokens_BS, positions_BS, documents_BS, seed if self.training else None, x_ND=x_ND)
        if not self.decoder.last:
            return hidden_BSD
        if last_B is not None:
            return self.decoder.logits(hidden_BSD[torch.arange(len(last_B), device=last_B.device), last_B])
        assert labels_BS is not None
        return self.decoder.loss_sum(hidden_BSD, labels_BS, self.z_loss if self.training else 0.0)[0]
