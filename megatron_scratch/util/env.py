"""The only reader of launcher variables (torchrun's RANK ..., Slurm's SLURM_PROCID ...), and the one place that sets any."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Rank:
    """Who this process is in its job."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    launched: bool = False  # True when torchrun, srun or our local launcher started this process
    nodes: int = 1


def read_rank(env: Mapping[str, str] | None = None) -> Rank:
    """The rank that the launcher gave this process; rank 0 of 1 when there was none.

    torchrun's variables win over Slurm's: inside `srun torchrun` both are present and SLURM_PROCID counts agents. A bare
    sbatch or salloc shell also has SLURM_PROCID=0, so Slurm's count only inside a step (SLURM_STEP_ID, several tasks).
    """
    env = os.environ if env is None else env
    if "RANK" in env and "WORLD_SIZE" in env:
        world = int(env["WORLD_SIZE"])
        return Rank(int(env["RANK"]), world, int(env.get("LOCAL_RANK", 0)), True, world // int(env.get("LOCAL_WORLD_SIZE", world)))
    in_step = "SLURM_STEP_ID" in env and int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1"))) > 1
    if in_step:
        tasks = int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1")))
        nodes = int(env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES", "1")))
        return Rank(int(env["SLURM_PROCID"]), tasks, int(env.get("SLURM_LOCALID", 0)), True, nodes)
    return Rank()


def restart_count(env: Mapping[str, str] | None = None) -> int | None:
    """How often torchrun has restarted this group of ranks; None when torchrun did not start us."""
    env = os.environ if env is None else env
    return int(env["TORCHELASTIC_RESTART_COUNT"]) if "TORCHELASTIC_RESTART_COUNT" in env else None


def agent_store(env: Mapping[str, str] | None = None) -> bool:
    """Whether torchrun's agent holds the store at `master`. Where it does not, each start of the ranks has a new port, on which the
    first rank is to hold one: so it is with c10d and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1."""
    env = os.environ if env is None else env
    return env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def master(env: Mapping[str, str] | None = None) -> tuple[str, int]:
    """(address, port) where the ranks of a job meet, as torchrun or an sbatch script set them."""
    env = os.environ if env is None else env
    return env["MASTER_ADDR"], int(env["MASTER_PORT"])


@dataclass(frozen=True)
class Allocation:
    """What Slurm has given a batch script."""

    job: int
    restarts: int  # how often Slurm has requeued it
    nodes: str  # as Slurm writes them: node[1-2]
    name: str


def read_allocation(env: Mapping[str, str] | None = None) -> Allocation | None:
    """The job whose batch script this process is; None outside of Slurm."""
    env = os.environ if env is None else env
    if "SLURM_JOB_ID" not in env or "SLURM_JOB_NODELIST" not in env:
        return None
    restarts = int(env.get("SLURM_RESTART_COUNT", "0"))
    return Allocation(int(env["SLURM_JOB_ID"]), restarts, env["SLURM_JOB_NODELIST"], env.get("SLURM_JOB_NAME", ""))


def node_number(env: Mapping[str, str] | None = None) -> int:
    """Which node of its step this process is on, in Slurm's order."""
    env = os.environ if env is None else env
    return int(env["SLURM_NODEID"])


def node_name(env: Mapping[str, str] | None = None) -> str:
    """Slurm's name of this node, which is what it excludes by; elsewhere the host's own."""
    env = os.environ if env is None else env
    return env.get("SLURMD_NODENAME", "") or socket.gethostname().split(".")[0]


def temporary_folder(env: Mapping[str, str] | None = None) -> Path:
    """Where programs of this node put what they need for a while. Python alone would pass over a TMPDIR that cannot be written."""
    env = os.environ if env is None else env
    return Path(env.get("TMPDIR") or tempfile.gettempdir())


def everything() -> dict[str, str]:
    """A copy of this process's variables, to hand on to a process that it starts."""
    return dict(os.environ)


def prepare_elastic() -> None:
    """Before torchrun begins: without this, restarted ranks read the addresses of dead ones (torch 2.13, pytorch issue 135712)."""
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # what torchrun would set, with a warning; train.threads counts


def prepare_ray() -> str | None:
    """Before Ray starts: no reports of its use to its makers, unless the user asked for them. The cluster to join, if any."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    return os.environ.get("RAY_ADDRESS")


def prepare_recorder(entries: int) -> None:
    """Before a process group is made: torch's flight recorder keeps the last collectives, unless the user has said how many."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(entries))


def prepare_profiler() -> None:
    """Before torch's profiler starts: it says nothing on stderr (two lines a start, torch 2.13), unless the user asked for that."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def prepare_wandb(folder: Path) -> None:
    """Before wandb is imported: what its client keeps beside a run is in `folder`, not in a home that may be full or not there; its
    makers hear nothing of errors (with a server that hangs, that took 20 s at the end, wandb 0.31); and it does not wait for ever.
    The user's own word counts."""
    values = {"CACHE_DIR": folder, "DATA_DIR": folder, "ARTIFACT_DIR": folder, "ERROR_REPORTING": "false",
              "INIT_TIMEOUT": 6, "FINISH_TIMEOUT": 6, "HTTP_TIMEOUT": 5}  # fmt: skip
    for name, value in values.items():
        os.environ.setdefault(f"WANDB_{name}", str(value))
    os.environ.pop("WANDB_SERVICE", None)  # a client of a process above this one


def prepare_deepspeed(local_rank: int, cpu: bool) -> None:
    """Set, where they are missing, the variables that DeepSpeed reads when it is imported; its own launcher would.

    Args:
        local_rank: number of this process's device on its machine.
        cpu: training runs on the CPU. Said outright, because DeepSpeed's own search for an accelerator warns when it finds none.
    """
    os.environ.setdefault("LOCAL_RANK", str(local_rank))
    if cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
