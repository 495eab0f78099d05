"""Several ranks on one CPU: forked from the test process, which has torch imported already (0.1 s instead of 4 s each)."""

from __future__ import annotations

import datetime
import faulthandler
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_scratch.parallel import Topology

TIMEOUT = 60  # seconds for one collective, and for a whole test's ranks to answer


def _main(rank: int, world: int, store: str, degrees: dict[str, int], fn: Callable[..., Any], args: tuple[Any, ...],
          pipe: Any, detail: bool) -> None:  # fmt: skip
    faulthandler.dump_traceback_later(TIMEOUT, exit=True)
    try:
        torch.set_num_threads(1)
        # DETAIL turns a shape or order mismatch between ranks into an error; without it gloo aborts, or says nothing.
        # torch 2.13's DistributedDataParallel segfaults under it when its group comes from a mesh.
        os.environ["TORCH_DISTRIBUTED_DEBUG"] = "DETAIL" if detail else "OFF"
        dist.set_debug_level_from_env()
        timeout = datetime.timedelta(seconds=TIMEOUT)
        dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=timeout)
        topo = Topology.build(degrees, rank, world, torch.device("cpu"))
        pipe.send((True, fn(topo, *args)))
        dist.destroy_process_group()
    except BaseException:  # noqa: B036  (whatever it was, the test wants to see it)
        pipe.send((False, traceback.format_exc()))
    finally:
        pipe.close()
        sys.stdout.flush()
        os._exit(0)  # no interpreter shutdown: the parent's pytest state is not ours to tear down


def run_ranks(
    world: int, fn: Callable[..., Any], *args: Any, degrees: dict[str, int] | None = None, detail: bool = True
) -> list[Any]:
    """`fn(topo, *args)` on `world` forked ranks (dp unless `degrees` says otherwise); their results in order of rank."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as tmp:
        processes, pipes = [], []
        for rank in range(world):
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_main, args=(rank, world, f"{tmp}/store", degrees or {}, fn, args, there, detail))
            process.start()
            there.close()
            processes.append(process)
            pipes.append(here)
        answers = [_answer(rank, pipe) for rank, pipe in enumerate(pipes)]
        for process in processes:
            process.join()
    failed = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(answers) if not ok]
    assert not failed, "\n".join(failed)
    return [value for _, value in answers]


def _answer(rank: int, pipe: Any) -> tuple[bool, Any]:
    try:
        return pipe.recv() if pipe.poll(TIMEOUT + 10) else (False, "no answer in time")
    except EOFError:
        return False, "died without a word (see its output above)"
    finally:
        pipe.close()
