"""Several ranks on this machine's CPU, forked from a process that has imported torch already: 0.1 s each instead of 4 s."""

from __future__ import annotations

import datetime
import faulthandler
import gc
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_scratch.util.env import Rank
from megatron_scratch.util.errors import RunFailed, UserError


def run_ranks(world: int, fn: Callable[..., Any], *args: Any, detail: bool = False, timeout: int = 120) -> list[Any]:
    """`fn(rank, *args)` on `world` forked ranks in one gloo process group; their results in order of rank.

    Args:
        fn: takes a `Rank`; it may be any function, as nothing is sent to a forked process. What it returns travels through a pipe.
        detail: torch's checks that all ranks issue the same collectives.
        timeout: seconds for one collective, and for all of it.

    Raises:
        UserError: that a rank raised. RunFailed: whatever else a rank raised, with its traceback, or that it died.
    """
    context = multiprocessing.get_context("fork")
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryDirectory() as tmp:
        processes, pipes = [], []
        for number in range(world):
            here, there = context.Pipe(duplex=False)
            rank = Rank(number, world, number, True)
            process = context.Process(target=_main, args=(rank, tmp, fn, args, there, detail, timeout))
            process.start()
            there.close()
            processes.append(process)
            pipes.append(here)
        answers = [_answer(pipe, timeout) for pipe in pipes]
        for process in processes:
            process.join()
        answers = [answer or _why(tmp, number, processes[number].exitcode) for number, answer in enumerate(answers)]
    for kind, error in answers:
        if kind == "user":
            raise UserError(error)
    failed = [f"rank {number}:\n{text}" for number, (kind, text) in enumerate(answers) if kind == "failed"]
    if failed:
        raise RunFailed("\n".join(failed))
    return [value for _, value in answers]


def _main(rank: Rank, tmp: str, fn: Callable[..., Any], args: tuple[Any, ...], pipe: Any, detail: bool, timeout: int) -> None:
    gc.freeze()  # what the parent made is not this process's to destroy: its sockets, threads and processes are not here
    stacks = open(_stacks(tmp, rank.rank), "w")  # noqa: SIM115  (for as long as the process lives)
    faulthandler.enable(stacks)
    faulthandler.dump_traceback_later(timeout, exit=True, file=stacks)
    try:
        torch.set_num_threads(1)
        dist.set_debug_level(dist.DebugLevel.DETAIL if detail else dist.DebugLevel.OFF)
        file = dist.FileStore(f"{tmp}/store", rank.world)
        limit = datetime.timedelta(seconds=timeout)
        dist.init_process_group("gloo", store=file, rank=rank.rank, world_size=rank.world, timeout=limit)
        _all_connected(file, rank, limit)
        pipe.send(("ok", fn(rank, *args)))
        dist.destroy_process_group()
    except UserError as error:
        pipe.send(("user", str(error)))
    except BaseException:  # noqa: B036  (whatever it was, the parent wants to see it)
        pipe.send(("failed", traceback.format_exc()))
    finally:
        pipe.close()
        sys.stdout.flush()
        os._exit(0)  # no interpreter shutdown: what the parent has open is not ours to close


def _all_connected(store: dist.Store, rank: Rank, limit: datetime.timedelta) -> None:
    """Wait until every rank has connected to every other: gloo lets the first ones go while others still connect, and one that
    then ends at once, or dies, would fail the others' connecting ("Connection closed by peer"), which are not at fault."""
    store.set(f"connected/{rank.rank}", "")
    store.wait([f"connected/{other}" for other in range(rank.world)], limit)


def _answer(pipe: Any, timeout: int) -> tuple[str, Any] | None:
    """What a rank sends; None: it died before it did."""
    try:
        return pipe.recv() if pipe.poll(timeout + 10) else ("failed", "no answer in time")
    except EOFError:
        return None
    finally:
        pipe.close()


def _why(tmp: str, rank: int, code: int | None) -> tuple[str, str]:
    """How a rank died, and where each of its threads stood if it was a crash or the end of its time."""
    how = f"died of {signal.Signals(-code).name}" if code and code < 0 else f"ended with {code} before it answered"
    with open(_stacks(tmp, rank)) as file:
        return "failed", f"{how}\n{file.read()}"


def _stacks(tmp: str, rank: int) -> str:
    return f"{tmp}/stacks{rank}"
