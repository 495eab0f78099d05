"""What is done with a finished run: evaluate it, let it write. One process, any checkpoint, whatever layout wrote it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from megatron_scratch import registry
from megatron_scratch.checkpoint import store
from megatron_scratch.config import Config, DataConfig, compose
from megatron_scratch.config.attention import portable
from megatron_scratch.config.verbs import EvalArgs, GenerateArgs
from megatron_scratch.data.loader import open_data
from megatron_scratch.data.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from megatron_scratch.parallel import SINGLE
from megatron_scratch.train import build, resume
from megatron_scratch.train.evaluate import evaluate
from megatron_scratch.train.generate import generate
from megatron_scratch.train.objective import LanguageModel
from megatron_scratch.train.passes import to_device
from megatron_scratch.util.errors import UserError, choice


@dataclass(frozen=True)
class Trained:
    """A model as a checkpoint holds it, ready for use on this machine."""

    cfg: Config
    model: LanguageModel
    folder: Path


def load_run(run: str, precision: str | None = None) -> Trained:
    """Build the model of a run directory (its newest checkpoint) or of one checkpoint folder, and load its weights.

    Raises:
        UserError: there is no such run, no checkpoint, or no config beside it.
    """
    path = Path(run)
    if not run or not path.exists():
        raise UserError(f"run={run!r} does not exist; give a run directory (with config.yaml and checkpoints/) or one checkpoint")
    folders = resume.named(path)
    cfg = compose.load_file(folders[0].parent.parent / "config.yaml")
    registry.load_plugins(cfg.plugins)
    # This machine need not be the one that trained.
    cfg.model.norm_kernel, cfg.model.attention = "auto", portable(cfg.model.attention)
    if precision is not None:
        choice("precision", precision, registry.names("precision"))
        if precision == "fp8":
            raise UserError("precision=fp8 is for training: an evaluation has no use for its products; use precision=bf16")
        cfg.precision.name = precision
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build.build_model(cfg, SINGLE)
    build.materialize(model.decoder, cfg.seed, device)
    state = {f"model.{name}": p.detach() for name, p in model.decoder.named_parameters()}
    load = partial(store.load, state=state, topo=SINGLE, only="model.")
    folder, _, _ = resume.first_whole(folders, load, SINGLE)
    return Trained(cfg, model.eval(), folder)


def evaluate_run(args: EvalArgs) -> str:
    """Loss, perplexity and bits per byte of a run on its own validation set or on `args.data`, as a line of text."""
    choice("split", args.split, ("valid", "train"))
    if args.split != "valid" and args.data is None:
        raise UserError(f"split={args.split} has no effect without data=DIR; give the dataset")
    trained = load_run(args.run, args.precision)
    cfg = trained.cfg
    if args.data is not None:
        cfg.data = replace(DataConfig(), valid=_prefix(args.data, args.split), mask_documents=cfg.data.mask_documents,
                           mask_eod=cfg.data.mask_eod)  # fmt: skip
    data = open_data(cfg.data, cfg.train.seq_len, cfg.seed, need_train=False)
    if data.valid is None:
        raise UserError(f"the data of {args.run} has no validation set; give data=DIR")
    _refuse_other_tokenizer(trained.folder.parent.parent, args.data, data.tokenizer)
    cfg.train.micro_batch_size = args.micro_batch_size
    batches = build.validation(cfg, data.valid, SINGLE)
    device = next(trained.model.parameters()).device
    topo = replace(SINGLE, device=device)
    result = evaluate([trained.model], lambda batch: trained.model(*to_device(batch, device)), batches, topo,
                      data.tokenizer.bytes_per_id if data.tokenizer else None, args.batches)  # fmt: skip
    assert result is not None, "nobody asks it to stop"
    bits = "" if result.bits_per_byte is None else f"  bits per byte {result.bits_per_byte:.4f}"
    return (f"{trained.folder}: loss {result.loss:.4f} nats/token  perplexity {result.perplexity:.2f}{bits}  "
            f"over {result.tokens:,} tokens ({result.bytes:,} bytes)")  # fmt: skip


def _refuse_other_tokenizer(run: Path, data: str | None, theirs: Tokenizer | None) -> None:
    """Ids mean nothing under another tokenizer, and a loss would come out all the same."""
    if theirs is not None and has_tokenizer(run) and (ours := load_tokenizer(run)).sha256 != theirs.sha256:
        raise UserError(f"data={data} has a tokenizer (sha256 {theirs.sha256[:12]}) that is not the run's ({ours.sha256[:12]}); "
                        f"prepare it with corpus.tokenizer={run / ours.file_name}")  # fmt: skip


def _prefix(data: str, split: str) -> str:
    path = Path(data)
    return str(path / split) if path.is_dir() else data


def generate_text(args: GenerateArgs) -> Iterator[str]:
    """Pieces of text as they are drawn, the prompt first."""
    trained = load_run(args.run)
    tokenizer = run_tokenizer(trained.folder.parent.parent)
    prompt = tokenizer.encode(args.prompt) if args.prompt else [tokenizer.eod_id]
    stream = tokenizer.decode_stream()
    yield args.prompt
    for token in generate(trained.model.decoder, prompt, args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed):
        if token == tokenizer.eod_id and args.stop_at_eod:
            break
        yield stream.push(token)
    yield stream.flush()


def run_tokenizer(run: Path) -> Tokenizer:
    """The tokenizer that a run was trained with, as it lies in the run directory."""
    if not has_tokenizer(run):
        raise UserError(f"{run} has no tokenizer, as its data had none; give data.tokenizer=FILE when training")
    return load_tokenizer(run)
