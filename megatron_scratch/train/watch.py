"""The watch beside training: one thread a rank that shows signs of life, notices that there is no progress, and ends the rank.

    beat        a record of SIZE bytes, about once a second: RUN/heartbeats/ATTEMPT/rank_N
    suspicion   no step, phase, microbatch or collective for `fault.hang_timeout`: the first rank to notice takes a lock file
    verdict     it reads all records twice and judges (`hang.py`); if nobody is to blame, the lock goes away again
    leaving     every rank writes its stacks to RUN/logs/hang_ATTEMPT_rank_N.txt and ends with 1; one of them says why

A thread of Python cannot run in a process that holds Python's lock for ever. So each beat also winds up a timer of faulthandler's,
which is a thread of C: it writes the stacks behind the record, and ends the process. One that is stopped is ended by its launcher.
"""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from megatron_scratch.parallel.topology import Topology
from megatron_scratch.train import heartbeat
from megatron_scratch.train.activity import Activity
from megatron_scratch.train.hang import Hang, judge
from megatron_scratch.train.heartbeat import LONG, SIZE, Beat, Pulse, Recorder
from megatron_scratch.train.rundir import RunDir
from megatron_scratch.util.env import node_name
from megatron_scratch.util.errors import RunFailed
from megatron_scratch.util.exits import FAILED
from megatron_scratch.util.files import write_json

EVERY = 1.0  # seconds between two beats: a shared file system bears one small write a second of thousands of ranks
MARGIN = 5.0  # seconds after the time limit in which a verdict comes about; then the timer ends a rank that no longer beats
PATIENCE = 15.0  # seconds to wait for a verdict that another rank is writing
KEPT = 3  # attempts whose records are kept


