"""When and how a run saves itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_scratch.checkpoint import store
from megatron_scratch.config.train import CheckpointConfig
from megatron_scratch.engine import Engine
from megatron_scratch.parallel.topology import Topology
from megatron_scratch.train.hooks import Rates, refuse_non_finite
from megatron_scratch.train.loop import Every
from megatron_scratch.train.rundir import RunDir
from megatron_scratch.train.step import StepResult


class SaveCheckpoint:
    """Every n steps, at the end, and when stopped."""

    def __init__(self, cfg: CheckpointConfig, topo: Topology, run: RunDir, engine: Engine, rates: Rates,
                 facts: Callable[[int], dict[str, Any]]) -> None:  # fmt: skip
        """`facts`: step -> JSON that a resuming run compares with its own (model, data, seed), and the data position."""
        self.due, self.cfg, self.topo, self.run_dir = Every(cfg.every), cfg, topo, run
        self.engine, self.rates, self.facts = engine, rates, facts

    def run(self, step: int, result: StepResult) -> None:
        root = self.run_dir.checkpoints
        if not result.skipped:  # which left the weights as they were
            refuse_non_finite(step, result, self.topo)
        resume = self.rates.pause()
        began = time.perf_counter()
        folder: Path = store.save(root, step, self.engine.state(), self.facts(step), self.topo)
        if self.topo.is_main:
            gone = store.retire(root, self.cfg)
            self.run_dir.record("save", step=step, path=str(folder), seconds=time.perf_counter() - began, retired=gone)
        resume()
