"""Bytes that a layer keeps for backward, beside the published formulas: `python benchmarks/activation_memory.py [--out FILE.md]`.

One layer of the 22B model of Korthikanti et al. (arXiv 2205.05198), and one of Llama 3 8B, without and with tensor and sequence
parallelism, are counted on tensors without memory (`train/activations.py`). Then a small model is really trained for one step in
each mode. A count that is further than 5 % from its formula exits with 1.
"""

from __future__ import annotations

import argparse
import math
import platform
import subprocess
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary

from megatron_scratch.config import Config, compose
from megatron_scratch.parallel import SINGLE, Topology, recompute
from megatron_scratch.parallel.layout import materialize
from megatron_scratch.train import activations, build
from megatron_scratch.train.forked import run_ranks
from megatron_scratch.util.env import Rank

LIMIT = 0.05
GPT = ["model=gpt2_tiny", "model.vocab_size=256", "model.num_layers=1", "model.hidden_size=6144", "model.num_heads=64",
       "model.max_seq_len=2048", "train.seq_len=2048", "train.micro_batch_size=4", "precision=bf16",
       "model.dropout=0.1"]  # fmt: skip
LLAMA = ["model=llama3_8b", "model.vocab_size=256", "model.num_layers=1", "train.seq_len=8192", "train.micro_batch_size=1",
         "precision=bf16", "model.attention=sdpa"]  # fmt: skip
PLAIN, KEPT = ["parallel.sequence_parallel=false"], ["parallel.overlap=true"]
SMALL = ["model=gpt2_tiny", "model.vocab_size=256", "model.attention=sdpa", "model.dropout=0.1", "train.seq_len=256",
         "train.micro_batch_size=2"]  # fmt: skip
MODES = [[], ["parallel.recompute=selective"], ["parallel.recompute=ops", "parallel.recompute_save=[matmul]"],
         ["parallel.recompute=budget", "parallel.recompute_budget=0.5"], ["parallel.recompute=full", "parallel.recompute_every=2"],
         ["parallel.recompute=full"], ["parallel.offload_activations=true"],
         ["parallel.recompute=full", "parallel.offload_activations=true"]]  # fmt: skip

NOTES = """Bytes per layer, in units of s b h (s tokens, b sequences, h width; a heads, g key/value heads, f feed-forward width, t
ranks), 16-bit activations, on one rank; all ranks keep the same. Every storage counts once; weights and casts of weights do
not count: what one microbatch keeps is what two keep, less what one does. Published for a GPT layer (Korthikanti et al.,
arXiv 2205.05198, table 2): 34 + 5as/h; with tp 10 + 24/t + 5as/ht; with sequence parallelism (34 + 5as/h)/t; selective
without the last term; full 2."""
TERMS = """Term by term, where these layers differ from the published ones:

- **34**: attention 11 (input of q, k, v 2; q, k, v 6; input of the projection 2, dropout mask 1), MLP 19 (2, 8, 8, 1), norms 4.
  A mask is one byte a number. Beyond it are only statistics of norms (16 bytes a token) and of softmax (4 bytes a token and
  head): `off by`.
- **5as/h** is softmax 2, mask 1, and what dropout leaves 2. `sdpa` (FlashAttention) keeps none of it. `matmul` keeps the
  softmax, 2as/h, of which blocks of 128 queries leave out the keys after a block: as/h + 128a/h; it knows no dropout, so
  attention's is off in these rows. In the rows with dropout in attention torch's CPU kernel falls back to fp32 products: 12as/h
  = 4 + 4 + 4, and q, k, v are kept in fp32, 12 in place of 6. Attention draws its masks head by head, which keeps the same.
- **tp 2 + sequence** without `parallel.overlap` keeps the gathered input of each of the two regions, 4 where the formula has
  4/t. With it each rank keeps its own tokens and gathers them again in backward, as in the paper: 34/t.
- **full** keeps the input of the layer, of which a rank has 1/t under sequence parallelism: 2/t.
- **Llama** (no dropout): norms 4, inputs of the regions 4, q and k rotated 2 + 2g/a, v as a part of the fused product 2 + 4g/a,
  input of the projection 2, SwiGLU 8f/h (gate, its SiLU, up, their product). With `model.fused_qkv=false` only v is kept, 2g/a."""
