"""`launcher=kubernetes`: a resolved config becomes one manifest of a ConfigMap and a JobSet (or a PyTorchJob), a pod a node.

Sources: JobSet's API, jobset.x-k8s.io/v1alpha2 (kubernetes-sigs/jobset, api/jobset/v1alpha2/jobset_types.go); Kubernetes' pages
"Pod failure policy" and "Indexed Job"; kubeflow.org/v1 PyTorchJob (kubeflow/training-operator, pkg/apis/kubeflow.org/v1).

How a pod ends, and what is made of it (docs/containers.md has the table): `launch/host.py` runs in it, so that SIGTERM saves.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import PurePosixPath
from typing import Any

import yaml
from omegaconf import OmegaConf

from megatron_scratch.config import Config
from megatron_scratch.config.launcher import KubernetesConfig, fits
from megatron_scratch.launch.host import GIVEN_UP
from megatron_scratch.util.env import everything
from megatron_scratch.util.errors import RunFailed, UserError
from megatron_scratch.util.exits import BAD_INPUT, OK, STOPPED

CONFIG = "/etc/megatron_scratch"
NAME = "[a-z]([a-z0-9-]*[a-z0-9])?"  # RFC 1035, as of a service, which gets the run's name
ROLE = "node"  # of the one replicated job of a JobSet; the first pod's host name is NAME-node-0-0
LONGEST = 40  # characters of a name: pods are called NAME-node-0-NNNNN-xxxxx, in 63
NOT_FOUND = (126, 127)  # a shell's codes: the command is not in the image
RESTARTS = 10_000  # of a whole JobSet. The first pod counts those without progress, which is what launcher.max_restarts limits

Node = dict[str, Any]


def launch(cfg: Config, world: int) -> int:
    """Print the manifest, or hand it to kubectl.

    Raises:
        UserError: a name or path that cannot be used, no kubectl. RunFailed: kubectl, or the cluster, refuses it.
    """
    manifest = render(cfg)
    if cfg.launcher.print_only:
        print(manifest, end="")
        return OK
    if shutil.which("kubectl") is None:
        raise UserError("kubectl is not on this machine; install it, or give launcher.print_only=true and apply what it prints")
    done = subprocess.run(["kubectl", "apply", "-f", "-"], input=manifest, capture_output=True, text=True, check=False)
    print(done.stdout, end="")
    if done.returncode:
        said = " ".join(line for line in done.stderr.splitlines() if line.strip())
        raise RunFailed(f"kubectl apply refuses the manifest (launcher.print_only=true shows it): {said[:400]}")
    return OK


def render(cfg: Config) -> str:
    """The YAML of the ConfigMap and the job: dumped from plain dicts, so that nothing needs quoting."""
    check_names(cfg)
    documents = [config_map(cfg), {"jobset": job_set, "pytorchjob": pytorch_job}[cfg.launcher.kind](cfg)]
    return yaml.safe_dump_all(documents, sort_keys=False, default_flow_style=False, width=132)


def check_names(cfg: Config) -> None:
    """Refuse names that Kubernetes would, and a run directory that would be lost with the pods."""
    fits("name", cfg.name, NAME, "llama-1b")
    if len(cfg.name) > LONGEST:
        raise UserError(f"name={cfg.name!r} has {len(cfg.name)} characters; at most {LONGEST}, as pods are named after it")
    run, mount = PurePosixPath(cfg.dir), PurePosixPath(cfg.launcher.mount)
    if ".." in run.parts or (run.is_absolute() and not run.is_relative_to(mount)):
        raise UserError(f"dir={cfg.dir} is not on the volume, which pods see as {mount}; give one below it, or a relative one")


def config_map(cfg: Config) -> Node:
    """The resolved config, which every pod reads as a file."""
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata(cfg),
            "data": {"config.yaml": OmegaConf.to_yaml(OmegaConf.structured(cfg))}}  # fmt: skip


def metadata(cfg: Config) -> Node:
    labels = {"app.kubernetes.io/name": "megatron-scratch", "app.kubernetes.io/instance": cfg.name}
    namespace = {"namespace": cfg.launcher.namespace} if cfg.launcher.namespace else {}
    return {"name": cfg.name, **namespace, "labels": labels}


def queued(cfg: Config) -> Node:
    made = metadata(cfg)
    if cfg.launcher.queue:
        made["labels"]["kueue.x-k8s.io/queue-name"] = cfg.launcher.queue
    return made


def job_set(cfg: Config) -> Node:
    """One indexed job of a pod a node, behind a headless service of the JobSet's name.

    A pod that stopped with a checkpoint (75), or that the cluster evicted, is replaced, uncounted. After any other failure the
    ranks of all pods have failed: the JobSet makes all of them anew. Bad input is the end of it, and so is giving up.
    """
    rules = [{"action": "FailJob", "onExitCodes": codes(BAD_INPUT, GIVEN_UP, *NOT_FOUND)},
             {"action": "Ignore", "onExitCodes": codes(STOPPED)},
             {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}]  # fmt: skip
    nodes = cfg.launcher.nodes
    job = {"backoffLimit": 0, "completionMode": "Indexed", "completions": nodes, "parallelism": nodes,
           "podReplacementPolicy": "Failed", "podFailurePolicy": {"rules": rules},
           "template": pod(cfg, "Never")}  # fmt: skip
    spec = {"network": {"enableDNSHostnames": True, "subdomain": cfg.name, "publishNotReadyAddresses": True},
            "failurePolicy": {"maxRestarts": RESTARTS if cfg.launcher.max_restarts else 0,
                              "rules": [{"name": "useless", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]},
            "replicatedJobs": [{"name": ROLE, "replicas": 1, "template": {"spec": job}}]}  # fmt: skip
    return {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": queued(cfg), "spec": spec}


def codes(*values: int) -> Node:
    return {"containerName": "train", "operator": "In", "values": list(values)}


def pytorch_job(cfg: Config) -> Node:
    """One master and `nodes - 1` workers. `ExitCode`: the operator starts a pod again whose exit code is above 127, and no other,
    as often as that happens; so `host.py --retryable` adds 128 to those, and gives up by itself."""
    replicas = {"Master": 1, "Worker": cfg.launcher.nodes - 1}
    specs = {kind: {"replicas": count, "restartPolicy": "ExitCode", "template": pod(cfg, None)}
             for kind, count in replicas.items() if count}  # fmt: skip
    return {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": queued(cfg),
            "spec": {"runPolicy": {"cleanPodPolicy": "Running"}, "pytorchReplicaSpecs": specs}}  # fmt: skip


def pod(cfg: Config, restart: str | None) -> Node:
    """The template of a pod."""
    launcher: KubernetesConfig = cfg.launcher
    spec: Node = {
        **({"restartPolicy": restart} if restart else {}),
        "terminationGracePeriodSeconds": launcher.grace_seconds,
        "automountServiceAccountToken": False,  # training asks nothing of the cluster
        "enableServiceLinks": False,
        "securityContext": {"seccompProfile": {"type": "RuntimeDefault"}, **user(launcher)},
        "containers": [container(cfg)],
        "volumes": volumes(cfg),
    }
    if launcher.node_selector:
        spec["nodeSelector"] = pairs(launcher.node_selector)
    if launcher.tolerations:
        spec["tolerations"] = [toleration(word) for word in launcher.tolerations]
    if launcher.pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in launcher.pull_secrets]
    for key, value in (("priorityClassName", launcher.priority_class), ("serviceAccountName", launcher.service_account)):
        if value:
            spec[key] = value
    return {"metadata": {"labels": metadata(cfg)["labels"]}, "spec": spec}


def user(launcher: KubernetesConfig) -> Node:
    if launcher.user is None:
        return {}
    return {"runAsNonRoot": True, "runAsUser": launcher.user, "runAsGroup": launcher.user, "fsGroup": launcher.user}


def container(cfg: Config) -> Node:
    # Kubeflow's operator looks for a container of the name pytorch, and gives it RANK, the number of the pod
    launcher: KubernetesConfig = cfg.launcher
    jobset = launcher.kind == "jobset"
    number = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    first = f"{cfg.name}-{ROLE}-0-0.{cfg.name}" if jobset else f"{cfg.name}-master-0"
    words = ["--config", f"{CONFIG}/config.yaml", "--node", "$(NODE_RANK)" if jobset else "$(RANK)", "--address", first,
             "--port", str(launcher.port), "--count", *([] if jobset else ["--retryable"])]  # fmt: skip
    return {
        "name": "train" if jobset else "pytorch",
        "image": launcher.image,
        "workingDir": launcher.mount,
        "command": [launcher.python, "-m", "megatron_scratch.launch.host"],
        "args": words,
        "env": [*([{"name": "NODE_RANK", "valueFrom": number}] if jobset else []), *environment(launcher)],
        **({"envFrom": found} if (found := sources(launcher)) else {}),
        "ports": [{"name": "rendezvous" if jobset else "pytorchjob-port", "containerPort": launcher.port, "protocol": "TCP"}],
        "resources": resources(launcher),
        "securityContext": {"allowPrivilegeEscalation": False},
        "volumeMounts": [
            {"name": "work", "mountPath": launcher.mount},
            {"name": "config", "mountPath": CONFIG, "readOnly": True},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }


def environment(launcher: KubernetesConfig) -> list[Node]:
    """Variables of this shell by value, secrets by name."""
    shell = everything()
    if missing := [name for name in launcher.env if name not in shell]:
        raise UserError(f"launcher.env names {missing[0]}, which is not set in this shell; export it, or leave it out")
    made: list[Node] = [{"name": "PYTHONUNBUFFERED", "value": "1"}]
    made += [{"name": name, "value": shell[name].replace("$(", "$$(")} for name in launcher.env]  # Kubernetes would fill it in
    for word in launcher.secrets:
        variable, colon, secret = word.partition(":")
        if colon:
            name, _, key = secret.partition("/")
            made.append({"name": variable, "valueFrom": {"secretKeyRef": {"name": name, "key": key}}})
    return made


def sources(launcher: KubernetesConfig) -> list[Node]:
    return [{"secretRef": {"name": word}} for word in launcher.secrets if ":" not in word]


def resources(launcher: KubernetesConfig) -> Node:
    """Requests equal limits: what a rank has must not depend on its neighbours."""
    gpus = {launcher.gpu_resource: str(launcher.gpus_per_node)} if launcher.gpus else {}
    asked = {"cpu": launcher.cpus, "memory": launcher.memory, **gpus, **pairs(launcher.resources)}
    given = {key: value for key, value in asked.items() if value}
    return {"requests": given, "limits": dict(given)} if given else {}


def pairs(words: list[str]) -> dict[str, str]:
    """KEY:VALUE words as a table."""
    return dict(word.split(":", 1) for word in words)  # type: ignore[misc]


def toleration(word: str) -> Node:
    """KEY[=VALUE][:EFFECT]"""
    found = re.fullmatch(r"([^=:]+)(?:=([^:]*))?(?::(\w+))?", word)
    assert found is not None, word
    key, value, effect = found.groups()
    wanted = {"operator": "Equal", "value": value} if value is not None else {"operator": "Exists"}
    return {"key": key, **wanted, **({"effect": effect} if effect else {})}


def volumes(cfg: Config) -> list[Node]:
    launcher: KubernetesConfig = cfg.launcher
    claim = {"persistentVolumeClaim": {"claimName": launcher.volume}}
    folder = {"hostPath": {"path": launcher.host_path, "type": "Directory"}}
    return [{"name": "work", **(claim if launcher.volume else folder)},
            {"name": "config", "configMap": {"name": cfg.name}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": launcher.shm}}]  # fmt: skip
