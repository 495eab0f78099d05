"""The `launcher` section: where the ranks run, and what a scheduler is asked for. One dataclass per entry.

Every field that ends up in a script is matched against a pattern here, before anything is written: what passes has no character
that a shell, sbatch or YAML could read as more than itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Optional

from megatron_scratch.util.errors import UserError, choice

WORD = r"[A-Za-z0-9._-]{1,64}"
WORDS = rf"{WORD}(,{WORD}){{0,15}}"
NODES = r"[A-Za-z0-9._,\[\]-]{1,1024}"  # node1,gpu[03-17]
FEATURES = r"[A-Za-z0-9._,:&|*\[\]()!-]{1,256}"  # a100&(rack1|rack2)
TIME = r"\d{1,4}(:[0-5]\d){1,2}|\d{1,3}-\d{1,2}(:[0-5]\d){0,2}|\d{1,6}"
MEMORY = r"\d{1,9}[KMGT]?"
PATH = r"[A-Za-z0-9_./@+=:~-]{1,4096}"
VARIABLE = r"[A-Za-z_][A-Za-z0-9_]{0,63}"
FLAG = r"[a-z][a-z0-9-]{0,63}"
VALUE = r"[A-Za-z0-9._,:;=@/+%*()\[\]&|!-]{0,1024}"
IMAGE = r"[A-Za-z0-9_./@+=:#-]{1,1024}"
SECRET = re.compile(r"key|token|secret|passw|credential|auth", re.IGNORECASE)


@dataclass
class LauncherConfig:
    """local: this machine, as many processes as given."""

    name: str = "local"
    processes: Optional[int] = None  # None: all local GPUs, or the fewest that the layout needs


@dataclass
class ClusterConfig(LauncherConfig):
    """What every cluster is asked for: nodes with GPUs, a container perhaps, and how often to start again."""

    nodes: int = 1
    gpus_per_node: int = 8  # as many ranks on a node
    gpus: bool = True  # false: ranks on CPUs; no GPU is asked for
    image: str = ""  # of a container, as the container's engine names it
    max_restarts: int = 3  # starts in a row that may end without a new checkpoint; then the job gives up
    print_only: bool = False  # show what would be submitted


@dataclass
class SlurmConfig(ClusterConfig):
    """One job of Slurm. Empty and None: not asked for, so that the cluster's own default counts."""

    name: str = "slurm"
    time: str = ""  # limit of one job, as sbatch takes it: minutes, H:MM:SS, D-HH:MM:SS
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    reservation: str = ""
    exclude: str = ""  # nodes not to be used
    cpus_per_gpu: Optional[int] = None
    mem_per_node: str = ""  # 64G; 0: all that the node has
    exclusive: bool = True
    sbatch: dict[str, str] = field(default_factory=dict)  # any other long option of sbatch, e.g. {comment: trial}
    spare_nodes: int = 0  # asked for on top of `nodes`; they take the place of nodes that fail the preflight
    preflight: bool = True
    preflight_seconds: int = 300  # a node that has not answered by then is bad
    signal_seconds: int = 300  # the run is told to stop and save this long before its time limit; Slurm may be 60 s early
    requeue: bool = True  # go on in a new job after the time limit, preemption or a failed node
    chain: int = 1  # jobs to submit at once, each waiting for the one before it to end
    mode: str = "torchrun"  # torchrun: one agent a node starts its ranks; srun: Slurm starts every rank
    agent_restarts: int = 0  # torchrun: restarts inside a job, on the nodes that it has
    container: str = ""  # pyxis or apptainer
    mounts: list[str] = field(default_factory=list)  # HOST:CONTAINER
    setup: str = ""  # a bash file that is sourced before anything else: modules, NCCL's variables
    env: list[str] = field(default_factory=list)  # further variables of this shell that the job gets, by name; never secrets
    secrets_file: str = ""  # KEY=VALUE lines that only its owner can read; read on the node, by the ranks' parent
    python: str = ""  # the interpreter on the nodes; empty: this one


