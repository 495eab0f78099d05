"""A folder that somebody else made is read only if all of it is sound; else it is refused in one line, and nothing is written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import GPT2, LLAMA, do_export, do_import, imported, make_run

from megatron_scratch.checkpoint.safe_header import read_archive, read_header
from megatron_scratch.cli import main
from megatron_scratch.util.errors import UserError

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama in two shards."""
    path = tmp_path_factory.mktemp("sound")
    make_run(path / "run", LLAMA)
    do_export(path / "run", path / "out", shard_gb=1.2e-4)
    assert (path / "out" / SECOND).exists()
    return path / "out"


@pytest.fixture
def src(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "src"))


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    put_header(path, json.dumps(header).encode())


def put_header(path: Path, header: bytes) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])


def index(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    return lambda src: edit_json(src / INDEX, lambda value: change(value["weight_map"]))


def config(**values: Any) -> Callable[[Path], None]:
    return lambda src: edit_json(src / "config.json", lambda value: value.update(values))


def first(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda src: edit_header(src / FIRST, change)


def replaced(make: Callable[[Path], Any], name: str = FIRST) -> Callable[[Path], None]:
    def change(src: Path) -> None:
        (src / name).rename(src.parent / "moved")
        make(src / name)

    return change


def of(header: dict[str, Any]) -> dict[str, Any]:
    return header["model.norm.weight" if "model.norm.weight" in header else "model.embed_tokens.weight"]


def swap_spans(header: dict[str, Any]) -> None:
    """Two tensors of the same place; the bytes of the other belong to nobody."""
    a, b = "model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.v_proj.weight"
    header[a]["data_offsets"] = header[b]["data_offsets"]


def twice(src: Path) -> None:
    """A tensor in two shards."""
    content = (src / FIRST).read_bytes()
    (src / SECOND).write_bytes(content)


def only_pickles(src: Path) -> None:
    for path in (*src.glob("*.safetensors"), src / INDEX):
        path.unlink()
    (src / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 3'\ntR.")


def no_index(src: Path) -> None:
    (src / INDEX).unlink()


def duplicate_key(src: Path) -> None:
    content = (src / FIRST).read_bytes()
    header = content[8 : 8 + int.from_bytes(content[:8], "little")].rstrip()
    put_header(src / FIRST, header[:-1] + b', "model.embed_tokens.weight": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}')


def deep(text: str) -> Callable[[Path], None]:
    return lambda src: (src / "config.json").write_text(text)


EMBED = "model.embed_tokens.weight"
HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a path upwards": (index(lambda m: m.update({EMBED: "../" + FIRST})), "allowed: names of files beside it"),
    "an absolute path": (index(lambda m: m.update({EMBED: "/etc/passwd"})), "allowed: names of files beside it"),
    "a folder's name": (index(lambda m: m.update({EMBED: ".."})), "allowed: names of files beside it"),
    "a backslash": (index(lambda m: m.update({EMBED: "..\\x.safetensors"})), "allowed: names of files beside it"),
    "another kind of file": (index(lambda m: m.update({EMBED: "config.json"})), "allowed: *.safetensors"),
    "a pickled shard": (index(lambda m: m.update({EMBED: "pytorch_model.bin"})), "never opened"),
    "names that are numbers": (index(lambda m: m.update({EMBED: 7})), "has no weight_map"),
    "an empty map": (index(lambda m: m.clear()), "has no weight_map"),
    "a shard that is a link": (replaced(lambda p: p.symlink_to(p.parent.parent / "moved")), "is a symbolic link"),
    "a shard that is a pipe": (replaced(os.mkfifo), "is not a plain file"),
    "a shard that is a folder": (replaced(os.mkdir), "is not a plain file"),
    "a shard that is absent": (replaced(lambda p: None), "No such file"),
    "config.json a link": (replaced(lambda p: p.symlink_to(p.parent.parent / "moved"), "config.json"), "is a symbolic link"),
    "config.json a pipe": (replaced(os.mkfifo, "config.json"), "is not a plain file"),
    "the index a link": (replaced(lambda p: p.symlink_to(p.parent.parent / "moved"), INDEX), "is a symbolic link"),
    "a header of 2^60 bytes": (lambda s: (s / FIRST).write_bytes((1 << 60).to_bytes(8, "little")), "says that its header has"),
    "a header beyond the cap": (lambda s: os.truncate(_long(s / FIRST), 1 << 28), "allowed: at most 100000000"),
    "an empty file": (lambda s: (s / FIRST).write_bytes(b""), "says that its header has"),
    "a truncated file": (lambda s: os.truncate(s / FIRST, (s / FIRST).stat().st_size - 1), "allowed: inside"),
    "bytes of nobody": (lambda s: os.truncate(s / FIRST, (s / FIRST).stat().st_size + 64), "its header accounts for"),
    "a header that is no JSON": (lambda s: put_header(s / FIRST, b"{" * 8), "is not sound JSON"),
    "a header that is a list": (lambda s: put_header(s / FIRST, b"[]"), "allowed: an object"),
    "a header that is no UTF-8": (lambda s: put_header(s / FIRST, b'{"\xff": 1}'), "is not sound JSON"),
    "a deep header": (lambda s: put_header(s / FIRST, b"[" * 100_000), "nested deeper than 16"),
    "a string without an end": (lambda s: put_header(s / FIRST, b'{"' + b'\\"' * 500_000 + b"\\"), "is not sound JSON"),
    "a key twice": (duplicate_key, "is there twice"),
    "overlapping tensors": (first(swap_spans), "without overlaps and holes"),
    "offsets beyond the file": (first(lambda h: of(h).update(data_offsets=[0, 1 << 50])), "allowed: inside"),
    "offsets backwards": (first(lambda h: of(h).update(data_offsets=[8, 4])), "allowed: inside"),
    "negative offsets": (first(lambda h: of(h).update(data_offsets=[-4, 0])), "not lists of whole numbers"),
    "offsets of true": (first(lambda h: of(h).update(data_offsets=[False, True])), "not lists of whole numbers"),
    "a shape of other size": (first(lambda h: of(h).update(shape=[1 << 40, 1 << 40])), "allowed:"),
    "a negative shape": (first(lambda h: of(h).update(shape=[-300, -32])), "not lists of whole numbers"),
    "an unknown dtype": (first(lambda h: of(h).update(dtype="F4")), "allowed: F64, F32"),
    "a dtype that is a list": (first(lambda h: of(h).update(dtype=["F32"])), "allowed: F64, F32"),
    "whole numbers for weights": (first(lambda h: of(h).update(dtype="I32")), "allowed by config.json: float32"),
    "facts beside": (first(lambda h: of(h).update(code="import os")), "other facts than"),
    "metadata that is no text": (first(lambda h: h.update(__metadata__={"format": {}})), "is not text"),
    "a tensor in two shards": (twice, "allowed: once"),
    "a tensor that the index lacks": (index(lambda m: m.pop(EMBED)), "does not place there"),
    "a tensor that no file has": (index(lambda m: m.update({"model.extra": SECOND})), "which does not have it"),
    "a tensor missing": (lambda s: _renamed(s, EMBED, "model.layers.0.self_attn.rotary_emb.inv_freq"), "lacks 1 tensors"),
    "a tensor too many": (config(num_hidden_layers=2), "does not ask for: 9 tensors"),
    "another width": (config(hidden_size=64), "allowed by config.json"),
    "shards without an index": (no_index, "says what is where"),
    "pickles alone": (only_pickles, "pickled: opening it could run anything"),
    "no config": (lambda s: (s / "config.json").unlink(), "No such file"),
    "a huge config": (lambda s: (s / "config.json").write_text(json.dumps({"x": "y" * (1 << 20)})), "allowed: at most 1048576"),
    "a deep config": (deep('{"a":' * 100_000), "nested deeper than 16"),
    "a deep config behind brackets in text": (deep('{"' + "]" * 50_000 + '":' + "[" * 50_000), "nested deeper than 16"),
    "a config that is no object": (deep("7"), "allowed: an object"),
    "a config with NaN": (deep('{"model_type": "llama", "rms_norm_eps": NaN}'), "NaN is no number"),
    "a key of config twice": (deep('{"model_type": "gpt2", "model_type": "llama"}'), "is there twice"),
    "code in config": (config(auto_map={"AutoModel": "modeling.Evil"}), "auto_map: code that comes with a model is never run"),
    "trust in config": (config(trust_remote_code=True), "code that comes with a model is never run"),
    "quantized": (config(quantization_config={"bits": 4}), "quantized weights are not read"),
    "experts": (config(model_type="mixtral", num_local_experts=8), "mixtures of experts are not in this version"),
    "another family": (config(model_type="mamba"), "allowed: gpt2, llama, qwen3"),
    "a family that is a list": (config(model_type=["llama"]), "allowed: gpt2, llama, qwen3"),
    "no width": (lambda s: edit_json(s / "config.json", lambda c: c.pop("hidden_size")), "has no 'hidden_size'"),
    "a width in words": (config(hidden_size="wide"), "of the wrong type"),
    "a width that is true": (config(hidden_size=[32]), "of the wrong type"),
    "rope that is a number": (config(rope_parameters=3), "of the wrong type"),
    "an endless factor": (config(rms_norm_eps=float(1 << 50)), "of the wrong type"),
    "no heads": (config(num_attention_heads=0), "must be at least 1"),
    "10^9 layers": (config(num_hidden_layers=10**9), "says 1000000000 layers"),
    "an interpolation": (config(rope_scaling={"rope_type": "${oc.env:HOME}"}, rope_parameters=None), "is not known; allowed: none"),
}


def _long(path: Path) -> Path:
    path.write_bytes((200_000_000).to_bytes(8, "little"))
    return path


def _renamed(src: Path, name: str, other: str) -> None:
    edit_header(src / FIRST, lambda h: h.update({other: h.pop(name)}))
    edit_json(src / INDEX, lambda value: value["weight_map"].update({other: value["weight_map"].pop(name)}))


@pytest.mark.parametrize("name", HOSTILE)
def test_it_is_refused_in_one_line(name: str, src: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, message = HOSTILE[name]
    change(src)
    before = sorted(p.name for p in src.parent.iterdir())
    assert main(["ckpt", "import-hf", str(src), str(src.parent / "out")]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and message in err[0], err
    assert sorted(p.name for p in src.parent.iterdir()) == before


def test_what_is_sound_is_taken(src: Path) -> None:
    """The same folder, with what transformers would run and what is no weight beside it: neither is opened."""
    (src / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    (src / "modeling.py").write_text("raise SystemExit(7)")
    (src / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else"}')
    edit_json(src / "config.json", lambda c: c.update({"_attn_implementation": "somebody/kernels", "attn_implementation": "a/b"}))
    do_import(src, src.parent / "out")
    assert (src.parent / "out" / "checkpoints" / "step_00000000" / "manifest.json").exists()


def test_settings_that_change_the_numbers_and_are_not_read_here_are_seen(tmp_path: Path) -> None:
    """Their model obeys config.json, ours what `read_config` understood of it: the logits tell."""
    from megatron_scratch.util.errors import RunFailed

    make_run(tmp_path / "run", GPT2)
    do_export(tmp_path / "run", tmp_path / "src")
    edit_json(tmp_path / "src" / "config.json", lambda c: c.update(scale_attn_weights=False))
    with pytest.raises(RunFailed, match="the logits are not transformers'"):
        do_import(tmp_path / "src", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_gpt2_as_it_was_published(tmp_path: Path) -> None:
    """Names without a prefix, buffers among the weights, one file of another name, tied without a word of it."""
    from safetensors.torch import load_file, save_file

    state = make_run(tmp_path / "run", GPT2)
    do_export(tmp_path / "run", tmp_path / "src")
    theirs = load_file(tmp_path / "src" / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in theirs.items()}
    bare |= {f"h.{i}.attn.bias": torch.ones(1, 1, 256, 256) for i in range(3)}
    (tmp_path / "src" / "model.safetensors").unlink()
    save_file(bare, tmp_path / "src" / "weights.safetensors")
    edit_json(tmp_path / "src" / "config.json", lambda c: c.pop("tie_word_embeddings"))
    do_import(tmp_path / "src", tmp_path / "out")
    back = imported(tmp_path / "out")
    assert all(torch.equal(back[name][:300], state[name][:300]) for name in state)


def test_a_strange_tokenizer_is_not_the_model_s_end(src: Path) -> None:
    (src / "tokenizer.json").unlink()
    (src / "tokenizer.json").symlink_to("/etc/passwd")
    assert "symbolic link" in do_import(src, src.parent / "a")[2]
    (src / "tokenizer.json").unlink()
    (src / "tokenizer.json").write_text('{"version": "1.0"}')
    assert "is not a tokenizer.json" in do_import(src, src.parent / "b")[2]
    assert not (src.parent / "b" / "tokenizer.json").exists()


def test_our_reader_agrees_with_the_library(sound: Path) -> None:
    from safetensors import safe_open

    archive = read_archive(sound)
    for name in (FIRST, SECOND):
        with safe_open(sound / name, "pt") as theirs:
            ours = read_header(sound / name)
            assert sorted(ours) == sorted(theirs.keys())
            assert all(list(ours[key].shape) == theirs.get_slice(key).get_shape() for key in ours)
            assert all(archive.tensors[key] == ours[key] for key in ours)


def test_every_flipped_bit_of_a_header_is_refused_or_harmless(sound: Path, tmp_path: Path) -> None:
    """No crash, no endless loop, no memory taken: a UserError, or the same places under other names."""
    content = (sound / FIRST).read_bytes()
    length = int.from_bytes(content[:8], "little")
    path, taken = tmp_path / "x.safetensors", 0
    spans = {saved.chunks[0].at for saved in read_header(sound / FIRST).values()}
    for bit in range(0, 8 * (8 + length), 37):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            assert {saved.chunks[0].at for saved in read_header(path).values()} == spans
            taken += 1
        except UserError as error:
            assert "\n" not in str(error)
    assert taken > 0
