"""`logging=`: which sinks are on, with what settings, and one line for every mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
from refused import refused_in_one_line

from megatron_scratch import registry
from megatron_scratch.config import check, compose
from megatron_scratch.config import logging as section
from megatron_scratch.config.logging import TensorboardConfig, WandbConfig, check_logging, sinks
from megatron_scratch.util.errors import UserError


@pytest.mark.parametrize(("words", "names"), [
    ([], []),
    (["logging=console"], []),
    (["logging=wandb"], ["wandb"]),
    (["logging=tensorboard"], ["tensorboard"]),
    (["logging=[wandb,tensorboard]"], ["wandb", "tensorboard"]),
    (["logging=[console,tensorboard]"], ["tensorboard"]),
    (["logging=wandb", "logging.wandb=null"], []),
    (["+logging.wandb.project=x"], ["wandb"]),
])  # fmt: skip
def test_what_is_on(words: list[str], names: list[str], tmp_path: Path) -> None:
    cfg = compose.load(words)
    assert [name for name, _ in sinks(cfg.logging)] == names
    compose.save(cfg, tmp_path / "config.yaml")
    assert compose.load_file(tmp_path / "config.yaml") == cfg


def test_settings_are_typed() -> None:
    cfg = compose.load(["logging=[tensorboard,wandb]", "logging.wandb.tags=[a,b]", "logging.wandb.mode=offline",
                        "logging.tensorboard.flush_seconds=2"])  # fmt: skip
    assert cfg.logging == {
        "tensorboard": TensorboardConfig(flush_seconds=2.0),
        "wandb": WandbConfig(tags=["a", "b"], mode="offline"),
    }
    check_logging(cfg.logging, here=False)


@pytest.mark.parametrize(("overrides", "words"), [
    (["logging.wandb.project=x"], ["logging.wandb.project", "no effect without logging=wandb"]),
    (["logging=wandb", "logging.tensorboard.dir=x"], ["logging.tensorboard.dir", "no effect without logging=tensorboard"]),
    (["logging=wandb", "logging.wandb.projct=x"], ["logging.wandb.projct", "logging.wandb.project'"]),
    (["+logging.wandb.projct=x"], ["logging.wandb.projct", "logging.wandb.project'"]),
    (["logging=wnadb"], ["logging=wnadb", "did you mean 'wandb'"]),
    (["logging=[wandb,tensorbord]"], ["logging=tensorbord", "did you mean 'tensorboard'"]),
    (["+logging.wnadb.project=x"], ["wnadb", "did you mean 'wandb'"]),
    (["+logging.wandb=true"], ["logging.wandb=True", "logging.wandb.KEY"]),
    (["logging=null"], ["string or a list"]),
    (["logging=wandb", "logging.wandb.mode=ofline"], ["logging.wandb.mode='ofline'", "did you mean 'offline'"]),
    (["logging=wandb", "logging.wandb.project=team/name"], ["logging.wandb.project='team/name'", "logging.wandb.entity"]),
    (["logging=wandb", "logging.wandb.project=' '"], ["logging.wandb.project=' '"]),
    (["logging=wandb", "logging.wandb.group=''"], ["logging.wandb.group=''", "empty"]),
    (["logging=tensorboard", "logging.tensorboard.flush_seconds=0"], ["flush_seconds=0", "above 0"]),
    (["logging=tensorboard", "logging.tensorboard.flush_seconds=abc"], ["flush_seconds", "abc", "a number"]),
])  # fmt: skip
def test_refused_in_one_line(overrides: list[str], words: list[str]) -> None:
    refused_in_one_line(1, overrides, words)


def test_a_key_is_no_key_and_is_not_repeated() -> None:
    """Secrets come from the environment only; one that somebody gives all the same does not get into a terminal or a log."""
    with pytest.raises(UserError) as caught:
        compose.load(["logging=wandb", "logging.wandb.api_key=SECRET"])
    assert "logging.wandb.api_key is not a key" in str(caught.value) and "SECRET" not in str(caught.value)


def test_a_package_that_is_missing_is_said_where_the_run_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WandbConfig, "package", "no_such_package")
    with pytest.raises(UserError, match=r'logging=wandb needs .*no_such_package.*: pip install "megatron-scratch\[wandb\]"'):
        check_logging({"wandb": WandbConfig()}, here=True)
    check_logging({"wandb": WandbConfig()}, here=False)  # a cluster's nodes have their own
    refused_in_one_line(1, ["logging=wandb"], ["pip install"])


def test_a_folder_named_like_a_package_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "left_by_wandb").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not section._installed("left_by_wandb")


def test_the_config_of_an_old_run_is_read(tmp_path: Path) -> None:
    cfg = compose.load([])
    compose.save(cfg, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    assert "logging: {}\n" in text
    (tmp_path / "config.yaml").write_text(text.replace("logging: {}\n", "logging:\n  name: console\n"))
    assert compose.load_file(tmp_path / "config.yaml") == cfg


PLUGIN = """
from dataclasses import dataclass
from megatron_scratch.config.logging import SinkConfig
from megatron_scratch.registry import register
from megatron_scratch.util.errors import UserError

