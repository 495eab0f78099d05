"""One a node, under srun: torchrun, with the node's number as Slurm has it.

A static rendezvous: ranks are in Slurm's order, which knows the network. With torchrun's own (c10d) they are in the order of the
host names as strings, node10 before node2.
"""

from __future__ import annotations

import argparse

from megatron_scratch.util.env import master, node_number, prepare_elastic
from megatron_scratch.util.exits import FAILED

SHUTDOWN = 30  # seconds that ranks get to save after SIGTERM; Slurm's own KillWait is 30


def main() -> None:
    """`python -m megatron_scratch.train.agent --nodes N --ranks R --restarts K CONFIG ...`"""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("--nodes", "--ranks", "--restarts"):
        parser.add_argument(name, type=int, required=True)
    args, worker = parser.parse_known_args()
    prepare_elastic()
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    address, port = master()
    words = [f"--nnodes={args.nodes}", f"--node-rank={node_number()}", f"--nproc-per-node={args.ranks}", f"--master-addr={address}",
             f"--master-port={port}", f"--max-restarts={args.restarts}",
             # without this a SIGUSR1 that reaches the agent kills it and leaves its ranks behind
             "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]  # fmt: skip
    if any("--shutdown-timeout" in action.option_strings for action in run.get_args_parser()._actions):  # not in every release
        words.append(f"--shutdown-timeout={SHUTDOWN}")
    try:
        run.main([*words, "-m", "megatron_scratch.train.worker", *worker])
    except ChildFailedError:  # each rank has written down how it ended; torchrun's own table says less in 60 lines
        raise SystemExit(FAILED) from None


if __name__ == "__main__":
    main()
