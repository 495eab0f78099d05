"""`ckpt export-hf`: a checkpoint of any layout as a folder that transformers and vLLM load, one process, a few tensors at a time.

Nothing is visible under its final name before transformers' own model, on the files as they were written, has given our logits, and
every tensor has been read back bit for bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_scratch import registry
from megatron_scratch.checkpoint import manifest as manifests
from megatron_scratch.checkpoint.manifest import DTYPES, CorruptCheckpoint, Manifest, Saved, committed, itemsize, step_folder
from megatron_scratch.checkpoint.plan import as_bytes
from megatron_scratch.checkpoint.safe_header import INDEX, Archive, read_archive
from megatron_scratch.checkpoint.shard import ALIGN, write_file
from megatron_scratch.config import Config, compose
from megatron_scratch.config.verbs import ExportArgs
from megatron_scratch.data.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from megatron_scratch.models.decoder import Decoder
from megatron_scratch.models.hf import Group, Shape, groups, hf_config, to_hf, to_ours
from megatron_scratch.parallel import SINGLE
from megatron_scratch.train.hf import proof
from megatron_scratch.train.hf import tokenizer as tokenizers
from megatron_scratch.train.hf.publish import new_folder, refuse_existing
from megatron_scratch.util.errors import RunFailed, UserError
from megatron_scratch.util.files import write_json

Say = Callable[[str], None]
WHOLE = 2 << 30  # bytes of fp32 weights up to which `from_pretrained` is tried as well: it holds the whole model


@dataclass(frozen=True)
class Source:
    """A verified checkpoint and the run it is of."""

    folder: Path
    manifest: Manifest
    cfg: Config

    @property
    def run(self) -> Path:
        return self.folder.resolve().parent.parent

    def parameter(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """A global tensor of the model, read now, rounded to `dtype`."""
        return read(self.folder, self.manifest.tensors[f"model.{name}"]).to(dtype)


def read(folder: Path, saved: Saved) -> torch.Tensor:
    """A whole tensor of a checkpoint or an archive, in the dtype it lies in."""
    return torch.from_numpy(np.atleast_1d(manifests.tensor(folder, saved))).view(getattr(torch, saved.dtype)).view(saved.shape)


def export(args: ExportArgs, say: Say) -> None:
    """Write `args.out`, or nothing; one line for each fact.

    Raises:
        UserError: what cannot be exported, before anything is written. RunFailed: the proof failed, or the checkpoint is corrupt.
    """
    proof.import_transformers()
    out, dtype = Path(args.out), getattr(torch, args.dtype)
    refuse_existing(out)
    source = find(Path(args.run), args.step, say)
    parts = groups(_shapes(source), source.cfg.model)
    tokenizer = _tokenizer(source.run, args.tokenizer)
    with new_folder(out) as tmp:
        ends = (None, None)
        if tokenizer is not None:
            ends = tokenizers.write_files(tokenizer, tmp, source.cfg.model.max_seq_len)
        _write_configs(tmp, source.cfg, args.dtype, ends)
        _write_weights(tmp, source, parts, dtype, int(args.shard_gb * 1e9))
        lines = [_prove_weights(tmp, source, parts, dtype), *_prove_logits(tmp, source, dtype)]
        lines += [] if tokenizer is None else [f"tokenizer: {tokenizers.prove(tmp, tokenizer)}"]
    for line in [f"{out}: {source.folder} as {hf_config(source.cfg.model)['architectures'][0]}", *lines]:
        say(line)


def find(path: Path, step: int | None, say: Say) -> Source:
    """What `RUN [step=N]` names, verified: one checkpoint's folder, a run's checkpoint of a step, or its newest valid one."""
    single = (path / manifests.MANIFEST).is_file()
    if single and step is not None:
        raise UserError(f"step={step} has no effect on {path}, which is one checkpoint; leave it out, or give the run")
    steps = [] if single else committed(path / "checkpoints")
    if not single and not steps:
        raise UserError(f"{path} is neither a checkpoint (it has no manifest.json) nor a run directory with checkpoints")
    if step is not None and step not in steps:
        raise UserError(f"{path} has no checkpoint of step {step}; allowed: {', '.join(map(str, steps))}")
    wanted = [path] if single else [step_folder(path / "checkpoints", s) for s in reversed(steps) if step in (None, s)]
    folder, manifest = _first_valid(wanted, say)
    source = Source(folder, manifest, Config())
    cfg = compose.load_file(source.run / "config.yaml")
    registry.load_plugins(cfg.plugins)
    return replace(source, cfg=cfg)


def _first_valid(folders: list[Path], say: Say) -> tuple[Path, Manifest]:
    problem = ""
    for folder in folders:
        try:
            return folder, manifests.verify(folder)
        except CorruptCheckpoint as error:
            problem = str(error)
            if len(folders) > 1:
                say(f"passed over a corrupt checkpoint: {problem}")
    raise RunFailed(f"no checkpoint to export is whole: {problem}; name another")


def shapes_of(cfg: Any) -> dict[str, Shape]:
    """The parameters of a `model` section, under our names."""
    return {name: tuple(p.shape) for name, p in Decoder(cfg, SINGLE).named_parameters()}


def _shapes(source: Source) -> dict[str, Shape]:
    """The model's parameters, if they are the checkpoint's."""
    wanted = shapes_of(source.cfg.model)
    saved = {name.removeprefix("model."): s.shape for name, s in source.manifest.tensors.items() if name.startswith("model.")}
    for name in sorted(set(wanted) | set(saved)):
        if wanted.get(name) != saved.get(name):
            raise UserError(f"{source.folder}: {name} is {saved.get(name)} there, and {wanted.get(name)} by the run's config.yaml; "
                            "put back the config that wrote it")  # fmt: skip
    return wanted


def _tokenizer(run: Path, wanted: bool) -> Tokenizer | None:
    if not wanted:
        return None
    if not has_tokenizer(run):
        raise UserError(f"{run} has no tokenizer, as its data had none; {tokenizers.WITHOUT}")
    return load_tokenizer(run)


def _write_configs(folder: Path, cfg: Config, dtype: str, ends: tuple[int | None, int | None]) -> None:
    """config.json and generation_config.json; dtype by its new name and by the one of transformers 4 and vLLM."""
    ids = {"bos_token_id": ends[0], "eos_token_id": ends[1]}
    write_json(folder / "config.json", {**hf_config(cfg.model), **ids, "dtype": dtype, "torch_dtype": dtype, "use_cache": True})
    write_json(folder / "generation_config.json", ids)


def _write_weights(folder: Path, source: Source, parts: list[Group], dtype: torch.dtype, limit: int) -> None:
    """model.safetensors, or model-0000x-of-0000y.safetensors of at most `limit` bytes (or one group) each, and their index."""
    name_of = str(dtype).removeprefix("torch.")
    files = list(_files(parts, limit, itemsize(name_of)))
    names = ["model.safetensors"] if len(files) == 1 else [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]  # fmt: skip
    for name, inside in zip(names, files, strict=True):
        write_file(folder / name, _contents(source, inside, dtype))
    if len(files) > 1:
        where = {key: name for name, inside in zip(names, files, strict=True) for group in inside for key in group.theirs}
        total = sum(math.prod(s) for group in parts for s in group.theirs.values()) * itemsize(name_of)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})


def _files(parts: list[Group], limit: int, width: int) -> Iterator[list[Group]]:
    inside: list[Group] = []
    size = 0
    for group in parts:
        more = width * sum(math.prod(s) for s in group.theirs.values())
        if inside and size + more > limit:
            yield inside
            inside, size = [], 0
        inside.append(group)
        size += more
    yield inside


def _contents(source: Source, parts: list[Group], dtype: torch.dtype) -> Iterator[memoryview]:
    """The bytes of one file, a tensor at a time."""
    yield memoryview(header({name: s for group in parts for name, s in group.theirs.items()}, dtype))
    for group in parts:
        state = to_hf({name: source.parameter(name, dtype) for name in group.ours}, source.cfg.model)
        for name in group.theirs:
            if not torch.isfinite(state[name]).all():
                raise RunFailed(f"{name} has numbers that are not finite in {dtype}; nothing is written; use another dtype=")
            yield memoryview(as_bytes(state[name]).numpy())


def header(shapes: Mapping[str, Shape], dtype: torch.dtype) -> bytes:
    """The beginning of a safetensors file of tensors of one dtype; transformers wants the metadata."""
    name, at = str(dtype).removeprefix("torch."), 0
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for key, shape in shapes.items():
        size = math.prod(shape) * itemsize(name)
        entries[key] = {"dtype": DTYPES[name][0], "shape": shape, "data_offsets": [at, at := at + size]}
    text = json.dumps(entries).encode()
    text += b" " * (-(8 + len(text)) % ALIGN)
    return len(text).to_bytes(8, "little") + text


def _prove_weights(folder: Path, source: Source, parts: list[Group], dtype: torch.dtype) -> str:
    """Read every tensor back, and turn it into ours: bit for bit the checkpoint's, rounded. Logits say nothing of unused rows."""
    archive, vocab = read_archive(folder), source.cfg.model.vocab_size
    expected = {name for group in parts for name in group.theirs}
    if set(archive.tensors) != expected:
        raise RunFailed(f"tensors of another name than expected: {sorted(set(archive.tensors) ^ expected)[:3]}; nothing is written")
    for group in parts:
        back = to_ours({name: read(folder, archive.tensors[name]) for name in group.theirs}, source.cfg.model)
        for name in group.ours:
            rows = slice(vocab if name in ("embed.weight", "head.weight") else None)  # padding is not exported
            if not torch.equal(back[name][rows], source.parameter(name, dtype).float()[rows]):
                raise RunFailed(f"{name} does not come back from what was written; nothing is written")
    files = {saved.chunks[0].file for saved in archive.tensors.values()}
    size = sum(saved.bytes for saved in archive.tensors.values())
    return (f"weights: {len(expected)} tensors in {str(dtype).removeprefix('torch.')}, {size / 1e9:.3g} GB in {len(files)} "
            f"file{'s' * (len(files) > 1)}, each read back bit for bit")  # fmt: skip