@dataclass
class Mine(SinkConfig):
    where: str = "nowhere"
    times: int = 1

    def check(self) -> None:
        if self.times < 1:
            raise UserError(f"logging.my_sink.times={self.times} must be at least 1")

register("logging", "my_sink", "my_sink_plugin:Sink", Mine)
register("logging", "bare_sink", "my_sink_plugin:Sink")
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_sink_plugin.py").write_text(PLUGIN)
    (tmp_path / "groups" / "logging").mkdir(parents=True)
    (tmp_path / "groups" / "logging" / "my_sink.yaml").write_text(
        "defaults:\n  - schema_my_sink\n  - _self_\nmy_sink:\n  times: 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    registry.names("logging")  # the package's own are listed once
    monkeypatch.setattr(registry, "_ENTRIES", {kind: dict(table) for kind, table in registry._ENTRIES.items()})
    return "plugins=[my_sink_plugin]"


def test_a_sink_of_your_own(plugin: str, tmp_path: Path) -> None:
    cfg = compose.load([plugin, "+logging.my_sink.where=here"])
    assert cfg.logging["my_sink"].where == "here"
    compose.save(cfg, tmp_path / "config.yaml")
    assert compose.load_file(tmp_path / "config.yaml") == cfg
    cfg = compose.load([plugin, "logging=[my_sink,tensorboard]", "logging.my_sink.where=there"], [str(tmp_path / "groups")])
    assert (cfg.logging["my_sink"].where, cfg.logging["my_sink"].times) == ("there", 3)
    assert [name for name, _ in sinks(cfg.logging)] == ["my_sink", "tensorboard"]
    assert list(compose.load([plugin, "+logging.bare_sink={}"]).logging) == ["bare_sink"]


@pytest.mark.parametrize(("word", "said"), [
    ("+logging.my_sink.wher=x", "logging.my_sink.where"),
    ("+logging.my_sink.times=0", "times=0 must be at least 1"),
    ("+logging.my_sink.times=x", "whole number"),
    ("logging.my_sink.where=x", "no effect without logging=my_sink"),
])  # fmt: skip
def test_a_sink_of_your_own_is_checked_like_ours(plugin: str, word: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        check(compose.load([plugin, word]), world=1)


def test_free_keys_need_no_plus() -> None:
    assert compose._free("data.valid_sets.wiki=a/b") == "++data.valid_sets.wiki=a/b"
    assert compose._free("data.valid_sets={wiki: a}") == "++data.valid_sets={wiki: a}"
    assert compose._free("data.valid=a/b") == "data.valid=a/b"


def test_the_runs_of_a_sweep_are_a_group(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    pytest.importorskip("tensorboard")
    from megatron_scratch.launch.sweep import points
    from megatron_scratch.launch.sweep.record import Point, Sweep
    from megatron_scratch.launch.sweep.words import Words

    def group(*words: str) -> object:
        sweep = Sweep(tmp_path / "s", "my_sweep", [f"data.dir={corpus}", "launcher.processes=1", *words])
        cfg, _ = points._config(sweep, Point(0, ["seed=1"]), Words([], []), [])
        return cfg.logging["wandb"].group if "wandb" in cfg.logging else None

    monkeypatch.setattr(points, "check_gpus", lambda *args: None)
    assert group("logging=wandb") == "my_sweep"
    assert group("logging=wandb", "logging.wandb.group=own") == "own"
    assert group("logging=tensorboard") is None
