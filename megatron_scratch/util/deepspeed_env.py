"""The environment variables that DeepSpeed cannot do without. Its own launcher sets them; ours do not."""

from __future__ import annotations

import os


def prepare(local_rank: int, cpu: bool) -> None:
    """Set, where they are missing, what DeepSpeed reads when it is imported and initialised.

    Args:
        local_rank: number of this process's device on its machine.
        cpu: training runs on the CPU. Said outright, because DeepSpeed's own search for an accelerator warns when it finds none.
    """
    os.environ.setdefault("LOCAL_RANK", str(local_rank))
    if cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
