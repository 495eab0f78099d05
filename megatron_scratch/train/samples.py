"""Text that the model writes while it is trained, under any layout, by all ranks together.

There is no cache of keys and values: for each token the whole text passes through the model once more, in the way of an evaluation,
so that whatever shards the model or cuts it into stages takes part as it does there. All prompts are written at once, a row each.
Rows are as long as the longest prompt and its continuation (rounded up), from the first token to the last: what follows a text in
its row is filler, which causal attention does not see. Where something is compiled for its shapes, a batch has training's.

Cost: one forward pass for each token, `train.samples.tokens` in all, and a message of 8 bytes a prompt over the host with each.

A text is a function of the weights, the seed, the step and the prompt's number: one rank draws, from probabilities that are the
same under every layout up to rounding, with a generator of its own. Nothing of the training is touched.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from megatron_scratch.config.samples import SamplesConfig, refuse_long
from megatron_scratch.config.train import TrainConfig
from megatron_scratch.data.tokenizer import Tokenizer
from megatron_scratch.parallel.collectives import all_reduce_world
from megatron_scratch.parallel.topology import Topology
from megatron_scratch.train.console import View
from megatron_scratch.train.generate import pick
from megatron_scratch.train.loop import Every
from megatron_scratch.train.objective import LanguageModel
from megatron_scratch.train.passes import Passes
from megatron_scratch.train.rates import Rates
from megatron_scratch.train.rundir import RunDir
from megatron_scratch.train.step import StepResult
from megatron_scratch.util.errors import UserError
from megatron_scratch.util.seeds import seed_from

MULTIPLE = 16  # tokens of a batch on a tp rank: fp8 products want it
SHOWN = 100  # characters of a text on the screen

Pick = Callable[[int, torch.Tensor], int]  # (number of the prompt, logits of shape (V,)) -> id


class Writer:
    """Continues texts. Legend: B rows of a batch, S tokens of a row, V padded vocabulary."""

    def __init__(self, models: Sequence[LanguageModel], passes: Passes, topo: Topology, train: TrainConfig) -> None:
        """`models`: the model, or this rank's stages of it."""
        self.models, self.passes, self.topo, self.train = models, passes, topo, train
        # A kernel that is compiled anew for other lengths could be one that training takes from there on.
        self.exact = train.compile or models[0].decoder.cfg.attention == "flex"

    @torch.no_grad()
    def write(self, prompts: Sequence[list[int]], tokens: int, pick: Pick, eod: int) -> list[list[int]]:
        """Up to `tokens` ids after each prompt (of at least one id), without `eod`, which ends a text; collective, and the same on
        every rank."""
        for model in self.models:
            model.eval()
        rows, length = self._shape(prompts, tokens)
        out: list[list[int]] = []
        for first in range(0, len(prompts), rows):
            some = prompts[first : first + rows]
            out += self._continue([list(p) for p in some], length, tokens, lambda i, row, first=first: pick(first + i, row), eod)
        for model in self.models:
            model.train()
        return out

    def _shape(self, prompts: Sequence[list[int]], tokens: int) -> tuple[int, int]:
        """(prompts that are written at once, S): no more tokens than a microbatch has."""
        t = self.train
        if self.exact:
            return t.micro_batch_size, t.seq_len
        unit = MULTIPLE * self.topo.size("tp")
        longest = max(len(p) for p in prompts) + tokens
        length = min(-(-longest // unit) * unit, t.seq_len)
        return t.micro_batch_size * t.seq_len // length, length

    def _continue(self, texts: list[list[int]], length: int, tokens: int, pick: Pick, eod: int) -> list[list[int]]:
        starts, going = [len(text) for text in texts], [True] * len(texts)
        for _ in range(tokens):
            ids = self._next(texts, going, length, pick, eod)
            self.passes.pulse.tick()
            for i, new in enumerate(ids):
                going[i] = going[i] and new != eod
                texts[i] += [new] * going[i]
            if not any(going):
                break
        return [text[start:] for text, start in zip(texts, starts, strict=True)]

    def _next(self, texts: list[list[int]], going: list[bool], length: int, pick: Pick, eod: int) -> list[int]:
        """The id that follows each text, drawn by one rank: what is computed on several ranks need not have the same bits."""
        tokens_BS = torch.full((self._rows(len(texts), length), length), eod)
        last_B = torch.zeros(len(tokens_BS), dtype=torch.int64)
        for i, text in enumerate(texts):
            tokens_BS[i, : len(text)] = torch.tensor(text)
            last_B[i] = len(text) - 1
        device, ids = self.topo.device, torch.zeros(len(texts), dtype=torch.int64)
        logits_BV = self.passes.logits(tokens_BS.to(device), last_B.to(device))
        if logits_BV is not None and self.topo.index("tp") == 0 and self.topo.index("dp") == 0:
            host_BV = logits_BV.float().cpu()
            for i in range(len(texts)):
                ids[i] = pick(i, host_BV[i]) if going[i] else eod
        return all_reduce_world(ids, self.topo).tolist()  # type: ignore[no-any-return]

    def _rows(self, texts: int, length: int) -> int:
        """B: more than there are texts where tokens could not be dealt out to tp ranks otherwise, or shapes are training's."""
        unit = MULTIPLE * self.topo.size("tp")
        return self.train.micro_batch_size if self.exact else next(n for n in range(texts, texts + unit) if n * length % unit == 0)


class WriteSamples:
    """A hook: every n steps and at the end the model writes, and training's clock stands still."""

    def __init__(self, cfg: SamplesConfig, seed: int, tokenizer: Tokenizer | None, writer: Writer, run: RunDir, view: View,
                 rates: Rates) -> None:  # fmt: skip
        """
        Raises:
            UserError: the data has no tokenizer; a prompt is too long.
        """
        if tokenizer is None:
            raise UserError(f"train.samples.every={cfg.every} needs a tokenizer, and the data has none; give data.tokenizer=FILE, "
                            "or train.samples.every=0")  # fmt: skip
        self.cfg, self.seed, self.tokenizer, self.writer = cfg, seed, tokenizer, writer
        self.run_dir, self.view, self.rates = run, view, rates
        self.is_due = Every(cfg.every, at_stop=False)
        self.prompts = [tokenizer.encode(prompt) if prompt else [tokenizer.eod_id] for prompt in cfg.prompts]
        for prompt, ids in zip(cfg.prompts, self.prompts, strict=True):
            refuse_long(cfg, prompt, len(ids), writer.train.seq_len)

    def due(self, step: int, finished: bool, stopped: bool) -> bool:
        return self.cfg.every > 0 and self.is_due(step, finished, stopped)

    def run(self, step: int, result: StepResult) -> None:
        resume = self.rates.pause()
        generators = [torch.Generator().manual_seed(seed_from("sample", self.seed, step, i)) for i in range(len(self.prompts))]
        eod, vocab = self.tokenizer.eod_id, min(self.tokenizer.vocab_size, self.writer.models[0].decoder.cfg.vocab_size)

        def draw(number: int, logits_V: torch.Tensor) -> int:
            logits_V = logits_V[:vocab]  # of what both the model and its tokenizer have
            if not bool(torch.isfinite(logits_V).all()):
                return eod  # there is nothing to draw from, and a run need not end because of it
            return pick(logits_V, self.cfg.temperature, self.cfg.top_k, None, generators[number])

        written = self.writer.write(self.prompts, self.cfg.tokens, draw, eod)
        for prompt, ids in zip(self.cfg.prompts, written, strict=True):
            self._show(step, prompt, self._text(ids))
        resume()

    def _text(self, ids: list[int]) -> str:
        stream = self.tokenizer.decode_stream()
        return "".join(map(stream.push, ids)) + stream.flush()

    def _show(self, step: int, prompt: str, text: str) -> None:
        if self.writer.topo.is_main:
            self.run_dir.sample({"step": step, "time": time.time(), "tokens": self.rates.tokens_at(step), "prompt": prompt,
                                 "text": text})  # fmt: skip
        whole = " ".join((prompt + text).split())
        self.view.say(f"step {step}: {whole[:SHOWN]}{'...' * (len(whole) > SHOWN)}")
