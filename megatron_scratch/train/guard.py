"""What becomes of a step: applied, or not, and why. One decision for all ranks, before anything is updated.

A spike is a loss above mean + sigma x standard deviation of the last `window` accepted ones, the rule of OLMo's
SkipStepOptimizer (OLMo-core, optim/skip_step_optimizer.py: 6 sigma, 128 steps; it looks at the gradient norm as well). What is done
about one is `fault.spike`: nothing, no update (OLMo), or back to a checkpoint and past the batch (PaLM, arXiv 2204.02311, 5.1).

All of it is plain Python arithmetic on numbers that every rank has with the same bits, and a function of nothing else: ranks decide
alike without a message, and a resumed run decides like one that was never stopped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_scratch.config.fault import FaultConfig
from megatron_scratch.train.scaler import LossScaler
from megatron_scratch.util.errors import RunFailed


@dataclass(frozen=True)
class Verdict:
    """`event` as the ledger calls it: spike (and applied), skip, stop, rollback; empty: a step like any other."""

    event: str = ""
    reason: str = ""

    @property
    def applied(self) -> bool:
        return self.event in ("", "spike")


class Guard:
    """The losses accepted last, steps skipped in a row, rollbacks so far: the whole state, but for the loss scaler's own."""

    def __init__(self, cfg: FaultConfig, scaler: LossScaler | None = None) -> None:
        self.cfg, self.scaler = cfg, scaler
        self.losses: list[float] = []
        self.skips = self.rollbacks = 0
        self.ends = ""  # why the run has to end with this step

    @property
    def scale(self) -> float | None:
        """What the loss is multiplied by before backward."""
        return None if self.scaler is None else self.scaler.scale

    def judge(self, loss: float, norm: float) -> Verdict:
        """
        Args:
            loss: of the whole step; norm: of its gradients, before clipping.
        """
        if self.scaler is not None and (reason := self.scaler.update(math.isfinite(norm))):
            return Verdict("skip", reason)  # of the search for a scale; it neither counts nor ends a row
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return self._refuse(self.cfg.nonfinite, f"loss {loss}, gradient norm {norm}: not finite")
        if (limit := self.limit()) is not None and loss > limit:
            reason = f"loss {loss:.6g} is above {limit:.6g}, mean + {self.cfg.sigma:g} sigma of the last {len(self.losses)}"
            if self.cfg.spike != "log":
                return self._refuse(self.cfg.spike, reason)
            self._accept(loss)
            return Verdict("spike", reason)
        self._accept(loss)
        return Verdict()

    def limit(self) -> float | None:
        """The largest loss that is no spike; None before `warmup`."""
        if (normal := self._normal()) is None:
            return None
        mean, deviation = normal
        return mean + self.cfg.sigma * deviation

    def score(self, loss: float) -> float | None:
        """How many standard deviations a loss is above the mean of the last accepted ones; None before `warmup`, and where all are
        equal."""
        mean, deviation = self._normal() or (0.0, 0.0)
        return (loss - mean) / deviation if deviation > 0 else None

    def _normal(self) -> tuple[float, float] | None:
        """(mean, standard deviation) of the last accepted losses."""
        n = len(self.losses)
        if n < self.cfg.warmup:
            return None
        mean = math.fsum(self.losses) / n  # fsum is exact: the order in which a resumed run adds cannot matter
        return mean, math.sqrt(math.fsum((x - mean) ** 2 for x in self.losses) / (n - 1))

    def _accept(self, loss: float) -> None:
        self.losses = [*self.losses, loss][-self.cfg.window :]
        self.skips = 0

    def _refuse(self, event: str, reason: str) -> Verdict:
        if event == "stop":
            self.ends = (f"{reason}; lower optim.lr, look at the data of this step, or pass over such steps with "
                         "fault.nonfinite=skip")  # fmt: skip
        if event == "skip":
            self.skips += 1
            if self.skips > self.cfg.max_skips:
                self.ends = f"{reason}, after fault.max_skips={self.cfg.max_skips} skipped steps in a row: the run has diverged"
        if event == "rollback":
            self.rollbacks += 1
            if self.rollbacks > self.cfg.max_rollbacks:
                self.ends = f"{reason}, after fault.max_rollbacks={self.cfg.max_rollbacks} rollbacks: others will not help"
        return Verdict("stop" if self.ends else event, reason)

    def refuse_to_go_on(self, step: int) -> None:
        """
        Raises:
            RunFailed: the step that was judged last ends the run.
        """
        if self.scaler is not None:
            self.scaler.refuse_to_go_on(step)
        if self.ends:
            raise RunFailed(f"step {step}: {self.ends}; nothing of it was applied, the checkpoints before it are whole")

    def state(self) -> dict[str, Any]:
        """JSON for a checkpoint, by key."""
        scaler = {} if self.scaler is None else {"scaler": self.scaler.state()}
        return {"guard": {"losses": self.losses, "skips": self.skips, "rollbacks": self.rollbacks}, **scaler}

    def load(self, extra: Mapping[str, Any]) -> None:
        """From what a checkpoint remembers; one of another precision has no scaler."""
        kept = extra.get("guard", {"losses": [], "skips": 0, "rollbacks": 0})
        self.losses = [float(x) for x in kept["losses"]][-self.cfg.window :]
        self.skips, self.rollbacks = int(kept["skips"]), int(kept["rollbacks"])
        if self.scaler is not None and "scaler" in extra:
            self.scaler.load(extra["scaler"])