STEP = f"""`{" ".join(SMALL)}`: 4 layers of width 128, fp32, tp 1, dropout 0.1 in attention too. Bytes that live between forward and
backward, and the most at any time of the two, without weights and gradients, all counted on real tensors. On a CPU
offloaded activations are copies in the same memory; on a GPU they are in the host's."""


@dataclass(frozen=True)
class Row:
    """A layer in one layout and mode, and what it should keep: a sum of terms in h, s, a, t, f, g, in bytes / sbh; see NOTES."""

    what: str
    words: list[str]
    mode: str
    formula: str
    attention_dropout: bool = False  # else only that of the residual stream

    def expected(self, cfg: Config) -> float:
        m = cfg.model
        sizes = {"h": m.hidden_size, "s": cfg.train.seq_len, "a": m.num_heads, "t": cfg.parallel.tp, "f": m.ffn, "g": m.kv_heads}
        return value(self.formula, sizes)


def value(formula: str, sizes: dict[str, int]) -> float:
    """A sum of terms such as `5*a*s/h/t`."""

    def product(words: list[str]) -> float:
        return math.prod(float(sizes.get(word, word)) for word in words)

    terms = (term.split("/") for term in formula.split(" + "))
    return sum(product(above.split("*")) / product(below) for above, *below in terms)


def rows() -> list[Row]:
    """The published formulas, and what differs from them, term by term."""
    tp, both = ["parallel.tp=2", *PLAIN], ["parallel.tp=2"]
    out = []
    for attention, kept in (("sdpa", ""), ("matmul", " + a*s/h{} + 128*a/h{}")):
        words = [*GPT, f"model.attention={attention}"]
        for mode, extra in (("none", kept), ("selective", "")):
            whole, part = extra.format("", ""), extra.format("/t", "/t")
            out += [
                Row(f"GPT, {attention}", words, mode, f"34{whole}"),
                Row(f"GPT, {attention}, tp 2", [*words, *tp], mode, f"10 + 24/t{part}"),
                Row(f"GPT, {attention}, tp 2 + sequence", [*words, *both], mode, f"4 + 30/t{part}"),
                Row(f"GPT, {attention}, tp 2 + sequence, overlap", [*words, *both, *KEPT], mode, f"34/t{part}"),
            ]
    words = [*GPT, "model.attention=sdpa"]
    out += [
        Row("GPT", words, "full", "2"),
        Row("GPT, tp 2", [*words, *tp], "full", "2"),
        Row("GPT, tp 2 + sequence", [*words, *both], "full", "2/t"),
        Row("GPT, dropout in attention", words, "none", "40 + 12*a*s/h", attention_dropout=True),
        Row("GPT, dropout in attention", words, "selective", "34", attention_dropout=True),
    ]
    return out + [
        Row("Llama", LLAMA, "none", "14 + 6*g/a + 8*f/h"),
        Row("Llama, fused_qkv=false", [*LLAMA, "model.fused_qkv=false"], "none", "12 + 4*g/a + 8*f/h"),
        Row("Llama", LLAMA, "full", "2"),
        Row("Llama, tp 2", [*LLAMA, *tp], "none", "8 + 6/t + 6*g/a/t + 8*f/h/t"),
        Row("Llama, tp 2 + sequence", [*LLAMA, *both], "none", "4 + 10/t + 6*g/a/t + 8*f/h/t"),
        Row("Llama, tp 2 + sequence, overlap", [*LLAMA, *both, *KEPT], "none", "14/t + 6*g/a/t + 8*f/h/t"),
    ]


