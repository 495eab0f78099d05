"""How long a rank computes, without its waiting for others: its forward passes.

They are a third of the work, and the part in which nothing is sent over dp under ddp, zero1 and zero2 (and over the replicas under
hsdp). Backward ends in a reduction, which takes as long as the slowest rank. Over tp, and under fsdp and zero3 over dp, forward has
messages in it, too: ranks that exchange them take as long as the slowest of them, and only look slow together.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from megatron_scratch.train.metrics import between, mark

KEPT = 64  # forward passes; an event of a device is no more than its handle


class OwnTime:
    """The last passes of this rank in training, timed on the device where there is one: no host waits for it."""

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self.device, self.clock = device, clock
        self.passes: deque[tuple[Any, Any]] = deque(maxlen=KEPT)  # (begin, end): seconds, or events

    def around(self, call: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """The same, with its time taken where it is a pass of training."""

        def timed(*args: Any, **kwargs: Any) -> torch.Tensor:
            if not torch.is_grad_enabled():
                return call(*args, **kwargs)
            begin = mark(self.device, self.clock)
            out = call(*args, **kwargs)
            self.passes.append((begin, mark(self.device, self.clock)))
            return out

        return timed

    def mean(self) -> float:
        """Seconds of a pass, over those since the last call; 0: there was none. The device has done them: a step has ended."""
        taken = [between(begin, end) for begin, end in self.passes]
        self.passes.clear()
        return sum(taken) / len(taken) if taken else 0.0
