"""A run's checkpoints on remote storage (`checkpoint.remote`): fetched where the run directory has none, brought there beside
training, waited for at the end. The main rank has all of it; the others only wait where a checkpoint is fetched."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator

from megatron_scratch.checkpoint.attempt import Attempt, retire
from megatron_scratch.checkpoint.manifest import committed
from megatron_scratch.checkpoint.uploads import Event, Uploads
from megatron_scratch.config.train import CheckpointConfig
from megatron_scratch.parallel.collectives import gather_json
from megatron_scratch.parallel.topology import Topology
from megatron_scratch.train.console import View
from megatron_scratch.train.rundir import RunDir
from megatron_scratch.train.step import StepResult
from megatron_scratch.util.errors import RunFailed, UserError

POLL = 0.1  # seconds


class Mirror:
    """Without `checkpoint.remote`, and on other ranks than the main one, every method does nothing but `fetch`'s waiting.

    It is a hook of every step: to hear what has become of an upload costs a system call.
    """

    def __init__(self, cfg: CheckpointConfig, attempt: Attempt, topo: Topology, run_dir: RunDir, view: View) -> None:
        self.cfg, self.attempt, self.topo, self.run_dir, self.view = cfg, attempt, topo, run_dir, view
        self.uploads = Uploads(cfg, attempt) if cfg.remote and topo.is_main else None

    def fetch(self) -> None:
        """Bring the newest whole checkpoint here if the run directory has none, before anybody looks for one; collective.

        Ranks keep sending each other small messages meanwhile: a fetch may take longer than a message is waited for.

        Raises:
            UserError: the storage cannot be used; or it has checkpoints, and `checkpoint.resume=never`.
            RunFailed: there are checkpoints, and none could be brought here.
        """
        work = iter(()) if self.uploads is None else self._fetch(self.uploads)
        answer = [] if self.cfg.remote else ["over"]
        while not answer:
            try:
                answer = next(work, ["over"])
            except (UserError, RunFailed) as error:
                answer = ["user" if isinstance(error, UserError) else "failed", str(error)]
            answer = gather_json(answer, self.topo)[0]
            time.sleep(0 if answer else POLL)
        if answer[0] != "over":
            raise (UserError if answer[0] == "user" else RunFailed)(answer[1])

    def _fetch(self, uploads: Uploads) -> Iterator[list[str]]:
        """Yields an empty list as long as it is not over."""
        uploads.begin("prove")
        while (event := uploads.answer("prove")) is None:
            yield []
        if "error" in event:
            raise UserError(f"checkpoint.remote={self.cfg.remote} cannot be used: {event['error']}")
        if event["newest"] is None or committed(self.run_dir.checkpoints):
            return
        if self.cfg.resume == "never":
            raise UserError(f"checkpoint.resume=never, but {self.cfg.remote} has checkpoints (step {event['newest']}); "
                            "give another checkpoint.remote=, or resume=auto to go on")  # fmt: skip
        self.view.say(f"fetching the newest checkpoint from {self.cfg.remote}")
        uploads.begin("fetch")
        while (event := uploads.answer("fetch")) is None:
            yield []
        if "error" in event:
            raise RunFailed(event["error"])
        for problem in event["problems"]:
            self.view.say(f"passed over a corrupt checkpoint: {problem}")
            self.run_dir.record("corrupt_checkpoint", problem=problem, moved_to=None)
        self.run_dir.record("fetched", step=event["step"], url=self.cfg.remote)

    def begin(self) -> None:
        """Bring there what an earlier start has left to do."""
        if self.uploads is not None:
            self.uploads.submit(committed(self.run_dir.checkpoints), trust=True)

    def submit(self, step: int) -> None:
        """A checkpoint was committed."""
        if self.uploads is not None:
            self.uploads.submit([step])

    def held(self) -> set[int]:
        """Steps that must not be deleted here yet."""
        return set() if self.uploads is None else self.uploads.held()

    def due(self, step: int, finished: bool, stopped: bool) -> bool:
        return self.uploads is not None

    def run(self, step: int, result: StepResult) -> None:
        if self.uploads is not None:
            self._report(self.uploads.poll())

    def finish(self, verified: Collection[int]) -> None:
        """Wait until nothing is on its way, or has failed twice; then delete what was only kept for that.

        Args:
            verified: as `attempt.retire` has it.
        """
        if self.uploads is None or not self.uploads.held():
            return
        self.view.say(f"bringing checkpoints to {self.cfg.remote}: step {', '.join(map(str, sorted(self.uploads.held())))}")
        self._report(self.uploads.finish())
        if gone := retire(self.attempt, self.cfg, verified, self.uploads.held()):
            self.run_dir.record("retired", steps=gone)

    def check(self) -> None:
        """
        Raises:
            RunFailed: some checkpoints could not be brought there.
        """
        if self.uploads is not None:
            self.uploads.check()

    def close(self) -> None:
        if self.uploads is not None:
            self.uploads.close()

    def _report(self, events: Iterable[Event]) -> None:
        for event in events:
            step = event["step"]
            if "error" in event:
                self.view.say(f"the checkpoint of step {step} is not on {self.cfg.remote}: {event['error']}; the local one "
                              "is kept, the next save tries again")  # fmt: skip
                self.run_dir.record("upload_failed", step=step, reason=event["error"])
            elif "superseded" not in event:
                if "not_retired" in event:
                    self.view.say(f"old checkpoints on {self.cfg.remote} could not be deleted: {event['not_retired']}")
                told = {key: event[key] for key in ("bytes", "seconds", "retired", "not_retired") if key in event}
                self.run_dir.record("uploaded", step=step, url=self.cfg.remote, **told)
