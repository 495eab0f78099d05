"""Where the time of some steps went: a Chrome trace by torch.profiler, cut so that every nanosecond is in one part.

On a GPU its kernels, by what launched them; on a CPU the operators' own time. What counts at any moment is the first of PARTS that
is going on: a message under a kernel costs nothing, so `communication` is the exposed part of it, and `idle` is when nothing was
going on at all (on a CPU: Python itself, and waiting for what is no message).

`train/profile.py` writes marks into the trace as annotations: "step N" around each step, "phase: X" for what the training thread
is at, "part: X" around functions that names alone do not tell. Backward finds its part through the trace's links from each
operator of forward to its node of backward.
"""

from __future__ import annotations

import gzip
import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COMPUTE = ("gemm", "attention", "norm", "loss", "optimizer", "other compute")
PARTS = (*COMPUTE, "between steps", "communication", "data", "idle")  # at one moment, the first one that is going on
BETWEEN = frozenset({"hooks", "evaluate", "sample", "save", "load", "start", "profile"})  # phases outside of a step's own work
OPTIMIZER = frozenset({"reduce", "update"})  # the norm of the gradients, clipping, the update

DEVICE = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
LAUNCH = frozenset({"cuda_runtime", "cuda_driver"})
MESSAGES = ("gloo:", "nccl:", "nccldev", "ncclkernel", "c10d::", "_c10d_functional::", "record_param_comms")
PRODUCTS = frozenset({"aten::mm", "aten::addmm", "aten::linear", "aten::bmm", "aten::baddbmm", "aten::_scaled_mm", "aten::mv",
                      "aten::addmv", "aten::mkldnn_linear", "mkldnn::_linear_pointwise", "megatron_scratch::onednn",
                      "mkl::_mkl_linear"})  # fmt: skip
NAMED = {  # part -> what is in the names of its operators and kernels, where no mark says it
    "attention": ("scaled_dot_product", "flash", "fmha", "flex_attention"),
    "norm": ("layer_norm", "layernorm", "rms_norm", "rmsnorm"),
    "loss": ("cross_entropy", "crossentropy", "nll_loss"),
    "optimizer": ("_fused_adam", "_fused_sgd", "multi_tensor_apply"),
    "gemm": ("gemm", "cutlass", "cublas", "nvjet", "xmma", "splitkreduce"),
}
INDEX = {part: i for i, part in enumerate(PARTS)}


@dataclass
class Span:
    """Something that takes time, in nanoseconds."""

    start: int
    end: int
    part: str
    name: str
    calls: int = 1  # 0: the same call, gone on with after what it has called


@dataclass
class Step:
    """Nanoseconds of one step by part; their sum is its wall time."""

    number: int
    parts: dict[str, int]

    @property
    def wall(self) -> int:
        return sum(self.parts.values())


@dataclass
class Account:
    """What the time of a window went into."""

    steps: list[Step]
    hidden: int  # ns of communication under compute
    top: list[tuple[str, str, int, int]]  # (operator or kernel, part, ns, calls), the longest first
    on_gpu: bool
    facts: dict[str, Any] = field(default_factory=dict)  # rank, host, ...: for people

    @property
    def wall(self) -> int:
        return sum(step.wall for step in self.steps)

    @property
    def parts(self) -> dict[str, int]:
        return {part: sum(step.parts[part] for step in self.steps) for part in PARTS}


