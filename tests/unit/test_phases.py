"""Where a step's time goes, on a clock of the test's own; and what a rewind drops and says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_scratch.train.heartbeat import Pulse
from megatron_scratch.train.phases import DRAIN, Phases
from megatron_scratch.train.rundir import RunDir, read_jsonl

SPENT = {"data": 2.0, "forward/backward": 10.0, "reduce": 1.0, "update": 3.0, "hooks": 4.0}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def step(pulse: Pulse, clock: Clock) -> None:
    for phase, seconds in SPENT.items():
        pulse.enter(phase)
        if phase == "hooks":
            with pulse.during("save"):
                clock.now += 7.0
        clock.now += seconds


def test_parts_of_steps_add_up() -> None:
    """However many steps there are between two looks: marks of the past are added up on the way."""
    for steps in (1, 3, DRAIN):
        clock = Clock()
        phases = Phases(torch.device("cpu"), clock)
        pulse = Pulse(told=phases.entered)
        for _ in range(2):
            for _ in range(steps):
                step(pulse, clock)
            assert len(phases.marks) <= DRAIN + 1
            assert phases.since_last() == {"data_seconds": 2.0 * steps, "forward_backward_seconds": 10.0 * steps,
                                           "optimizer_seconds": 4.0 * steps, "checkpoint_seconds": 7.0 * steps}  # fmt: skip


def test_compilation_counts_as_forward() -> None:
    clock = Clock()
    phases = Phases(torch.device("cpu"), clock)
    step(Pulse(compiles=True, told=phases.entered), clock)
    assert phases.since_last()["forward_backward_seconds"] == 10.0


def test_a_rewind_drops_rows_of_all_files_and_says_what_is_lost(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.create()
    for n in range(10, 60, 10):
        run.log({"step": n, "loss": 1.0, "step_seconds": 0.5})
        run.log({"step": n, "val_loss": 1.0})
        run.log_layers({"step": n, "layers": {}})
        run.sample({"step": n, "text": ""})
    run.rewind(30)
    for path in (run.metrics, run.layers, run.samples):
        assert {row["step"] for row in read_jsonl(path)} == {10, 20, 30}
    (event,) = read_jsonl(run.ledger)
    assert (event["event"], event["step"], event["to"], event["seconds"]) == ("rewind", 30, 50, 10.0)
    run.rewind(30)
    assert len(read_jsonl(run.ledger)) == 1, "nothing was lost"


def test_half_a_last_line_does_not_spoil_the_next_row(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.create()
    run.metrics.write_text(json.dumps({"step": 1, "loss": 1.0}) + '\n{"step": 2, "lo')
    run.rewind(5)
    run.log({"step": 6, "loss": 2.0})
    assert [row["step"] for row in read_jsonl(run.metrics)] == [1, 6]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_marks_on_a_gpu_are_when_the_device_comes_to_them() -> None:
    """The host is through with a phase long before the device: what counts is the device's time."""
    device = torch.device("cuda", 0)
    phases = Phases(device)
    pulse = Pulse(told=phases.entered)
    a = torch.randn(4096, 4096, device=device)
    a @ a
    phases.since_last()
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    pulse.enter("forward/backward")
    before.record()
    for _ in range(200):
        a @ a
    after.record()
    pulse.enter("hooks")
    found = phases.since_last()["forward_backward_seconds"]
    assert 0.9 < found / (before.elapsed_time(after) / 1000) < 1.1, "two pairs of events around the same kernels"
