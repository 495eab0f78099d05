"""A profile of some steps of a run (`train.profile`): a trace for Perfetto, where the time went, what memory was held.

Outside of the window it costs a comparison a step, and inside it changes no number: it looks. What is told in the trace is marked
by wrapping a few functions of the model while the window is open: nothing is in them otherwise.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_scratch.config.profile import ProfileConfig
from megatron_scratch.parallel.topology import Topology
from megatron_scratch.report.memory import draw, memory
from megatron_scratch.report.trace import account
from megatron_scratch.report.trace_table import as_json, table
from megatron_scratch.train.console import View
from megatron_scratch.train.heartbeat import Pulse
from megatron_scratch.train.metrics import synchronize
from megatron_scratch.train.objective import LanguageModel
from megatron_scratch.train.rates import Rates
from megatron_scratch.train.rundir import RunDir
from megatron_scratch.train.step import StepResult
from megatron_scratch.util.env import prepare_profiler
from megatron_scratch.util.files import atomic_write, write_json

RECORDED = 1_000_000  # allocations that torch remembers for a snapshot of a GPU's memory, the newest


class Profile:
    """A hook, the last one: the window goes from after the hooks of one step to after those of another. `begin` before the loop,
    `close` after it, however it ended."""

    def __init__(self, cfg: ProfileConfig, topo: Topology, run_dir: RunDir, view: View, rates: Rates,
                 models: Sequence[LanguageModel], pulse: Pulse) -> None:  # fmt: skip
        """`models`: this rank's stages of the model, or all of it."""
        self.cfg, self.topo, self.run_dir, self.view, self.rates = cfg, topo, run_dir, view, rates
        self.models, self.pulse = models, pulse
        wanted = cfg.steps is not None and (cfg.ranks is None or topo.rank in cfg.ranks)
        self.first, self.last = cfg.steps if wanted and cfg.steps else (0, 0)  # 0: this rank is not profiled
        self.window: _Window | None = None
        self.begun = 0  # the first step in it
        self.ends = False  # no step follows

    def begin(self, step: int) -> None:
        """The run goes on after `step` steps."""
        if not self.last:
            return
        if step >= self.last:
            self._over(step)
        elif step >= self.first - 1:
            self._open(step)

    def due(self, step: int, finished: bool, stopped: bool) -> bool:
        self.ends = finished or stopped
        return self.window is not None or (step == self.first - 1 < self.last and not self.ends)

    def run(self, step: int, result: StepResult) -> None:
        if self.window is None:
            self._open(step)
        elif step < self.last and not self.ends:
            self.window.marks.step(step + 1)
        else:
            self._finish(step)

    def close(self) -> None:
        """A window that is still open has no whole step at its end: nothing of it is written."""
        if self.window is not None:
            with suppress(Exception):  # what ended the run is what is to be told
                self.window.stop()
            self.window = None
            self.view.say(f"train.profile.steps={self.cfg.steps}: the run ended inside of them, nothing is written")

    def _over(self, step: int) -> None:
        self.view.say(f"train.profile.steps={self.cfg.steps}: the run goes on after step {step}, there is nothing left to profile")

    def _open(self, step: int) -> None:
        resume = self.rates.pause()
        try:
            self.window = _Window(self.cfg.memory, self.topo.device, self.models, self.pulse)
        except Exception as error:  # as in `_finish`
            self.last = 0
            self.view.say(
                f"train.profile.steps={self.cfg.steps}: torch's profiler does not start: {error!r}; the run goes on without"
            )
        resume()
        if self.window is not None:
            self.begun = step + 1
            self.window.marks.step(step + 1)

    def _finish(self, step: int) -> None:
        window, self.window = self.window, None
        assert window is not None
        folder = self.run_dir.path / "profile" / f"steps_{self.begun}_{step}"
        resume = self.rates.pause()
        with self.pulse.during("profile"):
            try:
                window.stop()
                self.view.say(self._write(window, folder))
            except Exception as error:  # a profile that fails is no reason to lose a run
                self.view.say(f"the profile of steps {self.begun} to {step} could not be written to {folder}: {error!r}; "
                              "the run goes on without it")  # fmt: skip
        resume()

    def _write(self, window: _Window, folder: Path) -> str:
        """What was found, in a line."""
        folder.mkdir(parents=True, exist_ok=True)
        name = f"rank_{self.topo.rank:05d}"
        trace = _export(window.profiler, folder / f"{name}.trace.json.gz")
        found = account(trace)
        device = torch.cuda.get_device_name(self.topo.device) if self.topo.device.type == "cuda" else "cpu"
        found.facts = {"rank": self.topo.rank, "device": device}
        with atomic_write(folder / f"{name}.txt", "w") as f:
            f.write(table(found))
        write_json(folder / f"{name}.json", as_json(found))
        if self.cfg.memory:
            self._write_memory(trace, folder, name)
        parts = sorted(found.parts.items(), key=lambda item: -item[1])[:3]
        shares = ", ".join(f"{part} {ns / found.wall:.0%}" for part, ns in parts)
        return f"profile of {len(found.steps)} steps in {folder}: {found.wall / len(found.steps) / 1e6:.1f} ms a step, {shares}"

    def _write_memory(self, trace: dict[str, Any], folder: Path, name: str) -> None:
        if self.topo.device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(folder / f"{name}.memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
            return
        points = memory(trace)
        peak = max(points, key=lambda point: point[1], default=(0.0, 0))
        write_json(folder / f"{name}.memory.json", {"peak_bytes": peak[1], "peak_ms": peak[0], "ms_bytes": points})
        draw(points, folder / f"{name}.memory.png")


class _Window:
    """torch's profiler, and what marks its trace, from now until `stop`."""

    def __init__(self, memory: bool, device: torch.device, models: Sequence[LanguageModel], pulse: Pulse) -> None:
        prepare_profiler()
        self.device, self.marks, self.stack = device, _Marks(), ExitStack()
        on_gpu = device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        synchronize(device)
        if memory and on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=RECORDED)
        self.profiler = profile(activities=activities, profile_memory=memory and not on_gpu)
        self.profiler.start()
        for model in models:
            for owner, function, part in _parts(model):
                self.stack.enter_context(_marked(owner, function, f"part: {part}"))
        self.stack.enter_context(_listening(pulse, self.marks.phase))

    def stop(self) -> None:
        synchronize(self.device)
        self.marks.close()
        self.stack.close()
        self.profiler.stop()