class Watch:
    """
    Args:
        limit: seconds without progress; 0: records are written, and nothing is judged.
        told: called with the message before this rank ends.
    """

    def __init__(self, limit: float, run: RunDir, attempt: int, topo: Topology, pulse: Pulse,
                 told: Callable[[str], None] = lambda message: None) -> None:  # fmt: skip
        self.limit, self.run_dir, self.attempt, self.topo, self.pulse, self.told = limit, run, attempt, topo, pulse, told
        self.every = min(EVERY, limit / 8) if limit else EVERY
        self.folder = run.heartbeats / str(attempt)
        self.lock, self.verdict = self.folder / "judging", self.folder / "verdict.json"
        self.stacks = run.logs / f"hang_{attempt}_rank_{topo.rank:05d}.txt"
        self.recorder, self.activity = Recorder(topo), Activity(4 * self.every)
        self.beat = Beat(topo.rank, node_name(), os.getpid(), groups=self.recorder.groups)
        self.training, self.signs, self.last = threading.get_ident(), None, time.monotonic()
        self.suspected = 0.0  # since when a rank has been judging
        self.failed = False
        self.fd = -1
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    @contextmanager
    def running(self) -> Iterator[Watch]:
        with suppress(OSError):  # without records others will call this rank silent; no reason not to train
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.topo.is_main:
                self._forget()
            self.fd = os.open(heartbeat.record_of(self.folder, self.topo.rank), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o640)
            os.lseek(self.fd, SIZE, os.SEEK_SET)  # where the timer writes to
        self._beat()
        self.thread.start()
        try:
            yield self
        finally:
            self.close()

    def close(self) -> None:
        """No more beats; this rank's record goes away, as it is well."""
        if self.over.is_set():
            return
        self.over.set()
        if self.thread.is_alive():
            self.thread.join()
        faulthandler.cancel_dump_traceback_later()
        with suppress(OSError):
            os.close(self.fd)
            heartbeat.record_of(self.folder, self.topo.rank).unlink()
            self.folder.rmdir()  # by whoever is the last

    def settle(self) -> None:
        """This rank has failed. If that is because of a hang, as others end before it does, it ends here, with their verdict."""
        self.failed, deadline = True, time.monotonic() + PATIENCE
        while time.monotonic() < deadline and not self.over.is_set() and (self.verdict.exists() or self.lock.exists()):
            time.sleep(self.every / 4)

    def _forget(self) -> None:
        old = sorted((int(p.name) for p in self.run_dir.heartbeats.iterdir() if p.name.isdigit()), reverse=True)
        for number in old[KEPT:]:
            shutil.rmtree(self.run_dir.heartbeats / str(number), ignore_errors=True)

    def _watch(self) -> None:
        while not self.over.wait(self.every):
            self._beat()
            if self.limit and (self.failed or self.beat.idle > self.limit / 2):
                self._look()

    def _beat(self) -> None:
        """Look at the training thread, and write down what is seen."""
        now, beat, pulse = time.monotonic(), self.beat, self.pulse
        signs = (pulse.phase, pulse.step, pulse.ticks, self.recorder.look())
        # A process that was stopped for an hour and goes on has not been idle for an hour.
        beat.idle = 0.0 if signs != self.signs or self._works() else beat.idle + min(now - self.last, 2 * self.every)
        self.signs, self.last = signs, now
        beat.count, beat.time, beat.phase, beat.step = beat.count + 1, time.time(), pulse.phase, pulse.step
        beat.at, beat.waits = heartbeat.position(self.training, self.recorder)
        with suppress(OSError):  # a full disk, a server that is away: no reason to end
            os.pwrite(self.fd, beat.packed(), 0)
        if self.limit:
            faulthandler.dump_traceback_later(self.limit + MARGIN + 3 * self.every, exit=True, file=max(self.fd, 2))

    def _works(self) -> bool:
        return self.pulse.phase in LONG and self.beat.idle > self.limit / 8 and self.activity.seen()

    def _look(self) -> None:
        """Leave if there is a verdict; judge if it is time and nobody else does."""
        if self.verdict.exists():
            self._leave(Hang(**json.loads(self.verdict.read_text(encoding="utf-8"))))
        elif self.lock.exists():
            if not self.suspected:
                self.suspected = time.monotonic()
                self._write_stacks()
            if time.monotonic() - self.suspected > PATIENCE:
                self._leave(Hang(f"no progress for {self.limit:g} s, and the rank that was to say why has gone", [], [0]))
        elif self.suspected:  # somebody has judged, and it was no hang
            self._wait_on()
        elif self.beat.idle > self.limit and self._first():
            self._judge()

    def _wait_on(self) -> None:
        """It is no hang: look again in a while."""
        self.stacks.unlink(missing_ok=True)
        self.suspected, self.beat.idle = 0.0, min(self.beat.idle, self.limit) - self.limit / 4

    def _first(self) -> bool:
        try:
            os.close(os.open(self.lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o640))
        except FileExistsError:
            return False
        return True

    def _records(self) -> list[Beat | None]:
        return [heartbeat.read(self.folder, rank) for rank in range(self.topo.world)]

    def _judge(self) -> None:
        self.suspected = time.monotonic()
        self._write_stacks()
        before = self._records()
        for _ in range(3):
            time.sleep(self.every)
            self._beat()
        found = judge(before, self._records(), time.time(), self.limit, 3 * self.every, self.beat.host)
        if found is None:
            self.lock.unlink(missing_ok=True)
            self._wait_on()
            return
        unknown = "; this torch does not tell of collectives" if self.recorder.missing else ""
        elsewhere = f", of a rank that holds Python's lock in {self.folder}" if found.silent else ""
        verdict = Hang(f"hang: no progress for {self.limit:g} s (fault.hang_timeout): {found.message}{unknown}; stacks are in "
                       f"{self.run_dir.logs}/hang_{self.attempt}_rank_*.txt{elsewhere}", found.ranks, found.silent)  # fmt: skip
        with suppress(OSError, RunFailed):  # a later start may have taken over
            self.run_dir.record("hang", reason=found.message, ranks=found.ranks, attempt=self.attempt)
        write_json(self.verdict, vars(verdict))
        time.sleep(3 * self.every)  # the others leave first: who sees a connection close may take that for the fault
        self._leave(verdict)

    def _write_stacks(self) -> None:
        """While all is as it was: once the first rank has left, the others stand somewhere else."""
        with suppress(OSError), open(self.stacks, "w") as file:
            faulthandler.dump_traceback(file)

    def _leave(self, hang: Hang) -> None:
        """End this process. One rank speaks: the main one, which has the terminal, or the first that can."""
        faulthandler.dump_traceback_later(MARGIN, exit=True, file=max(self.fd, 2))  # should any of this hang, too
        if not self.suspected:  # it has come too late to see how others judged
            self._write_stacks()
        speaks = self.topo.rank == next((r for r in range(self.topo.world) if r not in hang.silent), 0)
        message = hang.message if speaks else f"ended with the others, as ranks {hang.ranks} hang"
        with suppress(OSError), open(self.run_dir.log_file(self.topo.rank), "a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            if speaks:
                os.write(2, f"failed: {message}\n".encode())
        with suppress(OSError):
            self.told(message)
        os._exit(FAILED)