def kept(row: Row) -> tuple[float, float]:
    """(counted, by the formula) in units of sbh."""
    cfg = compose.load(row.words)
    found = run_ranks(cfg.parallel.tp, _kept, cfg, row) if cfg.parallel.tp > 1 else [_count(cfg, row, SINGLE)]
    assert len(set(found)) == 1, f"ranks keep different amounts: {found}"
    return found[0] / (cfg.train.seq_len * cfg.train.micro_batch_size * cfg.model.hidden_size), row.expected(cfg)


def _kept(rank: Rank, cfg: Config, row: Row) -> int:
    return _count(cfg, row, build.topology(cfg, rank, torch.device("cpu")))


def _count(cfg: Config, row: Row, topo: Topology) -> int:
    decoder = build.build_model(cfg, topo).decoder
    if not row.attention_dropout:
        next(iter(decoder.layers.values())).attention.dropout = 0.0
    return activations.costs(decoder, cfg)[row.mode].kept


class Live(TorchDispatchMode):
    """Bytes of all tensors made inside that still live, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_iter(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage() not in self.seen:
                self._see(x.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self.seen[storage] = size
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.now -= size


def step(words: list[str]) -> tuple[int, int]:
    """(bytes that a small model keeps between forward and backward, the most in forward and backward), without gradients."""
    cfg = compose.load([*SMALL, *words])
    decoder = build.build_model(cfg, SINGLE).decoder
    recompute.apply(decoder.layers, cfg.parallel, lambda: activations.costs(decoder, cfg), False)
    materialize(decoder, cfg.seed, torch.device("cpu"))
    for parameter in decoder.parameters():  # there before, so that they are not counted
        parameter.grad = torch.zeros_like(parameter)
    tokens = torch.zeros(cfg.train.micro_batch_size, cfg.train.seq_len, dtype=torch.long)
    with Live() as live:
        hidden = decoder(tokens, seed=1)
        between = live.now
        hidden.sum().backward()
    return between, live.most


def table() -> tuple[list[str], bool]:
    """The layers, and whether all counts are near their formulas."""
    lines, right = ["| layer | mode | counted / sbh | formula | = | off by |", "|---" * 6 + "|"], True
    for row in rows():
        counted, expected = kept(row)
        off = counted / expected - 1
        right &= abs(off) <= LIMIT
        lines.append(f"| {row.what} | {row.mode} | {counted:.3f} | {row.formula.replace('*', ' ')} | {expected:.3f} | {off:+.2%} |")
    return lines, right


def trained() -> list[str]:
    lines = ["| `parallel.` | kept, MiB | of none | most in the step, MiB |", "|---" * 4 + "|"]
    first = 0
    for words in MODES:
        between, most = step(words)
        first = first or between
        name = " ".join(word.removeprefix("parallel.") for word in words) or "recompute=none"
        lines.append(f"| {name} | {between / 2**20:.2f} | {between / first:.3f} | {most / 2**20:.2f} |")
    return lines


def main() -> int:
    """Count all, print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    start = time.perf_counter()
    torch.set_num_threads(1)
    layers, right = table()
    steps = trained()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    head = f"`python benchmarks/activation_memory.py --out benchmarks/activation_memory.md`, commit {commit}, "
    head += f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, Python {platform.python_version()}, "
    head += f"{time.perf_counter() - start:.0f} s. "
    models = f"GPT: `{' '.join(GPT)}`. Llama: `{' '.join(LLAMA)}`."
    parts = [
        "# What a layer keeps for backward",
        head + NOTES,
        models,
        "\n".join(layers),
        TERMS,
        "## A small model, one step",
        STEP,
    ]
    text = "\n\n".join([*parts, "\n".join(steps)])
    print(text)
    if args.out:
        args.out.write_text(text + "\n")
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(main())
