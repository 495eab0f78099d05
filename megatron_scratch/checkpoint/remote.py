"""Checkpoints on remote storage. No torch.

    REMOTE/step_00000100/rank_00000_000.safetensors   put first, each read back and compared with the manifest's size and sha256
    REMOTE/step_00000100/manifest.json                put last, when all of them are there as they were written

A store has no rename: a folder without a manifest is not a checkpoint, whatever is in it. To delete one, the manifest goes first.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_scratch.checkpoint import manifest as manifests
from megatron_scratch.checkpoint import place as places
from megatron_scratch.checkpoint.attempt import Attempt, surplus
from megatron_scratch.checkpoint.manifest import MANIFEST, CorruptCheckpoint, Manifest
from megatron_scratch.checkpoint.place import Place, committed, find_problem, parse_manifest
from megatron_scratch.config.remote import EXTRAS
from megatron_scratch.config.train import CheckpointConfig
from megatron_scratch.util.errors import RunFailed
from megatron_scratch.util.files import atomic_write, fsync_dir

NO_FOLDERS = (*EXTRAS, "abfs", "az")  # keys with slashes; "making a folder" would make a bucket where there is none
SAME_RUN = ("model", "seed", "data", "tokenizer")  # facts of a manifest
Told = Callable[[], None]


def nothing() -> None: ...


class Remote:
    """The checkpoints of one run behind a URL.

    Args:
        attempt: the start of the run that this is of; an earlier one that is still alive is fenced off.
        told: called whenever something has moved, from several threads.
    """

    def __init__(self, place: Place, attempt: Attempt, cfg: CheckpointConfig, told: Told = nothing) -> None:
        self.place, self.attempt, self.cfg, self.told = place, attempt, cfg, told
        self.ours = False  # whether it has been seen to hold nothing of another run

    def prove(self) -> None:
        """Write, read and delete a few bytes: before anything is computed, not after the first checkpoint."""
        name, content = f".probe_{os.getpid()}", b"megatron_scratch"
        self._folder(self.place)
        self.place.fs.pipe_file(f"{self.place.path}/{name}", content)
        back = self.place.read(name)
        self.place.fs.rm_file(f"{self.place.path}/{name}")
        if back != content:
            raise OSError("what was written to it does not come back")

    def upload(self, step: int, trust: bool = False) -> int:
        """Bring a committed checkpoint there. Returns the bytes of its files, 0 where they were there.

        Args:
            trust: one that is there under this very manifest was read back when it was put: only its sizes are looked at.
                Otherwise it is read again.

        Raises:
            CorruptCheckpoint: what comes back is not what was sent. RunFailed: it is of another run, or this attempt is over.
        """
        folder, target = manifests.step_folder(self.attempt.root, step), self.place.step(step)
        manifest, content = manifests.read(folder), (folder / MANIFEST).read_bytes()
        self._refuse_other_run(manifest)
        if self._there(target, manifest, content, trust):
            return 0
        self.attempt.check()
        self._remove_marker(target)
        self._folder(target)
        for stray in target.entries().keys() - manifest.files.keys():
            target.fs.rm_file(f"{target.path}/{stray}")
        in_parallel(lambda name: self._send(folder, target, manifest, name), sorted(manifest.files))
        self.attempt.check()
        self._mark(target, content)
        return sum(file.bytes for file in manifest.files.values())

    def superseded(self, step: int) -> bool:
        """Whether newer checkpoints of the run are there, after which the retention rule does not ask for this one any more."""
        here = set(manifests.committed(self.attempt.root))  # later ones of a past that this run has gone back behind do not count
        return step in surplus(sorted({step, *(s for s in committed(self.place) if s in here)}), self.cfg)

    def _refuse_other_run(self, mine: Manifest) -> None:
        if self.ours:
            return
        for step in reversed(committed(self.place)):
            try:
                theirs = parse_manifest(self.place.step(step).read(MANIFEST), self.place.step(step))
            except CorruptCheckpoint:
                continue  # nobody's
            for key in SAME_RUN:
                if theirs.extra.get(key) != mine.extra.get(key):
                    raise RunFailed(f"{self.place} has checkpoints of another run (another {key}); give another checkpoint.remote=")
        self.ours = True

    def _there(self, target: Place, manifest: Manifest, content: bytes, trust: bool) -> bool:
        entries = target.entries()
        if MANIFEST not in entries or target.read(MANIFEST) != content:
            return False
        if trust:
            return all(entries.get(name, {}).get("size") == file.bytes for name, file in manifest.files.items())
        return not places.find_problems(target, manifest, lambda n: self.told())

    def _send(self, folder: Path, target: Place, manifest: Manifest, name: str) -> None:
        want = manifest.files[name]
        if not find_problem(target, name, want, lambda n: self.told()):
            return  # a try before this one has brought it
        target.fs.put_file(str(folder / name), f"{target.path}/{name}")
        self.told()
        if target.on_disk:
            durable(Path(target.path) / name)
        if problem := find_problem(target, name, want, lambda n: self.told()):
            manifests.verify_files(folder, {name: want})  # or is it the local file that has changed?
            raise CorruptCheckpoint(f"{problem}, read back after it had been sent")

    def _mark(self, target: Place, content: bytes) -> None:
        """From here on it is a checkpoint."""
        if target.on_disk:
            fsync_dir(Path(target.path).parent)
            with atomic_write(Path(target.path) / MANIFEST) as f:
                fsync_dir(Path(target.path))
                f.write(content)
        else:
            target.fs.pipe_file(f"{target.path}/{MANIFEST}", content)
        if target.read(MANIFEST) != content:
            self._remove_marker(target)
            raise CorruptCheckpoint(f"{target}/{MANIFEST}: what was read back is not what had been sent")

    def _remove_marker(self, target: Place) -> None:
        if MANIFEST in target.entries():
            target.fs.rm_file(f"{target.path}/{MANIFEST}")

    def _folder(self, place: Place) -> None:
        if place.shown.partition("://")[0] not in NO_FOLDERS:
            place.fs.makedirs(place.path, exist_ok=True)

    def retire(self) -> list[int]:
        """Delete what the retention rule does not ask for, and what is no checkpoint. Returns the steps.

        Steps later than all that are here too are left alone: they are of a run that had gone further before it lost its own
        folder, and are replaced in time.
        """
        self.attempt.check()
        newest = max(set(manifests.committed(self.attempt.root)) & set(committed(self.place)), default=-1)
        here = [step for step in self.place.steps() if step <= newest]
        whole = [step for step in committed(self.place) if step <= newest]
        gone = surplus(whole, self.cfg)
        for step in [*gone, *(set(here) - set(whole))]:
            target = self.place.step(step)
            self._remove_marker(target)
            target.fs.rm(target.path, recursive=True)
            self.told()
        return gone

    def fetch(self) -> tuple[int | None, list[str]]:
        """Bring the newest whole checkpoint here and commit it.

        Returns:
            Its step, None where there is none; what is wrong with newer ones.

        Raises:
            RunFailed: there are some, and none is whole.
        """
        problems: list[str] = []
        for step in reversed(committed(self.place)):
            try:
                self._bring(step)
            except CorruptCheckpoint as error:
                problems.append(str(error))
                shutil.rmtree(self.attempt.staged(step), ignore_errors=True)
            else:
                return step, problems
        if problems:
            raise RunFailed(f"every checkpoint in {self.place} is corrupt: {problems[0]}")
        return None, []

    def _bring(self, step: int) -> None:
        source = self.place.step(step)
        content = source.read(MANIFEST)
        manifest = parse_manifest(content, source)
        total, free = sum(file.bytes for file in manifest.files.values()), shutil.disk_usage(self.attempt.root).free
        if free < total:
            raise RunFailed(
                f"no space left: {source} has {total / 2**30:.2f} GiB, and {self.attempt.root} {free / 2**30:.2f} GiB free"
            )
        folder = self.attempt.stage(step)
        in_parallel(lambda name: self._get(source, folder, manifest, name), sorted(manifest.files))
        with atomic_write(folder / MANIFEST) as f:
            f.write(content)
        self.attempt.commit(step)

    def _get(self, source: Place, folder: Path, manifest: Manifest, name: str) -> None:
        try:
            source.fs.get_file(f"{source.path}/{name}", str(folder / name))
        except FileNotFoundError as error:
            raise CorruptCheckpoint(f"{source}/{name}: there is none") from error
        self.told()
        try:
            manifests.verify_files(folder, {name: manifest.files[name]})
        except CorruptCheckpoint as error:
            raise CorruptCheckpoint(str(error).replace(str(folder), str(source))) from error
        durable(folder / name)
        self.told()


def durable(path: Path) -> None:
    """`fsync` of a file that somebody else has written."""
    with open(path, "rb") as f:
        os.fsync(f.fileno())


def in_parallel(work: Callable[[str], None], names: Iterable[str]) -> None:
    """Several files at once; the first that fails stops those that have not begun."""
    with ThreadPoolExecutor(places.THREADS) as pool:
        try:
            for done in [pool.submit(work, name) for name in names]:
                done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
