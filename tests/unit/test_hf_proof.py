"""What is wrong is seen before it is published, and what is killed or interrupted leaves nothing under its final name."""

from __future__ import annotations

import gc
import os
import signal
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import LLAMA, MODELS, VOCAB, do_export, do_import, make_run

from megatron_scratch.checkpoint import manifest as manifests
from megatron_scratch.config.model import ModelConfig
from megatron_scratch.models import hf
from megatron_scratch.train.hf import export as exporting
from megatron_scratch.train.hf import importing, proof, publish
from megatron_scratch.util.errors import RunFailed, UserError


def test_what_the_proof_saw_is_far_from_what_it_allows(tmp_path: Path) -> None:
    """The tolerance is rounding's: the difference is a few percent of it at most, at any width, and never 0."""
    for name in ("gpt2", "llama", "llama3_rope", "llama_yarn"):
        make_run(tmp_path / name, MODELS[name])
        seen: list[proof.Proof] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(proof, "compare", lambda *args, seen=seen, plain=proof.compare: seen.append(plain(*args)) or seen[-1])
            do_export(tmp_path / name, tmp_path / f"{name}.out")
        for found in seen:
            assert 0 < found.worst < found.tolerance / 3, (name, found)
            assert found.tolerance < 3e-4 * found.largest, (name, found)