def read(path: Path) -> dict[str, Any]:
    """A Chrome trace, packed or not."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as f:
        return json.load(f)  # type: ignore[no-any-return]


def account(trace: dict[str, Any], top: int = 15) -> Account:
    """Sum up a trace.

    Args:
        top: operators to name.

    Raises:
        ValueError: it has no mark of a step.
    """
    events = [e for e in trace["traceEvents"] if e.get("ph") in ("X", "s", "f")]
    marks = sorted((e for e in events if e.get("cat") == "user_annotation" and e["name"].startswith("step ")), key=_start)
    if not marks:
        raise ValueError("the trace has no `step N` in it")
    bounds = [_start(mark) for mark in marks] + [_end(marks[-1])]  # what lies between two marks goes to the first
    host = _Host(events, marks[0]["tid"])
    device = [_kernel(e, host.launched) for e in events if e.get("cat") in DEVICE]
    spans = [*(device or host.spans), *host.messages, *host.data]
    steps, hidden = _cut(spans, bounds)
    numbers = [int(mark["name"].removeprefix("step ")) for mark in marks]
    found = [Step(number, dict(zip(PARTS, ns, strict=True))) for number, ns in zip(numbers, steps, strict=True)]
    return Account(found, hidden, _longest(device or host.spans, bounds, top), bool(device))


class _Host:
    """What the CPU did: each operator's own time, and which part launched what."""

    def __init__(self, events: list[dict[str, Any]], main: int) -> None:
        self.spans: list[Span] = []
        self.launched: dict[int, str] = {}  # correlation id -> part
        notes = [e for e in events if e.get("cat") == "user_annotation"]
        phases = sorted((e for e in notes if e["tid"] == main and e["name"].startswith("phase: ")), key=_start)
        self.begins, self.phases = [_start(e) for e in phases], [(e["name"].removeprefix("phase: "), _end(e)) for e in phases]
        # gloo's own spans are how long a message takes; NCCL's on the host are how long it takes to ask for one.
        self.messages = [Span(_start(e), _end(e), "communication", e["name"]) for e in notes if e["name"].startswith("gloo:")]
        spans = [(begin, end, name) for begin, (name, end) in zip(self.begins, self.phases, strict=True)]
        self.data = [Span(begin, end, "data", "") for begin, end, name in spans if name == "data"]
        self.data += [Span(begin, end, "between steps", "") for begin, end, name in spans if name in BETWEEN]
        self._links(events)
        self._walk([e for e in events if _on_stack(e)])

    def _links(self, events: list[dict[str, Any]]) -> None:
        """From operators of forward to nodes of backward, by (thread, start)."""
        self.sends: dict[tuple[int, int], list[int]] = defaultdict(list)
        self.takes: dict[tuple[int, int], int] = {}
        for e in events:
            if e.get("cat") == "fwdbwd":
                place = (e["tid"], _ns(e["ts"]))
                if e["ph"] == "s":
                    self.sends[place].append(e["id"])
                else:
                    self.takes[place] = e["id"]

    def _walk(self, events: list[dict[str, Any]]) -> None:
        """All threads in the order of time: what backward is linked to has been seen by then."""
        stacks: dict[int, list[_Frame]] = defaultdict(list)
        regions: dict[int, str] = {}  # link -> part of the operator of forward
        for e in sorted(events, key=lambda e: (_start(e), -e["dur"])):
            stack, start = stacks[e["tid"]], _start(e)
            self._close(stack, start)
            parent = stack[-1] if stack else _Frame(0, start, start, "", "", False)
            if e["cat"] in LAUNCH:
                if "correlation" in e["args"]:
                    self.launched[e["args"]["correlation"]] = self._part(parent, parent.name, start)
                continue
            if parent.counts:
                self._own(parent, start)
            region = parent.region
            if (link := self.takes.get((e["tid"], start))) is not None and "Backward" in e["name"]:
                region = regions.get(link) or region
            region = _named_region(e["name"]) or region
            for link in self.sends.get((e["tid"], start), ()):
                regions[link] = region
            end = min(_end(e), parent.end) if stack else _end(e)
            name = e["name"] if e["cat"] == "cpu_op" else parent.name
            stack.append(_Frame(start, end, start, name, region, parent.counts or e["cat"] == "cpu_op", parent.product))
            stack[-1].part = self._part(stack[-1], e["name"], start)
            stack[-1].computes = _computes(name)
            stack[-1].product = stack[-1].part == "gemm"
        for stack in stacks.values():
            self._close(stack, None)

    def _close(self, stack: list[_Frame], now: int | None) -> None:
        while stack and (now is None or stack[-1].end <= now):
            frame = stack.pop()
            if frame.counts:
                self._own(frame, frame.end)
            if stack:
                stack[-1].seen = max(stack[-1].seen, frame.end)

    def _own(self, frame: _Frame, until: int) -> None:
        """Its own time, from where its last child ended."""
        if until > frame.seen and frame.computes:
            self.spans.append(Span(frame.seen, until, frame.part, frame.name, int(not frame.told)))
            frame.told = True
        frame.seen = max(frame.seen, until)

    def _part(self, frame: _Frame, name: str, at: int) -> str:
        if is_message(name):
            return "communication"
        phase = self._phase(at)
        if phase in BETWEEN or phase == "data":
            return "data" if phase == "data" else "between steps"
        if phase in OPTIMIZER:
            return "optimizer"
        if frame.region in ("attention", "norm", "optimizer"):
            return frame.region
        return "gemm" if frame.product or name in PRODUCTS else frame.region or "other compute"

    def _phase(self, at: int) -> str:
        i = bisect_right(self.begins, at) - 1
        return self.phases[i][0] if i >= 0 and at < self.phases[i][1] else ""


