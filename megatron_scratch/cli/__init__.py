"""`megatron-scratch VERB ...`: verbs to functions. Nothing here imports torch: a wrong word is answered at once."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import NoReturn

from megatron_scratch import __version__
from megatron_scratch.util.errors import UserError, nearest
from megatron_scratch.util.exits import OK, exit_code, leave_with

USAGE = """megatron-scratch VERB [key=value ...]

  data prepare   raw text to an indexed dataset        corpus.input=PATHS corpus.output=DIR
  data clean     read and clean only, to text          corpus.input=PATHS corpus.output=DIR corpus.clean=[NAMES]
  data dedup     clean and deduplicate, to text        corpus.input=PATHS corpus.output=DIR [corpus.dedup=minhash]
  data tokenizer train a tokenizer, and judge it       corpus.input=PATHS corpus.output=DIR corpus.vocab_size=N
  data tokenize  encode all, in the order of the input corpus.input=PATHS corpus.output=DIR corpus.tokenizer=FILE
  data inspect   what is in a dataset, and from where  DIR [document=N] [sample=K seq_len=N]
  data verify    is every file as it was written?      DIR|PREFIX
  train          pretrain, or go on where it stopped   data.dir=DIR [any config key]
  train -m       a sweep, one run a point              optim.lr=1e-3,1e-4 [any config key]
  report         a run, or several, as a page and PNGs RUN... [out=DIR]
  report         what the points of a sweep came to    --sweep DIR [json=true]
  eval           loss, perplexity, bits per byte       RUN [data=DIR]
  eval           tasks of lm-evaluation-harness        RUN tasks=NAMES [include=DIR] [fewshot=N] [limit=N] [out=FILE]
  generate       text from a trained model             RUN [prompt=TEXT] [max_new_tokens=N] [temperature=T]
  parity         the same numbers under this layout?   [any config key]
  ckpt ls        which checkpoints there are           RUN|URL [verify=true] [json=true]
  ckpt inspect   what is in a checkpoint, in a tensor  RUN|CKPT|URL [tensor=NAME]
  ckpt verify    is every file as it was written?      RUN|CKPT|URL
  ckpt diff      what two checkpoints differ in        A B [tolerance=1e-6]
  ckpt export-hf a checkpoint for transformers, vLLM   RUN OUT [step=N] [dtype=bfloat16] [shard_gb=5] [tokenizer=false]
  ckpt import-hf a run from a folder of transformers   SRC OUT [dtype=bfloat16] [fused_qkv=false]
  bench          tokens/s and MFU of a training step   [any config key]
  doctor         this machine: what is here, is it right?

  train, parity, bench and the data verbs that write take --print (show the config and stop) and --config-dir DIR (your own YAML).
  `python -m megatron_scratch` is the same. Exit codes: 0 finished, 2 bad input, 75 stopped with a checkpoint, 1 failed."""

VERBS = {
    "data prepare": "data:prepare", "data clean": "data:clean", "data dedup": "data:dedup", "data tokenizer": "data:tokenizer",
    "data tokenize": "data:tokenize", "data inspect": "data:inspect", "data verify": "data:verify",
    "train": "runs:train", "eval": "runs:evaluate", "generate": "runs:generate", "parity": "runs:parity", "bench": "runs:bench",
    "doctor": "runs:doctor", "report": "report:report",
    "ckpt ls": "ckpt:ls", "ckpt inspect": "ckpt:inspect", "ckpt verify": "ckpt:verify", "ckpt diff": "ckpt:diff",
    "ckpt export-hf": "ckpt:export_hf", "ckpt import-hf": "ckpt:import_hf",
}  # fmt: skip
"""Verb -> module of this package and its function, which takes the words after the verb and returns the exit code."""

LATER = ("plan",)


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    return exit_code(lambda: _dispatch(words))


def entry() -> NoReturn:
    """The command `megatron-scratch`."""
    leave_with(main)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE)
        return OK
    if words[0] == "--version":
        print(__version__)
        return OK
    length = 2 if words[0] in ("data", "ckpt") else 1
    verb, rest = " ".join(words[:length]), words[length:]
    if verb in LATER:
        raise UserError(f"{verb!r} is not in this version; `megatron-scratch --help` lists what is")
    if verb not in VERBS:
        raise UserError(f"{verb!r} is not a verb; allowed: {', '.join(VERBS)}{nearest(verb, VERBS)}")
    if any(word in ("-h", "--help") for word in rest):
        print(USAGE)
        return OK
    module, _, function = VERBS[verb].partition(":")
    return getattr(import_module(f"megatron_scratch.cli.{module}"), function)(rest)
