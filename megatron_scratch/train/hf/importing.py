"""`ckpt import-hf`: a folder of transformers as a run directory, whose checkpoint any layout resumes; a few tensors at a time.

The folder may come from anywhere: it is read by `checkpoint/safe_header.py`, nothing in it is run, and transformers sees of it only
the numbers and the plain settings of config.json. Nothing is visible under its final name before our model, loaded from the written
checkpoint, has given the logits of transformers' on the original.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_scratch.checkpoint import manifest as manifests
from megatron_scratch.checkpoint.attempt import Attempt
from megatron_scratch.checkpoint.manifest import Manifest
from megatron_scratch.checkpoint.plan import Plan, as_bytes, make_plan
from megatron_scratch.checkpoint.safe_header import Archive, plain_file, read_archive
from megatron_scratch.checkpoint.shard import Slot, write_file
from megatron_scratch.checkpoint.shard import header as shard_header
from megatron_scratch.config import Config, compose
from megatron_scratch.config.model import ModelConfig, check_model
from megatron_scratch.config.verbs import HF_DTYPES, ImportArgs
from megatron_scratch.data.tokenizer import FILES, ByteTokenizer, Tokenizer, load_tokenizer
from megatron_scratch.models.hf import Group, Shape, full_name, groups, is_surplus, read_config, to_ours
from megatron_scratch.train.build import FREE_MODEL_FIELDS
from megatron_scratch.train.hf import proof
from megatron_scratch.train.hf import tokenizer as tokenizers
from megatron_scratch.train.hf.export import Say, fetch, read, shapes_of
from megatron_scratch.train.hf.publish import new_folder, refuse_existing
from megatron_scratch.util.errors import UserError
from megatron_scratch.util.files import atomic_write

GROUP = "imported"  # of configs/model in the run directory
TOKENIZER_BYTES = 256 << 20  # the largest published ones have some 30 MB
WIDTHS = ("float32", "bfloat16", "float16")  # each is fp32 without rounding
REFUSED = {
    "auto_map": "code that comes with a model is never run; remove the entry if the model is a plain one",
    "trust_remote_code": "code that comes with a model is never run; remove the entry if the model is a plain one",
    "quantization_config": "quantized weights are not read; give the model in float32, bfloat16 or float16",
    "num_local_experts": "mixtures of experts are not in this version",
    "num_experts": "mixtures of experts are not in this version",
}


def import_hf(args: ImportArgs, say: Say) -> None:
    """Write the run directory `args.out`, or nothing; one line for each fact.

    Raises:
        UserError: the folder is not sound, or not a model that is known here. RunFailed: the proof failed.
    """
    proof.import_transformers()
    src, out = Path(args.src), Path(args.out)
    refuse_existing(out)
    archive = read_archive(src)
    model = read_model(archive, args.fused_qkv)
    theirs = _their_config(archive.config)
    archive, parts = _placed(archive, model)
    tokenizer, remark = _tokenizer(src, model)
    with new_folder(out) as tmp:
        folder, manifest = _write_checkpoint(tmp, archive, model, parts, tokenizer)
        _write_run(tmp, out, model, args.dtype, tokenizer)
        manifests.verify(folder)
        probe = proof.probe(model)
        ours = proof.our_logits(model, lambda name: read(folder, manifest.tensors[f"model.{name}"]), *probe)
        found = proof.compare(model, ours, proof.their_logits(theirs, model, partial(fetch, archive), *probe), probe[1])
    numbers = sum(math.prod(saved.shape) for saved in archive.tensors.values())
    say(f"{out}: {archive.config['model_type']} of {src}, {numbers:,} parameters in fp32")
    say(f"logits against transformers: {found}")
    say(f"tokenizer: {remark}")
    say(f"go on with: megatron-scratch train --config-dir {out}/configs model={GROUP} checkpoint.resume={out} dir=NEW data.dir=DIR")


def read_model(archive: Archive, fused_qkv: bool) -> ModelConfig:
    """The `model` section, checked before anything is built from it.

    Raises:
        UserError: a setting that is refused, missing, of another type, or beyond what the files can hold.
    """
    where = archive.folder / "config.json"
    for key, why in REFUSED.items():
        if archive.config.get(key):
            raise UserError(f"{where} has {key}: {why}")
    try:
        model = read_config(archive.config)
        model = _typed(replace(model, fused_qkv=fused_qkv))
    except KeyError as error:
        raise UserError(f"{where} has no {error}; give the config.json of the model") from error
    except (TypeError, AttributeError, OmegaConfBaseException) as error:
        raise UserError(f"{where} has a value of the wrong type: {' '.join(str(error).split())[:200]}") from error
    check_model(model)
    assert model.vocab_size is not None
    if model.num_layers > len(archive.tensors):  # else a number in a file would decide how long the check below takes
        raise UserError(f"{where} says {model.num_layers} layers, and the files have {len(archive.tensors)} tensors; get it anew")
    return model


def _typed(model: ModelConfig) -> ModelConfig:
    """The same, if every field is of its type and finite."""
    out: ModelConfig = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), asdict(model)))  # type: ignore[assignment]
    numbers = [value for value in (*vars(out).values(), *vars(out.rope).values()) if isinstance(value, (int, float))]
    if not all(math.isfinite(number) and abs(number) < 2**40 for number in numbers):
        raise TypeError("a number that is not finite, or above 2^40")
    return out


def _their_config(config: Mapping[str, Any]) -> Any:
    """transformers' config of the plain settings: those that it has by default. Others may name kernels and code to fetch."""
    from transformers import AutoConfig

    known = {*AutoConfig.for_model(config["model_type"]).to_dict(), "rope_theta", "rope_scaling", "rope_parameters", "head_dim"}
    without = {"model_type", "dtype", "torch_dtype", "architectures", "transformers_version"}
    plain = {key: value for key, value in config.items()
             if key in known - without and not key.startswith("_") and "implementation" not in key}  # fmt: skip
    try:
        return AutoConfig.for_model(config["model_type"], **plain)
    except Exception as error:  # of many kinds
        raise UserError(f"transformers refuses config.json: {' '.join(str(error).split())[:300]}") from error


