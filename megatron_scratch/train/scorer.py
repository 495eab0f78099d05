"""What lm-evaluation-harness asks of a model, in token ids: the log-likelihood of a continuation, and text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import torch

from megatron_scratch.data.tokenizer import Tokenizer
from megatron_scratch.models.decoder import Decoder
from megatron_scratch.models.objective import chunk_tokens
from megatron_scratch.train.generate import generate
from megatron_scratch.util.errors import UserError

NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "length_penalty": 1.0, "typical_p": 1.0,
           "min_p": 0.0, "no_repeat_ngram_size": 0, "use_cache": True}  # fmt: skip
TAKEN = frozenset({"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"})

Pair = tuple[list[int], list[int]]  # context (at least one id), continuation


class Scorer:
    """What a model makes of token ids. Contexts that are too long lose their beginning; `cut` counts them.

    Sequences of a batch are as long as its longest: what is filled up stands behind them, where no token of a causal model looks.
    """

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, batch: int) -> None:
        """`batch`: sequences at a time."""
        self.decoder, self.tokenizer, self.batch = decoder, tokenizer, batch
        self.room, self.vocab = decoder.cfg.max_seq_len, decoder.cfg.vocab_size
        self.device = next(decoder.parameters()).device
        self.cut = 0

    @torch.no_grad()
    def loglikelihoods(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """(log-probability of the continuation in nats, whether it is what greedy decoding gives) of each pair.

        The longest first. Pairs that are the same up to their last token, as the answers A, B, C, D are, cost one sequence.

        Raises:
            UserError: a continuation is longer than the model's context.
        """
        inputs: dict[tuple[int, ...], list[int]] = {}
        for i, (context, continuation) in enumerate(pairs):
            if not continuation:
                continue
            if len(continuation) > self.room:
                raise UserError(f"a continuation of {len(continuation)} tokens is beyond the model's context of {self.room} "
                                "(model.max_seq_len); leave this task out")  # fmt: skip
            whole = context + continuation
            self.cut += len(whole) > self.room + 1
            inputs.setdefault(tuple(whole[-self.room - 1 : -1]), []).append(i)
        found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        waiting = iter(sorted(inputs, key=len, reverse=True))
        while batch := list(islice(waiting, self.batch)):
            for tokens, hidden_SD in zip(batch, self._hidden(batch), strict=True):
                for i in inputs[tokens]:
                    found[i] = self._score(hidden_SD[: len(tokens)], pairs[i][1])
        return found

    def _hidden(self, batch: Sequence[Sequence[int]]) -> torch.Tensor:
        longest = max(map(len, batch))
        filled = [[*tokens, *[self.tokenizer.eod_id] * (longest - len(tokens))] for tokens in batch]
        return self.decoder(torch.tensor(filled, device=self.device))  # type: ignore[no-any-return]

    def _score(self, hidden_SD: torch.Tensor, continuation: list[int]) -> tuple[float, bool]:
        """Of a continuation whose last token is not in what went in, but the answer to it."""
        total, greedy, size = 0.0, True, chunk_tokens(self.decoder.cfg.padded_vocab)
        rows = zip(hidden_SD[-len(continuation) :].split(size), torch.tensor(continuation).split(size), strict=True)
        for part_CD, ids_C in rows:
            logp_CV = self.decoder.logits(part_CD.unsqueeze(0))[0, :, : self.vocab].float().log_softmax(-1)
            ids_C = ids_C.to(logp_CV.device)
            total += float(logp_CV.gather(1, ids_C.unsqueeze(1)).double().sum())
            greedy &= bool((logp_CV.argmax(-1) == ids_C).all())
        return total, greedy

    def text(self, prompt: list[int], options: Mapping[str, Any], seed: int) -> str:
        """What the model writes after a prompt, up to the end of a document, the first of `until` or the limit.

        Args:
            options: until (strings), max_gen_toks, temperature (0: greedy), top_k, top_p.
        """
        new = options["max_gen_toks"]
        if not 0 < new < self.room:
            raise UserError(f"a task asks for max_gen_toks={new}, and the model's context is {self.room} (model.max_seq_len); give "
                            "the task a smaller max_gen_toks in its generation_kwargs")  # fmt: skip
        self.cut += len(prompt) > self.room - new
        ids = prompt[-(self.room - new) :] or [self.tokenizer.eod_id]
        stops, written, stream = [s for s in options["until"] if s], "", self.tokenizer.decode_stream()
        drawn = generate(self.decoder, ids, new, options["temperature"], options["top_k"], options["top_p"], seed)
        for token in drawn:
            if token == self.tokenizer.eod_id:
                break
            if token < self.tokenizer.vocab_size:  # a model may have ids that its tokenizer does not know
                written += stream.push(token)
            if any(stop in written for stop in stops):
                break
        else:
            written += stream.flush()
        return written[: min((written.find(stop) for stop in stops if stop in written), default=len(written))]


def sampling(given: Mapping[str, Any], default_new: int) -> dict[str, Any]:
    """What `Scorer.text` takes, from a task's generation_kwargs as lm-eval has normalised them.

    Raises:
        UserError: the task asks for something that we do not have, e.g. a beam search.
    """
    for key, value in given.items():
        if key not in TAKEN and value not in (None, NEUTRAL.get(key, None)):
            raise UserError(f"a task asks for {key}={value!r} in its generation_kwargs, which is not known here; known: "
                            f"{', '.join(sorted(TAKEN))}")  # fmt: skip
    temperature = float(given.get("temperature", 1.0)) if given.get("do_sample") else 0.0
    greedy = temperature == 0
    return {"until": given.get("until") or [], "max_gen_toks": int(given.get("max_gen_toks") or default_new),
            "temperature": temperature, "top_k": None if greedy else given.get("top_k") or None,
            "top_p": None if greedy else given.get("top_p")}  # fmt: skip
