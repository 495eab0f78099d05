"""Checkpoints and texts of the model as artifacts of W&B, by reference: where they are, what they hash to, nothing of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

from megatron_scratch.logs.sink import Begin, Row

ENDS = ("finish", "stop", "failed")  # events after which samples.jsonl is referred to
LISTED = 64  # files of a checkpoint whose hashes W&B is told


class References:
    """A thread of its own: with a server that is away, the client waits for each (WANDB_HTTP_TIMEOUT)."""

    def __init__(self, wandb: Any, begin: Begin, run: Callable[[], Any], say: Callable[[str], None]) -> None:
        """`run`: W&B's, as it is now; it is another one once a server has come back."""
        self.wandb, self.begin, self.run, self.say = wandb, begin, run, say
        self.kinds = ("uploaded" if begin.config["checkpoint"]["remote"] else "save", *ENDS)
        self.queue: SimpleQueue[Row | Event] = SimpleQueue()
        Thread(target=self._work, daemon=True).start()

    def wants(self, row: Row) -> bool:
        """Whether an event of the ledger is a reason for an artifact."""
        kind = row.get("event")
        return kind in self.kinds and (kind not in ENDS or self._samples.exists())

    def put(self, row: Row) -> None:
        self.queue.put(row)

    def wait(self, seconds: float) -> None:
        """Until all of them are made."""
        self.queue.put(done := Event())
        done.wait(seconds)

    @property
    def _samples(self) -> Path:
        return self.begin.run_dir / "samples.jsonl"

    def _work(self) -> None:
        while True:
            row = self.queue.get()
            if isinstance(row, Event):
                row.set()
                continue
            try:
                self._texts(row) if row["event"] in ENDS else self._checkpoint(row)
            except Exception as error:  # no row is to be lost with it
                what = "samples.jsonl" if row["event"] in ENDS else f"the checkpoint of step {row['step']}"
                self.say(f"no reference to {what} at W&B: {' '.join(str(error).split())[:300]}")

    def _checkpoint(self, row: Row) -> None:
        """Nothing is hashed here, as its manifest has done that."""
        folder = self.begin.run_dir / "checkpoints" / f"step_{row['step']:08d}"
        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):  # retired since
            return
        files = manifest["files"]
        url = f"{row['url']}/{folder.name}" if "url" in row else folder.absolute().as_uri()
        facts = {"step": row["step"], "url": url, "format": manifest["format"], "manifest_sha256": manifest["sha256"],
                 "bytes": sum(file["bytes"] for file in files.values())}  # fmt: skip
        if len(files) <= LISTED:
            facts["sha256"] = {name: file["sha256"] for name, file in files.items()}
        self._refer("checkpoint", "model", url, facts, ["latest", f"step_{row['step']}"], checksum=False)

    def _texts(self, row: Row) -> None:
        url = self._samples.absolute().as_uri()
        self._refer("samples", "samples", url, {"step": row.get("step"), "url": url}, ["latest"], checksum=True)

    def _refer(self, what: str, kind: str, url: str, facts: Row, aliases: list[str], checksum: bool) -> None:
        name = re.sub(r"[^A-Za-z0-9_.-]", "_", f"{self.begin.name}-{what}")[-128:]
        artifact = self.wandb.Artifact(name, kind, metadata=facts)
        artifact.add_reference(url, checksum=checksum)
        self.run().log_artifact(artifact, aliases=aliases)