def _placed(archive: Archive, model: ModelConfig) -> tuple[Archive, list[Group]]:
    """The archive under full names without what says nothing, if it is the model's: every tensor, no other, of the right shape."""
    tensors = {full_name(name, model): saved for name, saved in archive.tensors.items()}
    tensors = {name: saved for name, saved in tensors.items() if not is_surplus(name, model)}
    parts = groups(shapes_of(model), model)
    wanted: dict[str, Shape] = {name: shape for group in parts for name, shape in group.theirs.items()}
    missing, unknown = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    for names, what in ((missing, "lacks"), (unknown, "has what config.json does not ask for:")):
        if names:
            raise UserError(f"{archive.folder} {what} {len(names)} tensors, e.g. {names[0]!r}; get the folder anew, or the "
                            "config.json that is its own")  # fmt: skip
    for name, saved in tensors.items():
        if saved.shape != wanted[name] or saved.dtype not in WIDTHS:
            raise UserError(f"{archive.folder}: {name!r} is {saved.dtype} {list(saved.shape)}; allowed by config.json: "
                            f"{' or '.join(WIDTHS)}, {list(wanted[name])}")  # fmt: skip
    return Archive(archive.folder, archive.config, tensors), parts


def _tokenizer(src: Path, model: ModelConfig) -> tuple[Tokenizer | None, str]:
    """The folder's tokenizer, if it is one that is read here, and what to say of it."""
    assert model.vocab_size is not None
    remarks = []
    for name in FILES:
        try:
            if not (src / name).is_symlink() and not (src / name).exists():
                continue
            if plain_file(src / name) > TOKENIZER_BYTES:
                raise UserError(f"{src / name} is larger than {TOKENIZER_BYTES} bytes")
            found = _known(load_tokenizer(src / name))
            if found.vocab_size > model.vocab_size:
                raise UserError(f"{src / name} has {found.vocab_size} ids, the model {model.vocab_size}")
            return found, f"{name}, {found.vocab_size} ids, end of document {found.eod_id}"
        except UserError as error:
            remarks.append(str(error))
    return None, f"none ({'; '.join(remarks) or f'{src} has no ' + ' or '.join(FILES)}); give data.tokenizer=FILE when training"