@dataclass
class _Frame:
    """An operator or an annotation that has begun."""

    start: int
    end: int
    seen: int  # up to where its own time is written down
    name: str  # of the operator
    region: str  # attention, norm, loss, optimizer; empty
    counts: bool  # it is an operator, or inside of one
    product: bool = False  # it is a matrix product, or inside of one
    part: str = "other compute"
    computes: bool = True
    told: bool = False  # some of its own time is written down


def _cut(spans: Iterable[Span], bounds: list[int]) -> tuple[list[list[int]], int]:
    """(ns by part for each step, ns of communication under compute): each moment between the bounds is counted once."""
    edges = [(max(s.start, bounds[0]), 1, INDEX[s.part]) for s in spans if s.end > bounds[0] and s.start < bounds[-1]]
    edges += [(min(s.end, bounds[-1]), -1, INDEX[s.part]) for s in spans if s.end > bounds[0] and s.start < bounds[-1]]
    edges += [(bound, 0, 0) for bound in bounds]
    edges.sort()
    active, totals, hidden = [0] * len(PARTS), [[0] * len(PARTS) for _ in bounds[1:]], 0
    active[-1] = 1  # idle: when nothing else is
    step, last = -1, bounds[0]
    for at, change, part in edges:
        if at > last:
            now = next(i for i, count in enumerate(active) if count)
            totals[step][now] += at - last
            hidden += (at - last) * (now < len(COMPUTE) and active[INDEX["communication"]] > 0)
            last = at
        active[part] += change
        step += change == 0 and step < len(totals) - 1
    return totals, hidden


def _longest(spans: list[Span], bounds: list[int], top: int) -> list[tuple[str, str, int, int]]:
    sums: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for s in spans:
        if bounds[0] <= s.start < bounds[-1]:
            both = sums[s.name, s.part]
            both[0] += s.end - s.start
            both[1] += s.calls
    order = sorted(sums.items(), key=lambda item: -item[1][0])[:top]
    return [(name, part, ns, calls) for (name, part), (ns, calls) in order]


def _kernel(e: dict[str, Any], launched: dict[int, str]) -> Span:
    part = launched.get(e.get("args", {}).get("correlation", -1), "other compute")
    if is_message(e["name"]):
        part = "communication"
    elif part == "other compute":
        part = _named_region(e["name"]) or ("gemm" if _has(e["name"], "gemm") else part)
    return Span(_start(e), _end(e), part, e["name"])


def is_message(name: str) -> bool:
    return name.lower().startswith(MESSAGES)


def _named_region(name: str) -> str:
    """The part that a mark or a name says; a product says it for itself alone, not for what is inside of it."""
    if name.startswith("part: "):
        return name.removeprefix("part: ")
    return next((part for part in ("attention", "norm", "loss", "optimizer") if _has(name, part)), "")


def _computes(name: str) -> bool:
    """Whether an operator's own time is its kernel's. A function of autograd calls what computes; the rest is Python, or a wait."""
    return ("::" in name and not name.startswith("autograd::")) or "CompiledFxGraph" in name


def _has(name: str, part: str) -> bool:
    low = name.lower()
    return any(word in low for word in NAMED[part])


def _on_stack(e: dict[str, Any]) -> bool:
    """Operators, marks, launches. gloo's messages end whenever they end, and are in nobody."""
    if e["ph"] != "X":
        return False
    return e["cat"] == "cpu_op" or e["cat"] in LAUNCH or (e["cat"] == "user_annotation" and e["name"].startswith("part: "))


def _ns(microseconds: float) -> int:
    return round(microseconds * 1000)


def _start(e: dict[str, Any]) -> int:
    return _ns(e["ts"])


def _end(e: dict[str, Any]) -> int:
    return _ns(e["ts"]) + _ns(e["dur"])