@dataclass
class KubernetesConfig(ClusterConfig):
    """One JobSet or PyTorchJob, a pod a node. Empty and None: not asked for."""

    name: str = "kubernetes"
    kind: str = "jobset"  # or pytorchjob, of Kubeflow's training operator
    namespace: str = ""
    volume: str = ""  # a PersistentVolumeClaim (ReadWriteMany) with the data and the run directory
    host_path: str = ""  # or a folder that every node has at this path
    mount: str = "/work"  # where pods see it; relative paths of the config are below it
    cpus: str = ""  # of a pod: 96, 500m
    memory: str = ""  # of a pod: 1500Gi
    shm: str = "16Gi"  # /dev/shm, which NCCL's ranks of one node talk through; counts as memory
    gpu_resource: str = "nvidia.com/gpu"
    resources: list[str] = field(default_factory=list)  # further ones of a pod: NAME:QUANTITY, such as rdma/hca:8
    grace_seconds: int = 300  # between SIGTERM and SIGKILL: time to end a step and save
    node_selector: list[str] = field(default_factory=list)  # LABEL:VALUE of the nodes to use
    tolerations: list[str] = field(default_factory=list)  # KEY[=VALUE][:EFFECT], as `kubectl taint` writes them
    queue: str = ""  # of Kueue
    priority_class: str = ""
    service_account: str = ""
    pull_secrets: list[str] = field(default_factory=list)  # for the image's registry
    user: Optional[int] = None  # user and group of the processes, and of the volume's files; None: the image's
    env: list[str] = field(default_factory=list)  # variables of this shell that the pods get, by name; never secrets
    secrets: list[str] = field(default_factory=list)  # SECRET: all its keys as variables; VARIABLE:SECRET/KEY: one
    port: int = 29500
    python: str = "python3"  # in the image


# options of sbatch that the script sets itself, or that would make it another script
OURS = ("array", "batch", "chdir", "dependency", "error", "export", "export-file", "get-user-env", "gpus", "gpus-per-node",
        "job-name", "nodes", "ntasks", "ntasks-per-node", "open-mode", "output", "parsable", "requeue", "no-requeue", "signal",
        "test-only", "wait", "wrap")  # fmt: skip
EARLY = 60  # seconds: Slurm looks at time limits twice a minute
MODES, CONTAINERS, KINDS = ("torchrun", "srun"), ("", "pyxis", "apptainer"), ("jobset", "pytorchjob")
LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"  # RFC 1123
SUBDOMAIN = rf"(?=.{{1,253}}$){LABEL}(\.{LABEL})*"
TAG = r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"  # the name part of a label's key, and its value
KEY = rf"({SUBDOMAIN[SUBDOMAIN.index(')') + 1 :]}/)?{TAG}"
QUANTITY = r"\d{1,9}(\.\d{1,3})?(m|k|Ki|M|Mi|G|Gi|T|Ti)?"


def check_launcher(cfg: Any) -> None:
    """Refuse what no cluster could take, and whatever a shell could misread."""
    if isinstance(cfg, ClusterConfig):
        _check_cluster(cfg)
    if isinstance(cfg, SlurmConfig):
        _check_slurm(cfg)
    if isinstance(cfg, KubernetesConfig):
        _check_kubernetes(cfg)
    if not isinstance(cfg, ClusterConfig) and cfg.processes is not None and cfg.processes < 1:
        raise UserError(f"launcher.processes={cfg.processes} must be at least 1")


def fits(key: str, got: str, pattern: str, example: str) -> None:
    """Refuse `got` unless the whole of it matches; the message shows it escaped."""
    if not re.fullmatch(pattern, got):
        raise UserError(f"{key}={got!r} is refused: allowed is {pattern.replace('{1,64}', '+')}, such as {example}")


def _check_cluster(cfg: ClusterConfig) -> None:
    if cfg.processes is not None:
        raise UserError(f"launcher.processes={cfg.processes} counts processes of this machine; with launcher={cfg.name} give "
                        "launcher.nodes and launcher.gpus_per_node")  # fmt: skip
    for key, least in (("nodes", 1), ("gpus_per_node", 1), ("max_restarts", 0)):
        if getattr(cfg, key) < least:
            raise UserError(f"launcher.{key}={getattr(cfg, key)} must be at least {least}")
    if cfg.image:
        fits("launcher.image", cfg.image, IMAGE, "nvcr.io#nvidia/pytorch:26.01-py3")


