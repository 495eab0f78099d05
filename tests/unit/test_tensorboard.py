"""Event files as TensorBoard's own reader sees them, value by value: after restarts, kills, and steps that are computed anew."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorboard")

from tensorboard.backend.event_processing import event_accumulator, plugin_event_accumulator  # noqa: E402
from tensorboard.util import tensor_util  # noqa: E402

from megatron_scratch.config import compose  # noqa: E402
from megatron_scratch.config.logging import TensorboardConfig  # noqa: E402
from megatron_scratch.logs.followers import Followers  # noqa: E402
from megatron_scratch.logs.sink import Begin  # noqa: E402
from megatron_scratch.logs.state import read_state  # noqa: E402
from megatron_scratch.logs.tensorboard import Tensorboard  # noqa: E402
from megatron_scratch.train.rundir import RunDir, read_jsonl  # noqa: E402

EVERY = {name: 0 for name in ("scalars", "text")}  # of each plugin's values


def read(folder: Path) -> plugin_event_accumulator.EventAccumulator:
    """As the server reads it."""
    found = plugin_event_accumulator.EventAccumulator(str(folder), size_guidance={"tensors": 0}, tensor_size_guidance=EVERY)
    found.Reload()
    return found


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    found = [(event.step, float(tensor_util.make_ndarray(event.tensor_proto))) for event in read(folder).Tensors(tag)]
    older = event_accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})  # which scripts use
    older.Reload()
    assert [(event.step, event.value) for event in older.Scalars(tag)] == found
    return found


def texts(folder: Path, tag: str) -> list[tuple[int, str]]:
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in read(folder).Tensors(tag)]


def sink(path: Path, state: dict[str, Any] | None = None, start: int = 0, **settings: Any) -> Tensorboard:
    begin = Begin(path, {"name": "a_run", "optim": {"lr": 0.1}}, "a_run", {"id": "x", **(state or {})}, start, {})
    return Tensorboard(TensorboardConfig(**settings), begin, lambda line: None)


def row(step: int, loss: float | None = None, **more: Any) -> dict[str, Any]:
    return {"step": step, "time": 1000.0 + step, "loss": 1 / (step + 1) if loss is None else loss, **more}


def test_every_number_of_a_row_has_its_tag_step_and_time(tmp_path: Path) -> None:
    tb = sink(tmp_path)
    rows = [row(step, lr=step * 1e-4, tokens=step * 1000, nan=float("nan")) for step in range(1, 50)]
    for found in rows:
        tb.metrics(found)
    tb.metrics({"step": 49, "time": 2000.0, "val_loss": 3.5, "val_loss/wiki": 2.5, "tokens": 49000})
    tb.metrics({"step": 50, "time": 2001.0, "skipped": "loss nan: not finite", "lr": 0.5, "flag": True})
    tb.layers(
        {"step": 50, "time": 3.0, "layers": {"embed": {"grad_norm": 1.5}, "layers.0": {"grad_norm": 2.5, "weight_norm": 9.0}}}
    )
    tb.flush()
    tb.close("finished", 0)
    folder = tmp_path / "tensorboard"
    assert sorted(set(read(folder).Tags()["tensors"]) - {"config"}) == sorted([
        "train/loss", "train/lr", "train/tokens", "train/nan", "eval/val_loss", "eval/val_loss/wiki", "eval/tokens",
        "layers/grad_norm/embed", "layers/grad_norm/layers.0", "layers/weight_norm/layers.0"])  # fmt: skip
    for key in ("loss", "tokens"):
        assert scalars(folder, f"train/{key}") == [(found["step"], float(np.float32(found[key]))) for found in rows]
        assert [event.wall_time for event in read(folder).Tensors(f"train/{key}")] == [found["time"] for found in rows]
    assert scalars(folder, "train/lr")[-1] == (50, 0.5) and len(read(folder).Tensors("train/nan")) == 49
    assert scalars(folder, "eval/val_loss") == [(49, 3.5)] and scalars(folder, "eval/val_loss/wiki") == [(49, 2.5)]
    assert scalars(folder, "layers/grad_norm/layers.0") == [(50, 2.5)]


def test_texts(tmp_path: Path) -> None:
    tb = sink(tmp_path, start=7)
    tb.metrics(row(8))
    tb.sample({"step": 8, "time": 5.0, "prompt": "Once\nupon", "text": " a time\n<b>"})
    tb.sample({"step": 8, "time": 5.0, "prompt": "", "text": "x"})
    tb.event({"time": "2026-01-31T12:00:00+0100", "event": "spike", "step": 8, "reason": "loss 9"})
    tb.event({"time": "2026-01-31T12:00:00+0100", "event": "save", "step": 8})
    tb.event({"time": "2026-01-31T12:00:01+0100", "event": "failed", "reason": "no memory"})
    tb.flush()
    folder = tmp_path / "tensorboard"
    assert texts(folder, "samples/Once upon") == [(8, "    Once\n    upon a time\n    <b>")]
    assert texts(folder, "samples/no prompt") == [(8, "    x")]
    assert [(step, "loss 9" in text, "no memory" in text) for step, text in texts(folder, "alerts")] == [
        (8, True, False), (8, False, True)]  # fmt: skip
    assert read(folder).Tensors("alerts")[0].wall_time == 1769857200.0
    ((step, config),) = texts(folder, "config")
    assert step == 7 and "lr: 0.1" in config
    assert read(folder).SummaryMetadata("alerts").plugin_data.plugin_name == "text"
    tb.close("failed", 1)


def test_steps_that_are_computed_anew_replace_the_old_ones(tmp_path: Path) -> None:
    tb = sink(tmp_path)
    for step in range(1, 7):
        tb.metrics(row(step))
    tb.event({"event": "spike", "step": 6, "reason": "loss 9", "time": ""})
    tb.rewound(3)
    for step in range(4, 6):
        tb.metrics(row(step, loss=7.0))
    tb.flush()
    assert scalars(tmp_path / "tensorboard", "train/loss")[2:] == [(3, 0.25), (4, 7.0), (5, 7.0)]
    assert [step for step, _ in texts(tmp_path / "tensorboard", "alerts")] == [6], "it did happen"
    assert [step for step, _ in texts(tmp_path / "tensorboard", "config")] == [0]
    tb.rewound(-1)
    tb.flush()
    assert scalars(tmp_path / "tensorboard", "train/loss") == []
    assert len(texts(tmp_path / "tensorboard", "config")) == 1
    tb.close("stopped", 75)


def test_what_was_written_and_not_kept_comes_again_and_is_there_once(tmp_path: Path) -> None:
    """A process that is killed between two of its `flush`; the rows since the first come again, among them one of its last step."""
    first = sink(tmp_path)
    first.metrics(row(1))
    first.metrics(row(2))
    state = first.flush()
    first.metrics({"step": 2, "time": 9.0, "val_loss": 1.0})
    first.metrics(row(3))
    first.file.close()  # all reaches the disk, and then it is killed
    with open(first.file.name, "ab") as f:
        f.write(b"half a rec")
    second = sink(tmp_path, state)
    second.metrics({"step": 2, "time": 9.0, "val_loss": 1.0})
    second.metrics(row(3))
    second.metrics(row(4))
    second.flush()
    second.close("finished", 0)
    folder = tmp_path / "tensorboard"
    assert [step for step, _ in scalars(folder, "train/loss")] == [1, 2, 3, 4]
    assert scalars(folder, "eval/val_loss") == [(2, 1.0)]
    assert len(texts(folder, "config")) == 1
    assert len(list(folder.glob("events*"))) == 2


def test_a_lost_state_is_made_up_for_by_all_rows(tmp_path: Path) -> None:
    """run.json is gone, the files are there: what the checkpoint remembers is too little to go on from."""
    for state in ({}, {"step": 2, "newest": 2}):
        tb = sink(tmp_path, state)
        for step in range(1, 4):
            tb.metrics(row(step))
        tb.flush()
        tb.close("finished", 0)
    assert [step for step, _ in scalars(tmp_path / "tensorboard", "train/loss")] == [1, 2, 3]


def test_files_of_one_second_are_read_in_their_order(tmp_path: Path) -> None:
    state: dict[str, Any] = {}
    for step in range(1, 6):
        tb = sink(tmp_path, state, dir=str(tmp_path / "elsewhere"))
        tb.metrics(row(step))
        state = tb.flush()
        tb.close("stopped", 75)
    assert [step for step, _ in scalars(tmp_path / "elsewhere", "train/loss")] == [1, 2, 3, 4, 5]


def until(true: Callable[[], Any]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_run_through_kills_and_resumes(tmp_path: Path) -> None:
    """The whole way: training's files, the follower process killed and started anew, a resume that goes back, a last one."""
    run = RunDir(tmp_path / "run")
    run.create()
    cfg = compose.load(["logging=tensorboard", "logging.tensorboard.flush_seconds=0.1", f"dir={run.path}"])
    compose.save(cfg, run.config)
    followers = Followers(cfg, run.path)

    def sent() -> int:
        return read_state(run.path, "tensorboard").get("sent", {}).get("metrics.jsonl", {}).get("rows", 0)

    run.record("start", step=0)
    followers.start(0)
    for step in range(1, 200):
        run.log(row(step))
    until(lambda: sent() == 199)
    process = followers.ends["tensorboard"].process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    for step in range(200, 300):
        run.log(row(step))
    until(lambda: (followers.told(), sent() == 299)[1])
    followers.close("failed", 1)

    for step in range(300, 310):  # nobody follows
        run.log(row(step))
    run.rewind(150)
    run.record("start", step=150)
    followers = Followers(cfg, run.path)
    followers.start(150)
    for step in range(151, 260):
        run.log(row(step, loss=step / 7))
    run.log({"step": 259, "time": 5.0, "val_loss": 2.0})
    run.record("finish", step=259)
    followers.close("finished", 0)

    rows = read_jsonl(run.metrics)
    want = [(found["step"], float(np.float32(found["loss"]))) for found in rows if "loss" in found]
    assert scalars(run.path / "tensorboard", "train/loss") == want and len(want) == 259
    assert scalars(run.path / "tensorboard", "eval/val_loss") == [(259, 2.0)]
