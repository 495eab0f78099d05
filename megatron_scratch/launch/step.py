"""The job step that runs the ranks: one srun over the chosen nodes, of torchrun's agents or of the ranks themselves."""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Mapping
from pathlib import Path

from megatron_scratch.config import Config
from megatron_scratch.config.launcher import VARIABLE, SlurmConfig
from megatron_scratch.util.env import everything
from megatron_scratch.util.errors import UserError
from megatron_scratch.util.starts import Start

PORTS = range(20000, 30000)  # below the ports that Linux gives to whoever asks for any


def meeting(nodes: list[str], job: int, start: int) -> dict[str, str]:
    """Where the ranks of a start meet: another port than those of the starts before it, which may linger."""
    return {"MASTER_ADDR": nodes[0], "MASTER_PORT": str(PORTS[(job * 31 + start) % len(PORTS)])}


def step(cfg: Config, job: Path, start: Start, nodes: list[str]) -> list[str]:
    """The command line of srun."""
    launcher: SlurmConfig = cfg.launcher
    srun = ["srun", f"--nodes={len(nodes)}", f"--nodelist={','.join(nodes)}", "--kill-on-bad-exit=1", "--wait=60", "--export=ALL"]
    worker = [str(job / "config.yaml"), f"--start-folder={start.folder}"]
    if launcher.mode == "srun":
        tasks = len(nodes) * launcher.gpus_per_node
        srun += [f"--ntasks={tasks}", f"--ntasks-per-node={launcher.gpus_per_node}"]
        return [*srun, *contained(launcher, job), "-m", "megatron_scratch.train.worker", *worker]
    srun += [f"--ntasks={len(nodes)}", "--ntasks-per-node=1", "--cpu-bind=none"]
    agent = ["-m", "megatron_scratch.train.agent", f"--nodes={len(nodes)}", f"--ranks={launcher.gpus_per_node}",
             f"--restarts={launcher.agent_restarts}"]  # fmt: skip
    return [*srun, *contained(launcher, job), *agent, *worker]


def contained(launcher: SlurmConfig, job: Path) -> list[str]:
    """Python on the node, or inside the container: what srun is told of it, and what it runs."""
    python = launcher.python or ("python3" if launcher.container else sys.executable)
    mounts = [*launcher.mounts, f"{job.parent.parent}:{job.parent.parent}", f"{Path.cwd()}:{Path.cwd()}"]
    wrong = next((mount for mount in mounts if not re.fullmatch(r"/[^:,]+:/[^:,]+(:[a-z+]+)?", mount)), None)
    if launcher.container and wrong is not None:  # pyxis and apptainer would take it apart somewhere else
        raise UserError(f"{wrong!r} cannot be mounted by {launcher.container}: SOURCE:PLACE[:FLAGS] is allowed, two absolute paths "
                        "without comma or colon; change launcher.mounts, or the folder that the job is submitted from")  # fmt: skip
    if launcher.container == "pyxis":
        return [f"--container-image={launcher.image}", f"--container-mounts={','.join(mounts)}",
                f"--container-workdir={Path.cwd()}", python]  # fmt: skip
    if launcher.container == "apptainer":
        binds = [word for mount in mounts for word in ("--bind", mount)]
        return ["apptainer", "exec", *(["--nv"] if launcher.gpus else []), *binds, "--pwd", str(Path.cwd()), launcher.image, python]
    return [python]


def secrets(path: str, env: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment and the secrets of a file; the ranks inherit both, no argument and no other file holds them."""
    env = everything() if env is None else dict(env)
    if not path:
        return env
    try:
        with open(path, encoding="utf-8") as file:
            open_to = stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077
            lines = [line.strip() for line in file]
    except OSError as error:
        raise UserError(f"launcher.secrets_file={path} cannot be read: {error.strerror}") from error
    if open_to:
        raise UserError(f"launcher.secrets_file={path} can be read by others; chmod 600 {path}")
    for number, line in enumerate(lines, 1):
        if line and not line.startswith("#"):
            key, _, value = line.removeprefix("export ").partition("=")
            if not re.fullmatch(VARIABLE, key):  # the line itself may be the secret: it is not shown
                raise UserError(f"line {number} of {path} is not NAME=VALUE")
            env[key] = value.strip("'\"")
    return env
