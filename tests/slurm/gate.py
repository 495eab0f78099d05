"""A plugin that holds the main rank at a step, so that a test can do something to a run at a known place.

RUN/hold has the step. Before it logs that one, the rank renames the file RUN/held, and goes on once that is gone. RUN/fail has a
step at which the run fails.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from megatron_scratch.util.errors import RunFailed

LOOK_EVERY = 1.0  # seconds: the next step looks whether a stop is asked
PATIENCE = 150.0  # seconds; a test that failed lets go of nothing


def hold(run: Path, step: int) -> None:
    asked, held = run / "hold", run / "held"
    if not asked.exists() or int(asked.read_text()) != step:
        return
    asked.rename(held)  # the run may be started elsewhere meanwhile, and is not held there
    begun = time.monotonic()
    while time.monotonic() < begun + (PATIENCE if held.exists() else LOOK_EVERY):
        time.sleep(0.05)


hooks: Any = sys.modules.get("megatron_scratch.train.hooks")  # in ranks; whoever submits has not imported torch
if hooks is not None:
    log = hooks.LogMetrics.run

    def run_and_hold(self: Any, step: int, result: Any) -> None:
        if self.topo.is_main:
            hold(self.run_dir.path, step)
        log(self, step, result)
        if self.topo.is_main:
            fail = self.run_dir.path / "fail"
            if fail.exists() and int(fail.read_text()) == step:
                raise RunFailed("made to fail")

    hooks.LogMetrics.run = run_and_hold