def _check_slurm(cfg: SlurmConfig) -> None:
    patterns = {"time": (TIME, "24:00:00"), "partition": (WORDS, "gpu"), "account": (WORD, "project"), "qos": (WORD, "normal"),
                "constraint": (FEATURES, "h100&rack1"), "reservation": (WORDS, "maintenance"), "exclude": (NODES, "node[03-05]"),
                "mem_per_node": (MEMORY, "512G"), "setup": (PATH, "launch/nccl.sh"), "secrets_file": (PATH, "/home/me/.secrets"),
                "python": (PATH, "/opt/venv/bin/python")}  # fmt: skip
    for key, (pattern, example) in patterns.items():
        if getattr(cfg, key):
            fits(f"launcher.{key}", getattr(cfg, key), pattern, example)
    least = {"spare_nodes": 0, "preflight_seconds": 10, "signal_seconds": 0, "chain": 1, "agent_restarts": 0}
    for key, number in least.items():
        if getattr(cfg, key) < number:
            raise UserError(f"launcher.{key}={getattr(cfg, key)} must be at least {number}")
    choice("launcher.mode", cfg.mode, MODES)
    choice("launcher.container", cfg.container, CONTAINERS)
    _check_lists(cfg)
    _check_effect(cfg)


def _check_lists(cfg: SlurmConfig) -> None:
    for mount in cfg.mounts:
        fits("launcher.mounts", mount, rf"{PATH}", "/data:/data")
    for variable in cfg.env:
        fits("launcher.env", variable, VARIABLE, "NCCL_IB_HCA")
        if SECRET.search(variable):
            raise UserError(f"launcher.env={variable!r} looks like a secret, and the job's script is no place for one; "
                            "put it into a file of your own (chmod 600) and give launcher.secrets_file=FILE")  # fmt: skip
    for flag, value in cfg.sbatch.items():
        fits("launcher.sbatch", flag, FLAG, "comment")
        if flag in OURS or hasattr(cfg, flag.replace("-", "_")):
            raise UserError(
                f"launcher.sbatch.{flag}={value!r} is refused: the script sets it; see launcher.* for what can be chosen"
            )
        fits(f"launcher.sbatch.{flag}", str(value), VALUE, "trial")


