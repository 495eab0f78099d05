"""A run's checkpoints, from the moment a save is due to the moment an old one is deleted; at once, or beside training.

    start     the ranks agree on a plan; the folder is made; each rank writes its files
              asynchronously: a thread copies them into memory, while the next step computes its gradients (CheckFreq, Mohan et al.,
              FAST 2021), and another process writes from there; `copied` waits for the copy before anything is updated
    written   every rank has: the main one writes the manifest and renames
    verified  every rank has read its share of the files again: what lies on the disk is what was in memory
    retired   the retention rule is applied

`poll` moves on what is under way, all ranks together, so that they agree in which step a checkpoint was committed or has failed.
There is at most one save under way.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_scratch.checkpoint import attempt as attempts
from megatron_scratch.checkpoint import manifest as manifests
from megatron_scratch.checkpoint import store
from megatron_scratch.checkpoint.attempt import Attempt
from megatron_scratch.checkpoint.background import Background, do
from megatron_scratch.checkpoint.manifest import Manifest, committed
from megatron_scratch.checkpoint.plan import Plan, Planner, State, as_bytes
from megatron_scratch.checkpoint.shard import ALIGN, header
from megatron_scratch.config.train import CheckpointConfig
from megatron_scratch.parallel.collectives import all_reduce_world, gather_json
from megatron_scratch.parallel.topology import Topology


@dataclass
class Saved:
    """What has become of a save."""

    step: int
    path: Path
    seconds: float  # from its start to its commit
    blocked: float  # of these, training stood still
    retired: list[int]
    corrupt: str = ""  # what was wrong when it was read again; it has been set aside
    moved_to: Path | None = None


@dataclass
class _UnderWay:
    step: int
    plan: Plan
    extra: dict[str, Any]
    began: float
    blocked: float = 0.0
    manifest: Manifest | None = None  # once it is committed
    seconds: float = 0.0


class Saver:
    """Every method is collective.

    Args:
        held: main rank only: steps that must not be deleted yet, e.g. as they are not on a remote storage.
        verified: a step whose files have been found whole, e.g. the one the run goes on from.
    """

    def __init__(self, cfg: CheckpointConfig, attempt: Attempt, topo: Topology, verified: int | None = None,
                 held: Any = frozenset) -> None:  # fmt: skip
        self.cfg, self.attempt, self.topo, self.held = cfg, attempt, topo, held
        self.planner = Planner(topo)
        self.verified = set() if verified is None else {verified}
        self.background: Background | None = None
        self.save: _UnderWay | None = None
        self.copier = ThreadPoolExecutor(1)
        self.copying: Future[None] | None = None
        self.answer: dict[str, Any] | None = None  # what came of the job, while other ranks are still at theirs

    def start(self, step: int, state: State, extra: dict[str, Any]) -> Saved | None:
        """Begin the save of a step, and end it unless `async_save`. Waits for one that is under way."""
        before = self.finish()
        assert before is None, "the caller finishes first"
        began = time.perf_counter()
        plan = self.planner.plan(state)
        store.stage(self.attempt, step, plan, self.topo)
        self.save = _UnderWay(step, plan, extra, began)
        folder = self.attempt.staged(step)
        if self.cfg.async_save:
            if self.background is None:
                self.background = Background()
            self.copying = self.copier.submit(self._hand_over, folder, plan, state, self._event())
            self.save.blocked = time.perf_counter() - began
            return None
        self._commit(store.write(folder, plan, state))
        saved = self._retire(do(self._share(), None) if self._worth_verifying() else None)
        saved.blocked = time.perf_counter() - began
        return saved

    def tidy(self) -> list[int]:
        """Apply the retention rule where an earlier start was killed before it could. Returns the steps that are gone."""
        return list(store.on_main(lambda: attempts.retire(self.attempt, self.cfg, self.verified, self.held()), self.topo, 0))

    def copied(self) -> None:
        """Wait until what is being saved may change. To be called before anything is updated; no message."""
        if self.copying is not None:
            began = time.perf_counter()
            self.copying.result()
            self.copying = None
            if self.save is not None:
                self.save.blocked += time.perf_counter() - began

    def poll(self, wait: bool = False) -> Saved | None:
        """Move on the save that is under way, if there is one and every rank is done with its part. The save, once it is over.

        Raises:
            RunFailed: on every rank: it could not be written. Nothing is committed, the checkpoints before are whole.
        """
        if self.save is None or self.background is None:
            return None
        began = time.perf_counter()
        answer = self._answer(wait)
        if answer is None:
            return None
        if self.save.manifest is not None:
            return self._retire(answer)
        self._commit(answer)
        self.save.blocked += time.perf_counter() - began
        if not self._worth_verifying():
            return self._retire(None)
        self.background.submit(self._share())
        return self.poll(wait) if wait else None

    def _answer(self, wait: bool) -> dict[str, Any] | None:
        """What came of this rank's job, once no rank is still at its own; at once where one has failed."""
        assert self.background is not None
        self.copied()
        if self.answer is None and (wait or self.background.ready()):
            self.answer = self.background.answer()
        state = 0 if self.answer is None else -1 if "error" in self.answer else 1
        if not all_reduce_world(torch.tensor(state), self.topo, "min").item():
            return None
        answer, self.answer = self.answer, None
        return answer or {}  # of another rank that has failed: `store.commit` says why

    def finish(self) -> Saved | None:
        """Wait for the save that is under way, if there is one."""
        return self.poll(wait=True)

    def close(self) -> None:
        """What is under way is dropped."""
        self.copier.shutdown()
        if self.background is not None:
            self.background.close()
            self.background = None

    def _commit(self, written: dict[str, Any]) -> None:
        save = self.save
        assert save is not None
        try:
            path = store.commit(self.attempt, save.step, save.plan, written, save.extra, self.topo)
        except Exception:
            self.save = None
            raise
        save.seconds = time.perf_counter() - save.began
        save.manifest = manifests.read(path)

    def _worth_verifying(self) -> bool:
        """Reading a checkpoint again is what deleting an older one costs; where nothing is to be deleted it is left."""
        return bool(gather_json(bool(attempts.surplus(committed(self.attempt.root), self.cfg)), self.topo)[0])

    def _share(self) -> dict[str, Any]:
        assert self.save is not None and self.save.manifest is not None
        files = self.save.manifest.files
        mine = sorted(files)[self.topo.rank :: self.topo.world]
        folder = manifests.step_folder(self.attempt.root, self.save.step)
        return {"verify": str(folder), "files": {name: [files[name].bytes, files[name].sha256] for name in mine}}

    def _retire(self, answer: dict[str, Any] | None) -> Saved:
        """The end of a save. `answer`: what reading this rank's share again has shown; None: it was left."""
        save, self.save = self.save, None
        assert save is not None
        saved = Saved(save.step, manifests.step_folder(self.attempt.root, save.step), save.seconds, save.blocked, [])
        if answer is None:
            return saved
        saved.corrupt = next((a["error"] for a in gather_json(answer, self.topo) if "error" in a), "")
        if not saved.corrupt:
            self.verified.add(save.step)

        def retire() -> list[Any]:
            if saved.corrupt:
                return [str(attempts.set_aside(saved.path)), []]
            return ["", attempts.retire(self.attempt, self.cfg, self.verified, self.held())]

        moved, saved.retired = store.on_main(retire, self.topo, save.step)
        saved.moved_to = Path(moved) if moved else None
        return saved

    def _event(self) -> torch.cuda.Event | None:
        """After which the copying may begin, on a device that is still computing."""
        return torch.cuda.current_stream(self.topo.device).record_event() if self.topo.device.type == "cuda" else None

    def _hand_over(self, folder: Path, plan: Plan, state: State, after: torch.cuda.Event | None) -> None:
        assert self.background is not None
        if after is None:
            files = self._copy(plan, state)
        else:
            stream = torch.cuda.Stream(self.topo.device)
            stream.wait_event(after)
            with torch.cuda.stream(stream):
                files = self._copy(plan, state)
            stream.synchronize()
        self.background.submit({"write": str(folder), "files": files})

    def _copy(self, plan: Plan, state: State) -> dict[str, list[int]]:
        """Put this rank's files into the shared memory, as they shall be on disk. Where each lies."""
        assert self.background is not None
        heads = {name: header(slots) for name, slots in plan.files.items()}
        places, end = {}, 0
        for name, (_, begins) in heads.items():
            places[name] = [end, end + begins[-1] + plan.files[name][-1].bytes]
            end = -(-places[name][1] // ALIGN) * ALIGN
        if not places:  # a rank may have nothing that others do not write
            return places
        memory = torch.frombuffer(self.background.room(end), dtype=torch.uint8)
        views = store.views_of(state)
        for name, slots in plan.files.items():
            head, begins = heads[name]
            first = places[name][0]
            memory[first : first + len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
            for slot, at in zip(slots, begins, strict=True):
                source = as_bytes(views[slot.name, slot.offset])
                memory[first + at : first + at + slot.bytes].copy_(source, non_blocking=True)
        return places
