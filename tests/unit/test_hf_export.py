"""To Hugging Face and back: every family comes back bit for bit; what cannot be exported is said in one line."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hf_models import LLAMA, MODELS, VOCAB, do_export, do_import, imported, make_run, true_rows
from transformers import AutoModelForCausalLM

from megatron_scratch.checkpoint import store
from megatron_scratch.cli import main
from megatron_scratch.config import compose
from megatron_scratch.models import Decoder
from megatron_scratch.parallel import SINGLE, materialize
from megatron_scratch.util.errors import RunFailed


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_there_and_back(name: str, tmp_path: Path) -> None:
    model = MODELS[name]
    state = make_run(tmp_path / "run", model)
    lines = do_export(tmp_path / "run", tmp_path / "out")
    assert len([line for line in lines if "tolerance" in line]) == 2
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, attn_implementation="eager").eval()
    decoder = Decoder(model, SINGLE)
    materialize(decoder, 1, torch.device("cpu"))
    decoder.load_state_dict(state)
    tokens = torch.arange(VOCAB).view(3, 100)
    ours, want = decoder.eval().logits(decoder(tokens))[..., :VOCAB], theirs(tokens).logits
    torch.testing.assert_close(ours, want, rtol=0, atol=2e-5 * float(want.abs().max()))
    do_import(tmp_path / "out", tmp_path / "back", fused_qkv=model.fused_qkv)
    back = imported(tmp_path / "back")
    assert back.keys() == state.keys()
    for key, tensor in state.items():
        assert torch.equal(true_rows(key, back[key]), true_rows(key, tensor)), key
    cfg = compose.load_file(tmp_path / "back" / "config.yaml")
    free = {"scale_residual_init": True, "init_std": 0.02, "num_kv_heads": model.kv_heads, "head_dim": model.head_size}
    same = replace(cfg.model, **{key: getattr(model, key) for key in free})
    assert same == model


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_shards_in_half_precision(dtype: str, tmp_path: Path) -> None:
    state = make_run(tmp_path / "run", LLAMA)
    lines = do_export(tmp_path / "run", tmp_path / "out", dtype=dtype, shard_gb=2e-5)
    shards = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert all(p.stat().st_size < 24_000 for p in (tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["dtype"], config["torch_dtype"], config["eos_token_id"]) == (dtype, dtype, 256)
    assert f"{len(shards)} files" in lines[1]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert theirs.dtype == getattr(torch, dtype)
    want = state["norm.weight"].to(getattr(torch, dtype))
    assert torch.equal(theirs.model.norm.weight, want)
    do_import(tmp_path / "out", tmp_path / "back")
    assert torch.equal(imported(tmp_path / "back")["norm.weight"], want.float())
    assert compose.load_file(tmp_path / "back" / "config.yaml").precision.name == "fp32"


def test_numbers_beyond_float16_are_not_exported(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.init, "normal_", lambda p, mean, std, generator: p.data.copy_(torch.full_like(p, 7e4)))
        make_run(tmp_path / "run", LLAMA)
    with pytest.raises(RunFailed, match="not finite in torch.float16"):
        do_export(tmp_path / "run", tmp_path / "out", dtype="float16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


REFUSED = [
    (["run"], "give the run and the new folder"),
    (["run", "out", "dtype=float8"], "dtype='float8' is not known; allowed: float32, bfloat16, float16"),
    (["run", "out", "shard_gb=0"], "shard_gb=0.0 must be above 0"),
    (["run", "out", "step=3"], "has no checkpoint of step 3; allowed: 7"),
    (["run/checkpoints/step_00000007", "out", "step=7"], "step=7 has no effect on"),
    (["no", "out"], "no is neither a checkpoint"),
    (["run", "run"], "run exists, and nothing is ever overwritten"),
    (["run", "no/out"], "no is not a folder"),
    (["post", "out"], "no Hugging Face architecture has this model"),
    (["bare", "out"], "bare has no tokenizer, as its data had none; give tokenizer=false"),
    (["other", "out"], "put back the config that wrote it"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs")
    make_run(path / "run", LLAMA)
    make_run(path / "post", replace(LLAMA, norm_place="post"))
    make_run(path / "bare", LLAMA)
    (path / "bare" / "tokenizer.json").unlink()
    make_run(path / "other", LLAMA)
    text = (path / "other" / "config.yaml").read_text()
    (path / "other" / "config.yaml").write_text(text.replace("ffn_size: 80", "ffn_size: 96"))
    return path


@pytest.mark.parametrize(("words", "message"), REFUSED, ids=[m[:30] for _, m in REFUSED])
def test_what_cannot_be_exported_is_one_line(
    words: list[str], message: str, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(runs)
    assert main(["ckpt", "export-hf", *words]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and message in err[0]
    assert sorted(p.name for p in runs.iterdir()) == ["bare", "other", "post", "run"]


@pytest.mark.parametrize("verb", ["export-hf", "import-hf"])
def test_without_transformers(
    verb: str, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    assert main(["ckpt", verb, str(runs / "run"), str(tmp_path / "out")]) == 2
    assert "pip install 'megatron-scratch[hf]'" in capsys.readouterr().err


def test_a_corrupt_checkpoint_is_passed_over_or_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    state = make_run(run, LLAMA)
    store.save(run / "checkpoints", 9, {f"model.{name}": t + 1 for name, t in state.items()}, {}, SINGLE)
    broken = next((run / "checkpoints" / "step_00000009").glob("*.safetensors"))
    content = bytearray(broken.read_bytes())
    content[-5] ^= 1
    broken.write_bytes(content)
    with pytest.raises(RunFailed, match="no checkpoint to export is whole"):
        do_export(run, tmp_path / "out", step=9)
    lines = do_export(run, tmp_path / "out")
    assert "passed over a corrupt checkpoint" in lines[0] and "step_00000007" in lines[1]


def test_the_config_group_of_an_import_is_its_model(tmp_path: Path) -> None:
    for name in ("gpt2", "llama3_rope", "qwen3_tied"):
        make_run(tmp_path / name, MODELS[name])
        do_export(tmp_path / name, tmp_path / f"{name}.out")
        do_import(tmp_path / f"{name}.out", tmp_path / f"{name}.back", dtype="bfloat16")
        saved = compose.load_file(tmp_path / f"{name}.back" / "config.yaml")
        again = compose.load(["model=imported"], [str(tmp_path / f"{name}.back" / "configs")])
        assert asdict(again.model) == asdict(saved.model)
        assert saved.precision.name == "bf16"