def seconds(time: str) -> int:
    """Slurm's ways to write a time, as seconds: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, secs = (*parts, 0, 0)[:3]
        return ((int(days) * 24 + hours) * 60 + minutes) * 60 + secs
    hours, minutes, secs = {1: (0, *parts, 0), 2: (0, *parts), 3: tuple(parts)}[len(parts)]
    return (hours * 60 + minutes) * 60 + secs


def _check_effect(cfg: SlurmConfig) -> None:
    """An option that could not take effect is refused."""
    if cfg.time and seconds(cfg.time) <= cfg.signal_seconds + EARLY:
        raise UserError(f"launcher.time={cfg.time} is over before a stop asked for launcher.signal_seconds={cfg.signal_seconds} s "
                        f"ahead, which Slurm may do {EARLY} s early; lengthen one or shorten the other")  # fmt: skip
    if cfg.spare_nodes and not cfg.preflight:
        raise UserError(f"launcher.spare_nodes={cfg.spare_nodes} needs launcher.preflight=true, which chooses the nodes to use")
    if cfg.agent_restarts and cfg.mode != "torchrun":
        raise UserError(f"launcher.agent_restarts={cfg.agent_restarts} is torchrun's; give launcher.mode=torchrun")
    if bool(cfg.container) != bool(cfg.image):
        raise UserError(f"launcher.container={cfg.container!r} and launcher.image={cfg.image!r}: give both, or neither")
    if cfg.cpus_per_gpu is not None and not cfg.gpus:
        raise UserError(f"launcher.cpus_per_gpu={cfg.cpus_per_gpu} needs launcher.gpus=true; with ranks on CPUs give "
                        f"launcher.sbatch.cpus-per-task={cfg.cpus_per_gpu * cfg.gpus_per_node}")  # fmt: skip
    if cfg.mounts and not cfg.container:
        raise UserError(f"launcher.mounts={cfg.mounts} needs launcher.container=pyxis or apptainer")


def _check_kubernetes(cfg: KubernetesConfig) -> None:
    choice("launcher.kind", cfg.kind, KINDS)
    words = {"namespace": (LABEL, "team"), "volume": (SUBDOMAIN, "runs"), "host_path": (PATH, "/mnt/shared"),
             "mount": (PATH, "/work"), "cpus": (QUANTITY, "96"), "memory": (QUANTITY, "1500Gi"), "shm": (QUANTITY, "16Gi"),
             "queue": (LABEL, "training"), "gpu_resource": (KEY, "nvidia.com/gpu"), "priority_class": (SUBDOMAIN, "high"),
             "service_account": (SUBDOMAIN, "train"), "python": (PATH, "/opt/venv/bin/python")}  # fmt: skip
    for key, (pattern, example) in words.items():
        if getattr(cfg, key):
            fits(f"launcher.{key}", getattr(cfg, key), pattern, example)
    lists = {"node_selector": (rf"{KEY}:{TAG}", "gpu.product:H100"), "resources": (rf"{KEY}:{QUANTITY}", "rdma/hca:8"),
             "pull_secrets": (SUBDOMAIN, "registry"), "env": (VARIABLE, "NCCL_IB_HCA"),
             "tolerations": (rf"{KEY}(={TAG})?(:(NoSchedule|PreferNoSchedule|NoExecute))?", "nvidia.com/gpu=present:NoSchedule"),
             "secrets": (rf"({VARIABLE}:)?{LABEL}(\.{LABEL})*(/[A-Za-z0-9._-]{{1,253}})?", "WANDB_API_KEY:wandb/key")}  # fmt: skip
    for key, (pattern, example) in lists.items():
        for word in getattr(cfg, key):
            fits(f"launcher.{key}", word, pattern, example)
    _check_pods(cfg)


def _check_pods(cfg: KubernetesConfig) -> None:
    """What a pod cannot do without, and what would have no effect."""
    if not cfg.image:
        raise UserError("launcher.image is not given; pods need one that has megatron_scratch in it (docs/containers.md)")
    if bool(cfg.volume) == bool(cfg.host_path):
        raise UserError(f"launcher.volume={cfg.volume!r} and launcher.host_path={cfg.host_path!r}: give one of them; "
                        "without it data, logs and checkpoints would be lost with the pods")  # fmt: skip
    for key in ("mount", "host_path"):
        if getattr(cfg, key) and not getattr(cfg, key).startswith("/"):
            raise UserError(f"launcher.{key}={getattr(cfg, key)!r} is not absolute; give a path such as /mnt/shared")
    for word in cfg.secrets:
        if (":" in word) != ("/" in word):
            raise UserError(f"launcher.secrets={word!r}: give SECRET for all its keys, or VARIABLE:SECRET/KEY for one")
    for word in cfg.env:
        if SECRET.search(word):
            raise UserError(f"launcher.env={word!r} looks like a secret, and a manifest is no place for one; "
                            f"give launcher.secrets=[{word}:SECRET/KEY]")  # fmt: skip
    given = {"cpu": "cpus", "memory": "memory", cfg.gpu_resource: "gpus_per_node"}
    for key in set(given) & {word.partition(":")[0] for word in cfg.resources}:
        raise UserError(f"launcher.resources.{key} is set twice; give launcher.{given[key]}")
    if not 1024 <= cfg.port <= 65535 or cfg.grace_seconds < 1 or (cfg.user is not None and cfg.user < 1):
        raise UserError(f"launcher.port={cfg.port} must be in 1024..65535, launcher.grace_seconds={cfg.grace_seconds} at least 1, "
                        f"launcher.user={cfg.user} at least 1")  # fmt: skip