def _prove_logits(folder: Path, source: Source, dtype: torch.dtype) -> Iterator[str]:
    """transformers' model of config.json on the written files, against ours on the checkpoint."""
    from transformers import AutoConfig, GenerationConfig

    model, probe = source.cfg.model, proof.probe(source.cfg.model)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    GenerationConfig.from_pretrained(folder, local_files_only=True)
    ours = proof.our_logits(model, lambda name: source.parameter(name, dtype).float(), *probe)
    archive = read_archive(folder)
    streamed = proof.their_logits(config, model, partial(fetch, archive), *probe)
    yield f"logits against transformers: {proof.compare(model, ours, streamed, probe[1])}"
    if sum(math.prod(saved.shape) for saved in archive.tensors.values()) * 4 <= WHOLE:
        loaded = proof.call(_from_pretrained(folder), *probe)
        yield f"logits of from_pretrained: {proof.compare(model, ours, loaded, probe[1])}"


def fetch(archive: Archive, name: str) -> torch.Tensor:
    """A tensor of an archive in fp32."""
    if name not in archive.tensors:
        raise RunFailed(f"transformers wants a tensor {name!r}, which {archive.folder} does not have; nothing is written")
    return read(archive.folder, archive.tensors[name]).float()


def _from_pretrained(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    options = {"attn_implementation": "eager", "local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    if wrong := {kind: sorted(map(str, names))[:3] for kind, names in info.items() if names}:
        raise RunFailed(f"from_pretrained is not content: {wrong}; nothing is written")
    return model
