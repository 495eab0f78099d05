"""Slurm's own commands, as far as a running job needs them. Arguments are lists; nothing passes through a shell."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from megatron_scratch.util.errors import RunFailed
from megatron_scratch.util.files import write_json


def ask(*words: str) -> str:
    """Run a command of Slurm's; its output. RunFailed: it was refused, and why."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunFailed(f"{' '.join(words[:3])} ended with {done.returncode}: {' '.join(done.stderr.split())[:400]}")
    return done.stdout.strip()


def hostnames(nodes: str) -> list[str]:
    """node[1-3] as a list, in Slurm's order."""
    return ask("scontrol", "show", "hostnames", nodes).splitlines()


class Slurm:
    """The jobs that were submitted for one job folder: this one, those that wait for it, those submitted in its place."""

    def __init__(self, job: Path, number: int) -> None:
        self.job, self.number = job, number
        self.submitted = job / "submitted.json"

    def requeue(self) -> None:
        """Back into the queue under the same number. Slurm then ends this process."""
        ask("scontrol", "requeue", str(self.number))

    def cancel_chain(self) -> None:
        """Cancel what still waits for this job."""
        for number in self._waiting():
            ask("scancel", "--state=PENDING", str(number))

    def resubmit(self, bad: list[str], exclude: str) -> int:
        """The same script again without the bad nodes, once this job is over; who waited for this job waits for that one.

        Args:
            exclude: nodes that the user wants to be left out, as Slurm writes them.
        """
        known = self._known()
        excluded = [*known.get("excluded", [exclude] if exclude else []), *bad]
        number = int(ask("sbatch", "--parsable", f"--exclude={','.join(excluded)}", f"--dependency=afterany:{self.number}",
                         str(self.job / "job.sbatch")).split(";")[0])  # fmt: skip
        ids = known.get("ids", [self.number])
        at = ids.index(self.number) + 1 if self.number in ids else len(ids)
        for waiting in ids[at : at + 1]:
            ask("scontrol", "update", f"JobId={waiting}", f"Dependency=afterany:{number}")
        write_json(self.submitted, {"ids": [*ids[:at], number, *ids[at:]], "excluded": excluded})
        return number

    def _waiting(self) -> list[int]:
        ids = self._known().get("ids", [])
        return ids[ids.index(self.number) + 1 :] if self.number in ids else []

    def _known(self) -> dict[str, list]:
        return json.loads(self.submitted.read_text(encoding="utf-8")) if self.submitted.exists() else {}
