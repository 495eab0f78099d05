"""Where the time of a trace goes: every nanosecond in one part, by hand-made traces of a CPU and of a GPU."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_scratch.config.profile import ProfileConfig, check_profile
from megatron_scratch.report.memory import draw, memory
from megatron_scratch.report.trace import PARTS, account, read
from megatron_scratch.report.trace_table import as_json, table
from megatron_scratch.util.errors import UserError

MAIN, OTHER = 1, 2


def event(cat: str, name: str, start: float, end: float, tid: int = MAIN, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": end - start, "tid": tid, "args": args}


def op(name: str, start: float, end: float, tid: int = MAIN) -> dict[str, Any]:
    return event("cpu_op", name, start, end, tid)


def note(name: str, start: float, end: float, tid: int = MAIN) -> dict[str, Any]:
    return event("user_annotation", name, start, end, tid)


def link(number: int, forward: float, backward: float, tid: int = MAIN) -> list[dict[str, Any]]:
    return [{"ph": ph, "cat": "fwdbwd", "name": "fwdbwd", "id": number, "ts": ts, "tid": thread}
            for ph, ts, thread in (("s", forward, MAIN), ("f", backward, tid))]  # fmt: skip


def parts(events: list[dict[str, Any]], step: int = 0) -> dict[str, float]:
    """Microseconds of a step; parts that took none are left out."""
    found = account({"traceEvents": events})
    return {part: ns / 1000 for part, ns in found.steps[step].parts.items() if ns}


def test_each_operator_has_its_own_time_and_the_rest_is_idle() -> None:
    events = [note("step 3", 0, 100), op("aten::linear", 10, 40), op("aten::addmm", 15, 35), op("aten::copy_", 20, 25),
              op("aten::mul", 50, 60)]  # fmt: skip
    assert parts(events) == {"gemm": 30, "other compute": 10, "idle": 60}
    found = account({"traceEvents": events})
    assert found.steps[0].number == 3 and found.wall == 100_000
    assert ("aten::addmm", "gemm", 15_000, 1) in found.top, "20 without the copy's 5, and one call"


def test_marks_and_names_say_what_an_operator_is_for() -> None:
    events = [note("step 1", 0, 200), note("part: norm", 0, 20), op("aten::mul", 5, 15),
              note("part: attention", 20, 40), op("aten::bmm", 20, 30), op("aten::softmax", 30, 40),
              note("part: loss", 40, 80), op("aten::mm", 40, 60), op("aten::exp", 60, 80),
              op("aten::_scaled_dot_product_flash_attention_for_cpu", 80, 90), op("aten::native_layer_norm", 90, 97),
              op("aten::bmm", 97, 99)]  # fmt: skip
    assert parts(events) == {"norm": 10 + 7, "attention": 20 + 10, "gemm": 20 + 2, "loss": 20, "idle": 101 + 10}


def test_backward_is_for_what_its_forward_was_for() -> None:
    events = [note("step 1", 0, 100), note("part: norm", 0, 10), op("aten::mul", 0, 10), op("aten::add", 10, 20),
              op("autograd::engine::evaluate_function: AddBackward0", 50, 60), op("AddBackward0", 51, 60), op("aten::sum", 52, 60),
              op("autograd::engine::evaluate_function: MulBackward0", 60, 80), op("MulBackward0", 60, 80), op("aten::mul", 61, 80),
              *link(1, 0, 60), *link(2, 10, 51)]  # fmt: skip
    assert parts(events) == {"norm": 10 + 19, "other compute": 10 + 8, "idle": 100 - 47}
    on_another_thread = [{**e, "tid": OTHER} if e["ts"] >= 50 and e["ph"] == "X" else e for e in events if e["ph"] == "X"]
    assert parts(on_another_thread + link(1, 0, 60, OTHER) + link(2, 10, 51, OTHER)) == parts(events)


def test_communication_is_what_no_operator_covers() -> None:
    events = [note("step 1", 0, 100), op("c10d::allreduce_", 0, 5), note("gloo:all_reduce", 3, 60, OTHER), op("aten::mm", 10, 30),
              op("_Scatter", 30, 90)]  # fmt: skip
    found = account({"traceEvents": events})
    assert parts(events) == {"gemm": 20, "communication": 10 + 30, "idle": 40}, "a function of autograd that waits computes nothing"
    assert found.hidden == 20_000


def test_phases_say_data_optimizer_and_what_lies_between_steps() -> None:
    events = [note("step 1", 0, 50), note("step 2", 52, 100),
              note("phase: data", 0, 10), note("phase: forward/backward", 10, 20), note("phase: update", 20, 40),
              note("phase: hooks", 40, 50), note("phase: hooks", 52, 60), note("phase: data", 60, 80),
              op("aten::to", 2, 4), op("aten::mul", 12, 14), op("aten::mm", 20, 30), op("aten::add", 41, 42),
              op("aten::mm", 53, 54), note("gloo:all_reduce", 70, 75, OTHER)]  # fmt: skip
    assert parts(events) == {"data": 10, "other compute": 2, "optimizer": 10, "between steps": 10, "idle": 8 + 10 + 2}
    assert parts(events, 1) == {"between steps": 8, "data": 15, "communication": 5, "idle": 20}


def test_a_gpu_is_told_by_its_kernels_and_by_what_launched_them() -> None:
    def launch(start: float, number: int, tid: int = MAIN) -> dict[str, Any]:
        return event("cuda_runtime", "cudaLaunchKernel", start, start + 1, tid, correlation=number)

    def kernel(name: str, start: float, end: float, number: int = 0, cat: str = "kernel") -> dict[str, Any]:
        return event(cat, name, start, end, 7, correlation=number)

    events = [note("step 1", 0, 1000), note("phase: forward/backward", 0, 500), note("phase: update", 500, 600),
              note("phase: hooks", 600, 700), note("phase: data", 700, 900),
              op("aten::mm", 0, 10), launch(2, 1), kernel("some_kernel", 50, 150, 1),
              note("part: norm", 10, 20), op("aten::mul", 10, 20), launch(12, 2), kernel("elementwise", 150, 200, 2),
              op("ncclDevKernel", 20, 21), launch(20.5, 3), kernel("ncclDevKernel_AllReduce_Sum_f32", 180, 260, 3),
              op("MulBackward0", 30, 40, OTHER), launch(32, 4, OTHER), kernel("elementwise", 300, 310, 4), *link(1, 10, 30, OTHER),
              kernel("sm90_xmma_gemm_bf16", 310, 320), kernel("flash_fwd_cutlass", 320, 330),
              op("aten::mm", 500, 510), launch(501, 5), kernel("newton_schulz_gemm", 505, 705, 5),
              kernel("Memcpy HtoD", 950, 960, cat="gpu_memcpy"),
              note("nccl:all_reduce", 400, 450),
              event("gpu_user_annotation", "part: norm", 150, 200, 7), op("aten::mul", 960, 970)]  # fmt: skip
    found = account({"traceEvents": events})
    assert found.on_gpu and found.wall == 1_000_000
    assert parts(events) == {"gemm": 110, "norm": 50 + 10, "communication": 60, "attention": 10, "optimizer": 200,
                             "other compute": 10, "data": 195, "idle": 355}  # fmt: skip
    assert found.hidden == 20_000


def test_the_parts_of_any_trace_add_up_to_its_wall_time() -> None:
    """Overlaps, children that end after their parents by rounding, times that are no whole nanoseconds."""
    events = [note(f"step {i}", 1e12 + 33.3333 * i, 1e12 + 33.3333 * i + 30.1) for i in range(5)]
    for i in range(200):
        start = 1e12 + (i * 7919 % 1500) / 10 - 5
        events.append(op(("aten::mm", "aten::mul", "c10d::allreduce_", "_Gather")[i % 4], start, start + i % 13 + 0.001, i % 3))
        events.append(
            note(("gloo:send", "phase: data", "phase: hooks", "part: loss")[i % 4], start + 0.5, start + i % 7 + 0.5, i % 3)
        )
    for e in events[:5]:
        e["tid"] = 0
    found = account({"traceEvents": events})
    first, last = events[0], events[4]
    assert found.wall == round(last["ts"] * 1000) + round(last["dur"] * 1000) - round(first["ts"] * 1000)
    assert all(set(s.parts) == set(PARTS) and min(s.parts.values()) >= 0 for s in found.steps)


def test_what_is_written_adds_up_too(tmp_path: Path) -> None:
    events = [note("step 10", 0, 1000), note("step 11", 1000, 3000), op("aten::mm", 100, 1600), op("aten::mul", 2000, 2500)]
    path = tmp_path / "trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    found = account(read(path))
    found.facts = {"rank": 3}
    written = as_json(found)
    for row in (*written["steps"], written):
        assert sum(row["parts"].values()) == pytest.approx(row["seconds"], rel=1e-12)
    assert [row["step"] for row in written["steps"]] == [10, 11] and written["rank"] == 3
    text = table(found)
    assert "rank 3, steps 10 to 11: 1.500 ms a step, 3.000 ms in all" in text
    assert "gemm                  0.750   50.0%       0.900       0.600  matrix products" in text


def test_a_trace_of_something_else_is_refused() -> None:
    with pytest.raises(ValueError, match="step"):
        account({"traceEvents": [op("aten::mm", 0, 1)]})


def test_memory_over_time(tmp_path: Path) -> None:
    def change(ts: float, total: int, device: int = 0) -> dict[str, Any]:
        return {"ph": "i", "name": "[memory]", "ts": ts, "args": {"Total Allocated": total, "Device Type": device}}

    events = [
        note("step 1", 1000, 9000),
        change(2000, 5),
        change(2000.0001, 9),
        change(2000.0002, 1),
        change(9000, 3),
        change(9000, 7, 1),
    ]
    points = memory({"traceEvents": events})
    assert [total for _, total in points] == [9, 3], "the highest of what happens at one time"
    assert points[0][0] == pytest.approx(1.0, abs=0.01) and points[-1][0] == pytest.approx(8.0, abs=0.01)
    draw(points, tmp_path / "memory.png")
    assert (tmp_path / "memory.png").read_bytes()[:4] == b"\x89PNG"
    assert memory({"traceEvents": events[:1]}) == []


@pytest.mark.parametrize(("given", "message"), [
    ({"ranks": [1]}, "no effect without train.profile.steps"), ({"memory": True}, "no effect without"),
    ({"ranks": None}, "no effect without"),
    ({"steps": [3]}, "FIRST,LAST"), ({"steps": [0, 2]}, "1 <= FIRST"), ({"steps": [5, 4]}, "FIRST <= LAST"),
    ({"steps": [300, 501]}, "train.steps=500"), ({"steps": [1, 101]}, "101 steps"),
    ({"steps": [1, 2], "ranks": [2]}, "0 to 1"), ({"steps": [1, 2], "ranks": []}, "0 to 1"),
    ({"steps": [1, 2], "ranks": [0, 0]}, "different ranks"),
])  # fmt: skip
def test_what_cannot_be_profiled_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_profile(ProfileConfig(**given), steps=500, world=2)


def test_what_can_be_profiled() -> None:
    check_profile(ProfileConfig(), 500, 2)
    check_profile(ProfileConfig(steps=[500, 500], ranks=None, memory=True), 500, 2)
