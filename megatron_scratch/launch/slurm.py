"""`launcher=slurm`: a resolved config becomes a job folder and one sbatch script; Slurm checks it, takes it, and we return.

A job folder, RUN/jobs/NNNN/, is all that a job reads: the config, the script, the code as it was when the job was submitted. What
is edited on the login node while the job waits changes nothing.
"""

from __future__ import annotations

import shlex
import shutil
import string
import subprocess
import sys
from collections.abc import Mapping
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import megatron_scratch
from megatron_scratch.config import Config, compose
from megatron_scratch.config.launcher import PATH, WORD, SlurmConfig, fits
from megatron_scratch.launch.step import contained
from megatron_scratch.util.env import everything
from megatron_scratch.util.errors import UserError
from megatron_scratch.util.exits import OK
from megatron_scratch.util.files import write_json

CARRIED = ("PATH", "LD_LIBRARY_PATH", "LANG", "PYTHONPATH")  # of the submitting shell; launcher.env names more


def launch(cfg: Config, world: int) -> int:
    """Submit a resolved config, `launcher.chain` times; print the job ids."""
    run = Path(cfg.dir).absolute()
    check_names(cfg, run)
    if cfg.launcher.print_only:
        print(render(cfg, run, run / "jobs" / "NNNN"), end="")
        return OK
    need("sbatch")
    job = make_job(cfg, run)
    check(job)
    print("\n".join(submit(job, cfg.launcher.chain, cfg.name)))
    return OK


def check_names(cfg: Config, run: Path) -> None:
    """What a script is about to hold beside the launcher's own fields, which `check_launcher` has seen."""
    fits("name", cfg.name, WORD, "llama-1b.try2")
    fits("dir", str(run), PATH.replace(":", ""), "runs/llama-1b")  # PYTHONPATH would be two folders
    contained(cfg.launcher, run / "jobs" / "NNNN")  # refuses what cannot be mounted
    fits("the path of this Python", _python(cfg.launcher), PATH, "/opt/venv/bin/python; or give launcher.python=PATH")


def make_job(cfg: Config, run: Path) -> Path:
    """A new job folder with everything that the job will read."""
    from megatron_scratch.train.rundir import RunDir

    RunDir(run).create()  # Slurm makes no folder for its log
    RunDir(run).check_stop()
    cfg.dir = str(run)  # wherever the job starts
    job = _claim(run / "jobs")
    compose.save(cfg, job / "config.yaml")
    (job / "job.sbatch").write_text(render(cfg, run, job), encoding="utf-8")
    package = Path(megatron_scratch.__file__).parent
    for code in [package, *own_code(cfg.plugins)]:
        _copy(code, job / "code" / code.name)
    write_json(job / "version.json", version(package))
    return job


def own_code(plugins: list[str]) -> list[Path]:
    """The user's packages and modules that `plugins` names, where they are not installed: their copy goes with the job."""
    found = []
    for name in dict.fromkeys(plugin.partition(".")[0] for plugin in plugins):
        spec = find_spec(name)
        origin = Path(spec.origin) if spec is not None and spec.origin else None
        if origin is not None and not origin.is_relative_to(sys.prefix):
            found.append(origin.parent if spec is not None and spec.submodule_search_locations else origin)
    return found