def test_never_the_whole_model_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 30 layers, what is outside of them and two more at most: everything that is read is counted for as long as it lives."""
    run, out = tmp_path / "run", tmp_path / "out"
    deep = replace(LLAMA, num_layers=30)
    sizes = {name: t.nbytes for name, t in make_run(run, deep).items()}
    outside, whole = sum(size for name, size in sizes.items() if not name.startswith("layers.")), sum(sizes.values())
    layer = (whole - outside) // deep.num_layers
    monkeypatch.setattr(exporting, "WHOLE", 0)
    live, peak = [0], [0]

    def count(change: int) -> None:
        live[0] += change
        peak[0] = max(peak[0], live[0])

    def counted(folder: Path, saved: manifests.Saved, plain: Any = manifests.tensor) -> Any:
        array = plain(folder, saved)
        count(array.nbytes)
        weakref.finalize(array, count, -array.nbytes)
        return array

    monkeypatch.setattr(manifests, "tensor", counted)
    for work in (lambda: do_export(run, out), lambda: do_import(out, tmp_path / "back")):
        peak[0] = live[0]
        work()
        gc.collect()
        assert live[0] == 0
        assert outside < peak[0] <= outside + 2 * layer < whole / 2


# A bug of the mapping, put in on purpose; each changes the meaning of the folder and none its shapes. What would see it is no
# check of names, only the numbers.
def swap_names(a: str, b: str) -> Callable[[pytest.MonkeyPatch], None]:
    def arm(patch: pytest.MonkeyPatch) -> None:
        for family in (hf.LLAMA, hf.QWEN3, hf.GPT2):
            names = dict(family.names)
            if a in names and b in names:
                names[a], names[b] = names[b], names[a]
                patch.setitem(family.__dict__, "names", names)

    return arm


def rope_pairs(patch: pytest.MonkeyPatch) -> None:
    """The pairing of Meta's own files instead of Hugging Face's, both ways."""
    split, fuse = hf.split_qkv, hf.fuse_qkv

    def permuted(state: Any, order: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        return {n: order(t) if ".q." in n or ".k." in n else t for n, t in state.items()}

    def there(t: torch.Tensor) -> torch.Tensor:
        return t.unflatten(0, (-1, 4, 2)).transpose(1, 2).flatten(0, 2)

    def here(t: torch.Tensor) -> torch.Tensor:
        return t.unflatten(0, (-1, 2, 4)).transpose(1, 2).flatten(0, 2)

    patch.setattr(hf, "split_qkv", lambda state, cfg: permuted(split(state, cfg), there))
    patch.setattr(hf, "fuse_qkv", lambda state, cfg: fuse(permuted(state, here), cfg))


def no_transposition(patch: pytest.MonkeyPatch) -> None:
    """Of the square weight alone: the shapes are right."""
    patch.setitem(hf.GPT2.__dict__, "transposed", ("attn.c_attn", "mlp.c_fc", "mlp.c_proj"))


def config_value(**values: Any) -> Callable[[pytest.MonkeyPatch], None]:
    def arm(patch: pytest.MonkeyPatch) -> None:
        right = hf.hf_config
        patch.setattr(exporting, "hf_config", lambda cfg: {**right(cfg), **values})
        patch.setattr(importing, "read_config", lambda config: replace(hf.read_config(config), norm_eps=0.1))

    return arm


def plus_one(patch: pytest.MonkeyPatch) -> None:
    """Norm weights kept as w - 1, as Gemma keeps them."""
    to_hf, to_ours = hf.to_hf, hf.to_ours

    def shifted(state: Any, by: float) -> Any:
        return {n: t + by if "norm" in n and n.endswith("weight") and t.device.type != "meta" else t for n, t in state.items()}

    patch.setattr(exporting, "to_hf", lambda state, cfg: to_hf(shifted(state, -1.0), cfg))
    patch.setattr(exporting, "to_ours", lambda state, cfg: shifted(to_ours(state, cfg), 1.0))
    patch.setattr(importing, "to_ours", lambda state, cfg: shifted(to_ours(state, cfg), 1.0))


MUTANTS = {
    "q and k": ("mha", swap_names("attention.q", "attention.k")),
    "k and v": ("llama", swap_names("attention.k", "attention.v")),
    "gate and up": ("llama", swap_names("mlp.gate", "mlp.up")),
    "the two norms": ("llama", swap_names("attention_norm", "mlp_norm")),
    "norms of q and k": ("qwen3", swap_names("attention.q_norm", "attention.k_norm")),
    "embedding and head": ("llama", swap_names("embed", "head")),
    "pairs of the rotation": ("llama", rope_pairs),
    "a transposition forgotten": ("gpt2", no_transposition),
    "norm off by one": ("llama", plus_one),
    "epsilon": ("llama", config_value(rms_norm_eps=0.1)),
    "theta": ("llama", config_value(rope_theta=5e5, rope_parameters={"rope_type": "default", "rope_theta": 5e5})),
    "activation": ("gpt2", config_value(activation_function="relu")),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_mapping_is_seen_and_nothing_is_published(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    which, arm = MUTANTS[name]
    model = replace(LLAMA, num_kv_heads=4) if which == "mha" else MODELS[which]
    make_run(tmp_path / "run", model)
    do_export(tmp_path / "run", tmp_path / "right")
    arm(monkeypatch)
    if name == "embedding and head":  # to_hf finds the true rows by our name
        monkeypatch.setattr(exporting, "to_ours", lambda state, cfg: hf.to_ours(state, cfg))
    with pytest.raises(RunFailed, match="the logits are not transformers': worst difference"):
        do_export(tmp_path / "run", tmp_path / "out")
    with pytest.raises(RunFailed, match="the logits are not transformers': worst difference"):
        do_import(tmp_path / "right", tmp_path / "back")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["right", "run"]


def test_a_wrong_row_that_no_logit_depends_on_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "run", LLAMA)
    unused = sorted(set(range(VOCAB)) - set(proof.probe(LLAMA)[0].flatten().tolist()))[0]
    right = hf.to_hf

    def wrong(state: Any, cfg: ModelConfig) -> Any:
        out = right(state, cfg)
        if "model.embed_tokens.weight" in out:
            out["model.embed_tokens.weight"] = out["model.embed_tokens.weight"].clone()
            out["model.embed_tokens.weight"][unused] = 0.0
        return out

    monkeypatch.setattr(exporting, "to_hf", wrong)
    with pytest.raises(RunFailed, match="embed.weight does not come back"):
        do_export(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_nan_is_no_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "run", LLAMA)
    monkeypatch.setattr(proof, "their_logits", lambda *args: torch.full((2, 64, VOCAB), float("nan")))
    with pytest.raises(RunFailed, match="worst difference nan"):
        do_export(tmp_path / "run", tmp_path / "out")


def killed_in(work: Callable[[], Any]) -> int:
    """Run in a fork that kills itself when the proof would begin. Returns the signal."""
    pid = os.fork()
    if pid == 0:
        proof.our_logits = lambda *args: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
        work()
        os._exit(0)
    return os.WTERMSIG(os.waitpid(pid, 0)[1])


def test_killed_nothing_is_there_and_the_next_one_clears_up(tmp_path: Path) -> None:
    make_run(tmp_path / "run", LLAMA)
    out, back = tmp_path / "out", tmp_path / "back"
    assert killed_in(lambda: do_export(tmp_path / "run", out)) == signal.SIGKILL
    assert not out.exists() and (tmp_path / ".out.tmp" / "model.safetensors").exists()
    (tmp_path / ".out.tmp" / "model-00001-of-00002.safetensors").write_bytes(b"of an export with another shard_gb")
    do_export(tmp_path / "run", out)
    assert killed_in(lambda: do_import(out, back)) == signal.SIGKILL
    assert not back.exists()
    do_import(out, back)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "out", "run"]
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {p.name for p in out.iterdir()} == names


def test_interrupted_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "run", LLAMA)

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(proof, "our_logits", interrupt)
    with pytest.raises(KeyboardInterrupt):
        do_export(tmp_path / "run", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_two_writers_of_one_folder(tmp_path: Path) -> None:
    with publish.new_folder(tmp_path / "out") as tmp:
        (tmp / "file").write_text("mine")
        with pytest.raises(UserError, match="another process is writing"), publish.new_folder(tmp_path / "out"):
            pass
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["file"]
    with pytest.raises(UserError, match="nothing is ever overwritten"), publish.new_folder(tmp_path / "out"):
        pass


def test_files_are_durable_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (log.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name), fsync(fd))[1])
    monkeypatch.setattr(Path, "rename", lambda self, to: (log.append("rename"), rename(self, to))[1])
    with publish.new_folder(tmp_path / "out") as tmp:
        (tmp / "inner").mkdir()
        (tmp / "inner" / "file").write_text("x")
    assert log.index("file") < log.index("inner") < log.index(".out.tmp") < log.index("rename") < log.index(tmp_path.name)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "run", LLAMA)
    do_export(tmp_path / "run", tmp_path / "src")

    def full(path: Path, contents: Any) -> None:
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "write_file", full)
    monkeypatch.setattr(importing, "write_file", full)
    with pytest.raises(RunFailed, match="out could not be written: .*No space left on device; nothing is left of it"):
        do_export(tmp_path / "run", tmp_path / "out")
    with pytest.raises(RunFailed, match="back could not be written: .*No space left"):
        do_import(tmp_path / "src", tmp_path / "back")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "src"]


def test_what_the_disk_changed_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint of an import is read again as it lies on the disk, and is not what was written."""
    make_run(tmp_path / "run", LLAMA)
    do_export(tmp_path / "run", tmp_path / "src")
    right = importing.write_file

    def flipped(path: Path, contents: Any) -> Any:
        file = right(path, contents)
        content = bytearray(path.read_bytes())
        content[-9] ^= 1
        path.write_bytes(content)
        return file

    monkeypatch.setattr(importing, "write_file", flipped)
    with pytest.raises(RunFailed, match="its sha256 is not the manifest's"):
        do_import(tmp_path / "src", tmp_path / "back")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "src"]