def _known(tokenizer: Tokenizer) -> Tokenizer:
    """Ours, where it is one of ours that was exported."""
    return ByteTokenizer() if tokenizer.content == tokenizers.of_bytes().encode() else tokenizer


def _write_checkpoint(
    run: Path, archive: Archive, model: ModelConfig, parts: list[Group], tokenizer: Tokenizer | None
) -> tuple[Path, Manifest]:
    """`checkpoints/step_00000000`: fp32 weights, no optimizer state."""
    shapes = {f"model.{name}": shape for group in parts for name, shape in group.ours.items()}
    plan = make_plan([{name: ["float32", shape, [[[0] * len(shape), shape]]] for name, shape in shapes.items()}], 0)
    attempt = Attempt.claim(run / "checkpoints")
    staged = attempt.stage(0)
    part_of = {f"model.{name}": group for group in parts for name in group.ours}
    files = {name: write_file(staged / name, _contents(slots, archive, model, part_of)) for name, slots in plan.files.items()}
    manifests.write(staged, _manifest(files, plan, archive, model, tokenizer, attempt.number))
    folder = attempt.commit(0)
    return folder, manifests.read(folder)


def _manifest(files: Any, plan: Plan, archive: Archive, model: ModelConfig, tokenizer: Tokenizer | None, attempt: int) -> Manifest:
    extra = {
        "imported": {"from": archive.config["model_type"], "source": archive.folder.resolve().name},
        "model": {key: value for key, value in asdict(model).items() if key not in FREE_MODEL_FIELDS},
        "tokenizer": tokenizer.sha256 if tokenizer else None, "samples": 0, "attempt": attempt,
    }  # fmt: skip
    return Manifest(0, extra, files, plan.tensors)


def _contents(slots: list[Slot], archive: Archive, model: ModelConfig, part_of: Mapping[str, Group]) -> Iterator[memoryview]:
    """The bytes of one file, a tensor at a time."""
    yield memoryview(shard_header(slots)[0])
    for slot in slots:
        theirs = {name: read(archive.folder, archive.tensors[name]) for name in part_of[slot.name].theirs}
        yield memoryview(as_bytes(to_ours(theirs, model)[slot.name.removeprefix("model.")]).numpy())


def _write_run(run: Path, out: Path, model: ModelConfig, dtype: str, tokenizer: Tokenizer | None) -> None:
    """config.yaml for `eval` and `generate`, the tokenizer, and the model as a config group for `train`."""
    cfg: Config = compose.load([])
    cfg.name, cfg.dir, cfg.model = out.name, str(out), model
    cfg.train.seq_len = min(model.max_seq_len, 2048)
    cfg.precision.name = HF_DTYPES[dtype]
    compose.save(cfg, run / "config.yaml")
    if tokenizer is not None:
        tokenizer.save(run)
    group = run / "configs" / "model"
    group.mkdir(parents=True)
    with atomic_write(group / f"{GROUP}.yaml", "w") as f:
        f.write(f"# megatron-scratch train --config-dir {out}/configs model={GROUP} checkpoint.resume={out} dir=NEW data.dir=DIR\n")
        f.write(OmegaConf.to_yaml(OmegaConf.create(_difference(asdict(model), asdict(ModelConfig())))))


def _difference(here: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    """What is not as it is by default."""
    return {key: _difference(value, default[key]) if isinstance(value, dict) else value
            for key, value in here.items() if value != default[key]}  # fmt: skip
