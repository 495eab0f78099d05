"""Signs of life: what the training thread does (it only sets attributes), and a record of it on disk, once a beat.

Whether a thread waits for other ranks is seen from where it stands (`sys._current_frames`) and from what torch's flight recorder
says of the collectives that it has begun: the number of each in its group, and whether it has come back.
"""

from __future__ import annotations

import json
import linecache
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from megatron_scratch.parallel.topology import Topology

SIZE = 1024  # bytes of a record: one block, written at once
LONG = frozenset({"start", "load", "compile", "save", "profile"})  # phases without steps: as long as the process works, all is well


class Pulse:
    """What the training thread is at. To be told costs it an attribute; nobody but the watch's thread looks."""

    def __init__(self, compiles: bool = False, told: Callable[[str], None] = lambda phase: None) -> None:
        """
        Args:
            compiles: the first pass of each kind may take minutes, without a step in it.
            told: is called with each phase that begins.
        """
        self.phase, self.step, self.ticks, self.told = "start", 0, 0, told
        self.fresh = {"forward/backward", "evaluate"} if compiles else set()

    def enter(self, phase: str) -> None:
        self.phase = "compile" if phase in self.fresh else phase
        self.fresh.discard(phase)
        self.ticks += 1
        self.told(self.phase)

    def tick(self) -> None:
        """A microbatch is done."""
        self.ticks += 1

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        before = self.phase
        self.enter(phase)
        yield
        self.enter(before)


@dataclass
class Group:
    """What a rank has begun in a group. Collectives have numbers there, counted alike on all of its ranks."""

    axis: str  # world, dp, tp, ...
    begun: int = 0  # the last one
    open: int = 0  # the first one that has not come back; 0: all have
    op: str = ""  # of that one, else of the last


@dataclass
class Beat:
    """A rank at one moment."""

    rank: int
    host: str
    pid: int
    count: int = 0  # beats so far
    time: float = 0.0
    idle: float = 0.0  # seconds since the last sign of life of the training thread
    phase: str = "start"
    step: int = 0  # steps done
    at: str = ""  # file:line function, outside of torch
    waits: bool = False  # for other ranks
    groups: dict[str, Group] = field(default_factory=dict)  # by torch's names

    def packed(self) -> bytes:
        """SIZE bytes of JSON. What cannot be told in them is left out."""
        for shorter in ({}, {"groups": {}}, {"groups": {}, "at": "", "host": self.host[:64]}):
            content = json.dumps({**asdict(self), **shorter}).encode()
            if len(content) < SIZE:
                return content.ljust(SIZE - 1) + b"\n"
        raise AssertionError("a record without its parts is shorter")


def unpacked(content: bytes) -> Beat | None:
    """None: it is no record, or half of one."""
    try:
        row = json.loads(content[:SIZE])
        return Beat(**{**row, "groups": {name: Group(**group) for name, group in row["groups"].items()}})
    except (ValueError, TypeError, AttributeError, KeyError):
        return None


def record_of(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05d}"


def read(folder: Path, rank: int) -> Beat | None:
    try:
        with open(record_of(folder, rank), "rb") as file:
            return unpacked(file.read(SIZE))
    except OSError:
        return None


class Recorder:
    """The collectives of this rank by torch's flight recorder. Where torch has none, groups stay at 0, and `missing` says so."""

    def __init__(self, topo: Topology) -> None:
        self.groups = groups_of(topo)
        names = ("_dump_fr_trace_json", "_dump_nccl_trace_json")  # gloo's, since torch 2.13, and NCCL's
        self.dumps: list[Callable[[], bytes]] = []
        if self.groups:
            inside = torch._C._distributed_c10d
            self.dumps = [getattr(inside, name) for name in names if hasattr(inside, name)]
        self.missing = bool(self.groups) and not self.dumps
        self.on_device = False  # something on a device has not come back: the host may wait for it anywhere

    def look(self) -> Any:
        """Bring `groups` up to date. Something that changes whenever a collective is begun or has come back."""
        signs, on_device = [], False
        for dump in self.dumps:
            try:
                told = json.loads(dump())
            except Exception:  # an interface of torch's that is not documented: without it less is known, nothing fails
                self.dumps, self.missing = [d for d in self.dumps if d is not dump], True
                continue
            signs.append(told.get("pg_status"))
            on_device |= self._take(told.get("entries") or [])
        self.on_device = on_device
        return signs

    def _take(self, entries: list[dict[str, Any]]) -> bool:
        """Whether one on a device is open."""
        for group in self.groups.values():
            group.open = 0
        nccl = False
        for entry in entries:  # in the order in which they were begun
            group = self.groups.get(entry["process_group"][0])
            if group is None or entry.get("is_p2p") or not entry["collective_seq_id"]:
                continue
            backend, _, op = str(entry["profiling_name"]).partition(":")
            is_open = not entry["retired"] and entry.get("state") != "completed"
            group.begun = max(group.begun, entry["collective_seq_id"])
            if not group.open:
                group.op, group.open = op, entry["collective_seq_id"] if is_open else 0
            nccl |= is_open and backend == "nccl"
        return nccl


def groups_of(topo: Topology) -> dict[str, Group]:
    """torch's name of each process group -> what we call it. Names are counted alike on all ranks, and no two groups share one."""
    if topo.world == 1 or not dist.is_initialized():
        return {}
    world = {dist.group.WORLD.group_name: Group("world")} if dist.group.WORLD is not None else {}
    return {**{group.group_name: Group(axis) for axis, group in topo.groups.items()}, **world}  # an axis may be all of it


def position(thread: int, recorder: Recorder) -> tuple[str, bool]:
    """(file:line function, whether it waits for other ranks) of a thread."""
    innermost = frame = sys._current_frames().get(thread)
    while frame is not None and "/torch/" in frame.f_code.co_filename:
        frame = frame.f_back
    return _place(frame or innermost), _waits(innermost, recorder)


def _place(frame: FrameType | None) -> str:
    if frame is None:
        return ""
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"[:100]


def _waits(frame: FrameType | None, recorder: Recorder) -> bool:
    """A collective that has not come back does not say it: some are waited for later. So it is where the thread stands.

    `work.wait()` has no frame of its own, and in backward what waits may be in C++, below autograd's frame, as is what computes.
    For what is on a device the host may wait at any use of a number.
    """
    if frame is None:
        return False
    name = frame.f_code.co_filename.replace("\\", "/")
    if "/torch/distributed/" in name and "/distributed/tensor/" not in name:
        return True
    if recorder.on_device:
        return True
    ours = "/megatron_scratch/" in name and "wait(" in linecache.getline(name, frame.f_lineno)
    is_open = any(group.open for group in recorder.groups.values())
    return (ours and (is_open or recorder.missing)) or ("/torch/autograd/" in name and is_open)