class _Marks:
    """Annotations that follow each other: the step, and in it what the training thread is at."""

    def __init__(self) -> None:
        self.name, self.steps, self.phases = "hooks", ExitStack(), ExitStack()

    def step(self, number: int) -> None:
        self.close()
        self.steps.enter_context(record_function(f"step {number}"))
        self.phase(self.name)

    def phase(self, name: str) -> None:
        self.phases.close()
        self.name = name
        self.phases.enter_context(record_function(f"phase: {name}"))

    def close(self) -> None:
        self.phases.close()
        self.steps.close()


def _parts(model: LanguageModel) -> Iterator[tuple[nn.Module, str, str]]:
    """(module, function, part). Not inside of what torch.compile has taken over: it would compile anew, marks and all."""
    compiled: set[nn.Module] = set()
    for module in model.modules():
        if module._compiled_call_impl is not None:
            compiled.update(module.modules())
    for name, module in model.named_modules():
        if module in compiled:
            continue
        if name.endswith("norm") and not isinstance(module, nn.Identity):
            yield module, "forward", "norm"
        if hasattr(module, "core"):
            yield module, "core", "attention"
    yield model.decoder, "loss_sum", "loss"


@contextmanager
def _marked(owner: nn.Module, function: str, mark: str) -> Iterator[None]:
    """A function of a module within an annotation, for a while."""
    inner, own = getattr(owner, function), function in owner.__dict__

    def marked(*args: Any, **kwargs: Any) -> Any:
        with record_function(mark):
            return inner(*args, **kwargs)

    setattr(owner, function, marked)
    yield
    if own:  # it was replaced before: what is computed again, for one
        setattr(owner, function, inner)
    else:
        delattr(owner, function)


@contextmanager
def _listening(pulse: Pulse, listener: Callable[[str], None]) -> Iterator[None]:
    """Tell another one, too, of each phase that begins."""
    before = pulse.told

    def told(phase: str) -> None:
        before(phase)
        listener(phase)

    pulse.told = told
    yield
    pulse.told = before


def _export(profiler: profile, path: Path) -> dict[str, Any]:
    """Write the trace, packed, and give it. torch would pack it by way of /tmp, which may have no room for it."""
    plain = path.with_name(f".{path.name}.plain")
    try:
        profiler.export_chrome_trace(str(plain))
        content = plain.read_bytes()
    finally:
        plain.unlink(missing_ok=True)
    with atomic_write(path) as f:
        f.write(gzip.compress(content, compresslevel=6))
    return json.loads(content)  # type: ignore[no-any-return]
