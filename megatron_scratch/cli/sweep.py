"""`train -m`: many runs of one command."""

from __future__ import annotations

from megatron_scratch.cli.words import MULTIRUN, options
from megatron_scratch.util.errors import UserError
from megatron_scratch.util.exits import OK


def sweep(words: list[str]) -> int:
    from megatron_scratch.util.env import read_rank

    if read_rank().launched:
        raise UserError("-m starts or submits runs, it is none: start it by itself, without torchrun and srun")
    overrides, folders, show = options([word for word in words if word not in MULTIRUN])
    from megatron_scratch.launch.sweep.run import sweep

    sweep(overrides, folders, show)
    return OK
