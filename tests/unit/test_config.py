"""Every mistake in a config is one line that says what, got, allowed; exit code 2; nothing starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_scratch import registry
from megatron_scratch.cli import main
from megatron_scratch.config import check, compose
from megatron_scratch.util.errors import UserError

# (overrides, what the message must contain)
REFUSED = [
    (["optim.lrr=3"], ["optim.lrr", "optim.lr'"]),
    (["modle.num_layers=3"], ["modle.num_layers", "model.num_layers"]),
    (["+data.foo=1"], ["data.foo"]),
    (["+foo=1"], ["foo"]),
    (["train.steps=abc"], ["train.steps", "abc", "whole number"]),
    (["train.steps=1.5"], ["train.steps", "1.5"]),
    (["model=lama_tiny"], ["lama_tiny", "llama_tiny"]),
    (["engine=fdsp"], ["engine=fdsp", "ddp"]),
    (["model.norm=rmsnrm"], ["model.norm", "rmsnrm", "rmsnorm"]),
    (["model.position=rop"], ["model.position", "rope", "learned"]),
    (["model.num_heads=5"], ["128", "5", "head_dim"]),
    (["model.num_heads=4", "model.num_kv_heads=3"], ["num_kv_heads=3", "[1, 2, 4]"]),
    (["model.head_dim=31"], ["head_dim=31", "even"]),
    (["train.seq_len=4096"], ["seq_len=4096", "max_seq_len=512"]),
    (["train.global_batch_size=10", "train.micro_batch_size=4"], ["10", "4", "8, 12"]),
    (["train.ramp.start=3", "train.ramp.increment=4"], ["train.ramp", "start=3"]),
    (["train.steps=0"], ["train.steps=0", "at least 1"]),
    (["parallel.ep=2"], ["parallel.ep=2", "not in this version"]),
    (["optim=sgd", "optim.betas=[0.9,0.9]"], ["optim.betas"]),
    (["optim.betas=[1.0,0.9]"], ["optim.betas", "[0, 1)"]),
    (["optim.lr=0"], ["optim.lr=0"]),
    (["schedule.warmup_steps=2000"], ["warmup_steps=2000", "1000"]),
    (["schedule=wsd", "schedule.decay=lin"], ["schedule.decay", "linear"]),
    (["schedule.min_lr_ratio=2"], ["min_lr_ratio=2", "[0, 1]"]),
    (["+optim._target_=os.system"], ["_target_", "os.system", "refused"]),
    (["data.order=random"], ["data.order", "documents"]),
    (["data.blend=[a]"], ["data.blend", "PATH:WEIGHT"]),
    (["data.blend=[a:-1]"], ["data.blend", "PATH:WEIGHT"]),
    (["data.dir=x", "data.train=y"], ["data.dir", "data.train"]),
    (["corpus.tokenizer=sentencepiece_bp"], ["corpus.tokenizer", "sentencepiece_bpe"]),
    (["model.dropout=1"], ["model.dropout", "[0, 1)"]),
    (["model.rope.scaling=yarn", "model.position=learned"], ["model.rope.scaling", "position"]),
    (["model.rope.factor=8"], ["model.rope.factor=8", "scaling=none"]),
    (["model.rope.scaling=linear", "model.rope.beta_fast=16"], ["model.rope.beta_fast", "linear"]),
    (["train.ramp.samples=100"], ["train.ramp", "start"]),
    (["checkpoint.keep_last=-1"], ["checkpoint.keep_last"]),
    (["checkpoint.async_save=true"], ["checkpoint.every=0", "no effect"]),
    (["schedule=constant", "schedule.min_lr_ratio=0.5"], ["min_lr_ratio"]),
    (["name=${nope}"], ["nope"]),
]


@pytest.mark.parametrize(("overrides", "words"), REFUSED, ids=[r[0][-1] for r in REFUSED])
def test_refused_in_one_line(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        check(compose.load(overrides), world=1)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("argv", [["train", "optim.lrr=3"], ["trian"], ["data", "prepar"], ["plan"], ["train", "--wat"],
                                  ["train", "-m", "hydra/sweeper=nosuch"], ["generate"],
                                  ["generate", "r", "temperature=0", "top_k=5"], ["eval"],
                                  ["data", "inspect"], ["eval", "no/such/run"],
                                  ["data", "prepare", "corpus.input="],
                                  ["train", "--config-dir", "no/such/folder"]])  # fmt: skip
def test_exit_code_2(argv: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert not list(tmp_path.iterdir()), "a refused command must leave nothing behind"


def test_saved_config_reads_back_equal(tmp_path: Path) -> None:
    cfg = compose.load(["optim=muon", "schedule=wsd", "name=abc", "data.blend=[x/y-1:0.25,z:1]"])
    compose.save(cfg, tmp_path / "config.yaml")
    assert compose.load_file(tmp_path / "config.yaml") == cfg
    assert cfg.dir == "runs/abc"


def test_own_config_folder(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("num_layers: 7\n")
    assert compose.load(["model=mine"], [str(tmp_path)]).model.num_layers == 7


def test_plugin_registers_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_parts.py").write_text(
        "from megatron_scratch.registry import register\n"
        "register('norm', 'my_norm', 'megatron_scratch.models.norms:RMSNorm')\n")  # fmt: skip
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "_ENTRIES", {kind: dict(table) for kind, table in registry._ENTRIES.items()})
    registry.load_plugins(["my_parts"])
    check(compose.load(["model.norm=my_norm"]), world=1)
    with pytest.raises(UserError, match="no_such_module"):
        registry.load_plugins(["no_such_module"])


def test_data_parallel_batches_must_divide() -> None:
    cfg = compose.load(["train.global_batch_size=8", "train.micro_batch_size=4"])
    check(cfg, world=2)
    with pytest.raises(UserError, match="data-parallel size 4"):
        check(cfg, world=4)


def test_free_text_arguments() -> None:
    from megatron_scratch.config.verbs import GenerateArgs

    args = compose.parse_args(
        GenerateArgs, ["runs/x", 'prompt=def f(x): "a" # b\n  c: [1]', "temperature=0.5", "top_k=null"], "run"
    )
    assert (args.run, args.prompt, args.temperature, args.top_k) == ("runs/x", 'def f(x): "a" # b\n  c: [1]', 0.5, None)
    with pytest.raises(UserError, match="did you mean 'temperature'"):
        compose.parse_args(GenerateArgs, ["temprature=1"], "run")


def test_a_plugin_brings_an_engine_with_settings_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_engines.py").write_text(
        "from dataclasses import dataclass\n"
        "from megatron_scratch.config.engine import EngineConfig\n"
        "from megatron_scratch.registry import register\n"
        "@dataclass\n"
        "class Mine(EngineConfig):\n    name: str = 'mine'\n    pieces: int = 3\n"
        "register('engine', 'mine', lambda cfg, parts: (cfg, parts), Mine)\n"
        "register('engine', 'bare', lambda cfg, parts: (cfg, parts))\n"
    )
    (tmp_path / "engine").mkdir()
    for name in ("mine", "bare"):
        (tmp_path / "engine" / f"{name}.yaml").write_text(f"defaults: [schema_{name}, _self_]\nname: {name}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_ENTRIES", {kind: dict(table) for kind, table in registry._ENTRIES.items()})
    cfg = compose.load(["plugins=[my_engines]", "engine=mine", "engine.pieces=5"], [str(tmp_path)])
    check(cfg, 1)
    compose.save(cfg, tmp_path / "config.yaml")
    again = compose.load_file(tmp_path / "config.yaml")
    assert (again.engine.name, again.engine.pieces) == ("mine", 5) and again == cfg
    assert vars(compose.load(["plugins=[my_engines]", "engine=bare"], [str(tmp_path)]).engine) == {"name": "bare"}
    with pytest.raises(UserError, match="engine.bucket_mb"):
        compose.load(["plugins=[my_engines]", "engine=mine", "engine.bucket_mb=1"], [str(tmp_path)])
