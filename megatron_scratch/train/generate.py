"""Text from a model, a token at a time: greedy, temperature, top-k, top-p, with a KV cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_scratch.models.cache import KVCache
from megatron_scratch.models.decoder import Decoder
from megatron_scratch.util.errors import UserError


def pick(logits_V: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator) -> int:
    """Draw one id from logits over the true vocabulary, shape (V,).

    temperature 0 is greedy. top_k keeps the k likeliest; top_p (nucleus, arXiv 1904.09751) keeps the fewest likeliest ids whose
    probabilities reach p, at least one. Both may be given: k first.
    """
    if temperature == 0:
        return int(logits_V.argmax())
    logits_V = logits_V.float() / temperature
    if top_k is not None and top_k < logits_V.numel():
        smallest = logits_V.topk(top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < smallest, float("-inf"))
    p_V = logits_V.softmax(-1)
    if top_p is not None and top_p < 1:
        sorted_V, order_V = p_V.sort(descending=True)
        beyond_V = sorted_V.cumsum(0) - sorted_V >= top_p  # what stands before an id already reaches p
        p_V = p_V.index_fill(0, order_V[beyond_V], 0.0)
    return int(torch.multinomial(p_V, 1, generator=generator))


@torch.no_grad()
def generate(
    decoder: Decoder, prompt: list[int], max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None, seed: int
) -> Iterator[int]:
    """Yield up to `max_new_tokens` ids after `prompt` (at least one id). The caller stops at the end of a document.

    Raises:
        UserError: prompt and new tokens together are longer than the model's context.
    """
    room, vocab = decoder.cfg.max_seq_len, decoder.cfg.vocab_size
    if len(prompt) + max_new_tokens > room:
        raise UserError(f"prompt of {len(prompt)} tokens + max_new_tokens={max_new_tokens} is beyond the context of {room}; "
                        f"ask for at most {max(room - len(prompt), 0)} new tokens")  # fmt: skip
    device = next(decoder.parameters()).device
    cache = KVCache(decoder.cfg, 1, len(prompt) + max_new_tokens, device, decoder.compute_dtype)
    generator = torch.Generator().manual_seed(seed)
    fresh = prompt
    for _ in range(max_new_tokens):
        tokens_BS = torch.tensor([fresh], device=device)
        hidden_BSD = decoder(tokens_BS, cache=cache)
        logits_V = decoder.logits(hidden_BSD[:, -1:])[0, -1, :vocab].cpu()
        fresh = [pick(logits_V, temperature, top_k, top_p, generator)]
        yield fresh[0]