def _copy(code: Path, to: Path) -> None:
    if code.is_dir():
        shutil.copytree(code, to, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    else:
        shutil.copy2(code, to)


def _claim(jobs: Path) -> Path:
    """The next number; two submissions at once get two."""
    jobs.mkdir(parents=True, exist_ok=True)
    number = max((int(p.name) for p in jobs.iterdir() if p.name.isdigit()), default=0)
    while True:
        number += 1
        try:
            (jobs / f"{number:04d}").mkdir()
        except FileExistsError:
            continue
        return jobs / f"{number:04d}"


def version(package: Path) -> dict[str, str]:
    """Which code this is: the release, and the commit where the package lies in a checkout."""
    facts = {"version": megatron_scratch.__version__, "python": sys.version.split()[0]}
    for key, words in (("commit", ("rev-parse", "HEAD")), ("changed", ("status", "--porcelain", "--untracked-files=no"))):
        git = (
            subprocess.run(["git", "-C", str(package), *words], capture_output=True, text=True, check=False)
            if _has("git")
            else None
        )
        if git is not None and git.returncode == 0:
            facts[key] = git.stdout.strip()
    return facts


def render(cfg: Config, run: Path, job: Path) -> str:
    """The sbatch script, from launch/slurm.sbatch."""
    launcher = cfg.launcher
    template = string.Template(files("megatron_scratch.templates").joinpath("slurm.sbatch").read_text(encoding="utf-8"))
    exports = [f"export {name}={shlex.quote(value)}" for name, value in carried(launcher, everything()).items()]
    code = f"{shlex.quote(str(job / 'code'))}${{PYTHONPATH:+:$PYTHONPATH}}"
    return template.substitute(
        options="\n".join(f"#SBATCH {option}" for option in options(cfg, run)),
        run=run,
        exports="\n".join([*exports, f"export PYTHONPATH={code} PYTHONSAFEPATH=1"]),
        setup=f"source {shlex.quote(launcher.setup)}" if launcher.setup else "",
        python=shlex.quote(_python(launcher)),
        job=shlex.quote(str(job)),
        chain=launcher.chain,
        max_restarts=launcher.max_restarts,
        exclude=f"{launcher.exclude}," if launcher.exclude else "",
    )


def options(cfg: Config, run: Path) -> list[str]:
    """The long options of sbatch. Every value has been matched against its pattern; none holds a space or a quote."""
    launcher = cfg.launcher
    given = {
        "job-name": cfg.name,
        "nodes": launcher.nodes + launcher.spare_nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": launcher.gpus_per_node if launcher.gpus else None,
        "cpus-per-gpu": launcher.cpus_per_gpu,
        "mem": launcher.mem_per_node,
        **{key: getattr(launcher, key) for key in ("time", "partition", "account", "qos", "constraint", "reservation", "exclude")},
        "signal": f"B:USR1@{launcher.signal_seconds}" if launcher.signal_seconds else None,
        "output": run / "logs" / "slurm_%j.log",
        "open-mode": "append",
        "export": "NIL",  # not one variable of the submitting shell, which Slurm would store with the job
        **launcher.sbatch,
    }
    flags = [
        name
        for name, on in (("exclusive", launcher.exclusive), ("requeue", launcher.requeue), ("no-requeue", not launcher.requeue))
        if on
    ]
    return [f"--{key}={value}" for key, value in given.items() if value not in (None, "")] + [f"--{flag}" for flag in flags]


def carried(launcher: SlurmConfig, env: Mapping[str, str]) -> dict[str, str]:
    """The variables that a job gets from the submitting shell: by name, and none that looks like a secret."""
    missing = [name for name in launcher.env if name not in env]
    if missing:
        raise UserError(f"launcher.env names {missing[0]}, which is not set in this shell; export it, or leave it out")
    return {name: env[name] for name in (*CARRIED, *launcher.env) if name in env}


def submit(job: Path, chain: int, name: str) -> list[str]:
    """Hand the script to Slurm, `chain` times, each waiting for the one before it, or not at all; the lines to show."""
    ids: list[str] = []
    try:
        for _ in range(chain):
            after = [f"--dependency=afterany:{ids[-1]}", "--kill-on-invalid-dep=yes"] if ids else []
            ids.append(_sbatch(["--parsable", *after], job).split(";")[0])
            write_json(job / "submitted.json", {"ids": [int(number) for number in ids]})
    except UserError:  # all of the chain, or nothing
        if ids:
            subprocess.run(["scancel", *ids], check=False)
        raise
    return [f"submitted job {number} ({name}), {job / 'job.sbatch'}" for number in ids]


def check(job: Path) -> None:
    """Let Slurm look at a script without taking it."""
    _sbatch(["--test-only"], job)


def _sbatch(options: list[str], job: Path) -> str:
    """Run sbatch on a job's script. What it refuses is the user's to mend."""
    done = subprocess.run(["sbatch", *options, str(job / "job.sbatch")], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise UserError(f"sbatch refuses {job / 'job.sbatch'}: {' '.join(lines)[:400] or 'no reason given'}; change launcher.*")
    return done.stdout.strip()


def need(command: str) -> None:
    if not _has(command):
        raise UserError(
            f"{command} is not on this machine; submit from a login node of the cluster, or give launcher.print_only=true"
        )


def _has(command: str) -> bool:
    return shutil.which(command) is not None


def _python(launcher: SlurmConfig) -> str:
    return launcher.python or sys.executable
