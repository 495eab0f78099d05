"""launcher=kubernetes: manifests that the APIs take, with nothing in them that could be read as more than itself."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet

from megatron_scratch.config import Config, compose
from megatron_scratch.config.launcher import KubernetesConfig, check_launcher
from megatron_scratch.launch import host, kubernetes
from megatron_scratch.util.errors import RunFailed, StopRequested, UserError
from megatron_scratch.util.starts import End, Start

KUBERNETES = "1.31"  # of the schema; podFailurePolicy is stable since then
NEEDED = ["launcher=kubernetes", "launcher.image=registry.example/ms:1", "launcher.volume=runs", "name=llama-1b"]
EVERYTHING = ["launcher.nodes=4", "launcher.namespace=team", "launcher.cpus=96", "launcher.memory=1500Gi", "launcher.user=1000",
              "launcher.node_selector=[cloud.google.com/gke-accelerator:nvidia-h100]", "launcher.resources=[rdma/hca:8]",
              "launcher.tolerations=[nvidia.com/gpu:NoSchedule,'dedicated=train:NoExecute']", "launcher.queue=train",
              "launcher.secrets=[wandb,HF_TOKEN:hub/token]", "launcher.pull_secrets=[registry]", "launcher.priority_class=high",
              "launcher.service_account=train", "launcher.grace_seconds=600", "launcher.env=[NCCL_DEBUG]"]  # fmt: skip
CANARY = "canary-5ec7e7"

# From kubeflow.org_pytorchjobs.yaml of kubeflow/training-operator; what it does not list is refused. Pods have their own schema.
REPLICA = {"type": "object", "additionalProperties": False, "required": ["template"],
           "properties": {"replicas": {"type": "integer", "minimum": 1}, "template": {"type": "object"},
                          "restartPolicy": {"enum": ["Always", "OnFailure", "Never", "ExitCode"]}}}  # fmt: skip
PYTORCH_JOB = {
    "type": "object", "additionalProperties": False, "required": ["pytorchReplicaSpecs"],
    "properties": {
        "elasticPolicy": {"type": "object"}, "nprocPerNode": {"type": "string"},
        "pytorchReplicaSpecs": {"type": "object", "additionalProperties": False, "required": ["Master"],
                                "properties": {"Master": REPLICA, "Worker": REPLICA}},
        "runPolicy": {"type": "object", "additionalProperties": False,
                      "properties": {"activeDeadlineSeconds": {"type": "integer"}, "backoffLimit": {"type": "integer"},
                                     "cleanPodPolicy": {"enum": ["None", "Running", "All"]}, "managedBy": {"type": "string"},
                                     "schedulingPolicy": {"type": "object"}, "suspend": {"type": "boolean"},
                                     "ttlSecondsAfterFinished": {"type": "integer"}}}}}  # fmt: skip


def made(*words: str) -> Config:
    cfg = compose.load([*NEEDED, *words])
    check_launcher(cfg.launcher)
    return cfg


def documents(*words: str) -> tuple[dict[str, Any], dict[str, Any]]:
    config, job = yaml.safe_load_all(kubernetes.render(made(*words)))
    return config, job


def pod_of(job: dict[str, Any]) -> dict[str, Any]:
    if job["kind"] == "JobSet":
        return job["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    return job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]


@pytest.mark.parametrize("more", [[], EVERYTHING, ["launcher.gpus=false", "launcher.volume=''", "launcher.host_path=/mnt/a"]])
def test_a_job_set_is_what_its_api_takes(more: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubeflow's model of JobSet drops what it does not know, and kubernetes-validate refuses it: nothing is lost in either."""
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    config, job = documents(*more)
    kubernetes_validate.validate(config, KUBERNETES, strict=True)
    assert JobsetV1alpha2JobSet.from_dict(job).to_dict() == job  # type: ignore[union-attr]
    spec = job["spec"]["replicatedJobs"][0]["template"]["spec"]
    kubernetes_validate.validate(
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": spec}, KUBERNETES, True
    )
    with pytest.raises(kubernetes_validate.ValidationError):  # that check can fail
        kubernetes_validate.validate({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"},
                                      "spec": {**spec, "backOffLimit": 1}}, KUBERNETES, True)  # fmt: skip


@pytest.mark.parametrize("nodes", [1, 4])
def test_a_pytorch_job_is_what_its_api_takes(nodes: int) -> None:
    _, job = documents("launcher.kind=pytorchjob", f"launcher.nodes={nodes}")
    jsonschema.validate(job["spec"], PYTORCH_JOB)
    specs = job["spec"]["pytorchReplicaSpecs"]
    assert [spec["replicas"] for spec in specs.values()] == ([1, nodes - 1] if nodes > 1 else [1])
    for spec in specs.values():
        kubernetes_validate.validate({"apiVersion": "v1", "kind": "Pod", **spec["template"]}, KUBERNETES, strict=True)
        assert [container["name"] for container in spec["template"]["spec"]["containers"]] == ["pytorch"]
    words = pod_of(job)["spec"]["containers"][0]["args"]
    assert words[words.index("--node") + 1] == "$(RANK)" and "llama-1b-master-0" in words and "--retryable" in words


def test_pods_meet_at_the_first_one_and_know_their_number() -> None:
    """JobSet names its pods JOBSET-JOB-0-INDEX, and its service as the JobSet."""
    _, job = documents("launcher.nodes=4", "launcher.port=29600")
    spec = job["spec"]["replicatedJobs"][0]
    container = spec["template"]["spec"]["template"]["spec"]["containers"][0]
    address = f"{job['metadata']['name']}-{spec['name']}-0-0.{job['spec']['network']['subdomain']}"
    assert container["args"][container["args"].index("--address") + 1] == address
    assert container["args"][container["args"].index("--port") + 1] == "29600"
    assert container["env"][0]["name"] == "NODE_RANK" and "$(NODE_RANK)" in container["args"]
    assert "job-completion-index" in container["env"][0]["valueFrom"]["fieldRef"]["fieldPath"]
    assert spec["template"]["spec"]["completions"] == spec["template"]["spec"]["parallelism"] == 4
    assert spec["template"]["spec"]["completionMode"] == "Indexed"
    host.parser().parse_intermixed_args([word.replace("$(NODE_RANK)", "3") for word in container["args"]])


def test_what_an_exit_code_leads_to() -> None:
    """Bad input and giving up end it, a stop with a checkpoint is not counted: the first rule that matches decides."""
    _, job = documents("launcher.max_restarts=5")
    spec = job["spec"]["replicatedJobs"][0]["template"]["spec"]
    rules = [(rule["action"], rule.get("onExitCodes", {}).get("values")) for rule in spec["podFailurePolicy"]["rules"]]
    assert rules == [("FailJob", [2, 3, 126, 127]), ("Ignore", [75]), ("Ignore", None)]
    assert {rule["onExitCodes"]["containerName"] for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule} == {
        container["name"] for container in spec["template"]["spec"]["containers"]
    }
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # Kubernetes asks for it with a podFailurePolicy
    assert job["spec"]["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert documents("launcher.max_restarts=0")[1]["spec"]["failurePolicy"]["maxRestarts"] == 0


def test_the_config_is_the_one_that_was_given(tmp_path: Path) -> None:
    config, job = documents("train.steps=77")
    path = tmp_path / "config.yaml"
    path.write_text(config["data"]["config.yaml"])
    assert compose.load_file(path) == made("train.steps=77")
    mounted = next(m for m in pod_of(job)["spec"]["containers"][0]["volumeMounts"] if m["name"] == "config")
    assert f"{mounted['mountPath']}/config.yaml" in pod_of(job)["spec"]["containers"][0]["args"]


def test_secrets_are_named_never_written(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY", "PLAIN"):
        monkeypatch.setenv(name, CANARY)
    monkeypatch.setenv("NCCL_DEBUG", "$(HF_TOKEN)")
    text = kubernetes.render(made("launcher.secrets=[wandb,HF_TOKEN:hub/token]", "launcher.env=[NCCL_DEBUG]"))
    assert CANARY not in text
    container = pod_of(list(yaml.safe_load_all(text))[1])["spec"]["containers"][0]
    assert container["envFrom"] == [{"secretRef": {"name": "wandb"}}]
    assert container["env"][-1] == {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}
    assert {"name": "NCCL_DEBUG", "value": "$$(HF_TOKEN)"} in container["env"]  # not filled in by Kubernetes
    with pytest.raises(UserError, match="launcher.secrets"):
        made("launcher.env=[HF_TOKEN]")
    with pytest.raises(UserError, match="not set in this shell"):
        kubernetes.render(made("launcher.env=[NOT_THERE_AT_ALL]"))


@pytest.mark.parametrize(("words", "toleration"), [
    ("a/b", {"key": "a/b", "operator": "Exists"}), ("a:NoSchedule", {"key": "a", "operator": "Exists", "effect": "NoSchedule"}),
    ("a=b:NoExecute", {"key": "a", "operator": "Equal", "value": "b", "effect": "NoExecute"})])  # fmt: skip
def test_tolerations_as_kubectl_taint_writes_them(words: str, toleration: dict[str, str]) -> None:
    assert kubernetes.toleration(words) == toleration


HOSTILE = ["a;touch CANARY", "$(touch CANARY)", "a b", "a\nkind: Pod", "a: b", "{a: b}", "é", "A\x00", "x" * 5000, "-a", "a/../b c"]
TEXTS = ["namespace", "volume", "host_path", "mount", "cpus", "memory", "shm", "gpu_resource", "queue", "priority_class",
         "service_account", "python", "image"]  # fmt: skip
LISTS = ["node_selector", "resources", "tolerations", "pull_secrets", "env", "secrets"]


@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize("field", TEXTS + LISTS)
def test_hostile_fields_are_refused(field: str, value: str) -> None:
    cfg = KubernetesConfig(image="ms:1", volume="" if field == "host_path" else "runs")
    setattr(cfg, field, [value] if field in LISTS else value)
    if field in ("mount", "host_path", "python", "image") and value == "-a":
        return  # a relative path, refused below, and a word that no shell reads
    with pytest.raises(UserError) as error:
        check_launcher(cfg)
    assert "\n" not in str(error.value) and f"launcher.{field}" in str(error.value)


@pytest.mark.parametrize(("words", "said"), [
    (["launcher.image=''"], "launcher.image is not given"), (["launcher.volume=''"], "lost with the pods"),
    (["launcher.host_path=/a"], "give one of them"), (["launcher.kind=job"], "pytorchjob"), (["launcher.user=0"], "launcher.user"),
    (["launcher.resources=[nvidia.com/gpu:4]"], "launcher.gpus_per_node"), (["launcher.secrets=[A:b]"], "VARIABLE:SECRET/KEY"),
    (["launcher.processes=2"], "launcher.nodes"), (["launcher.port=80"], "launcher.port"),
    (["launcher.mount=work"], "not absolute")])  # fmt: skip
def test_what_a_pod_cannot_do_without_and_what_has_no_effect(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        made(*words)


@pytest.mark.parametrize(("words", "said"), [
    (["name=Llama_1B"], "name="), (["name=1b"], "name="), (["name=" + "a" * 41], "at most 40"), (["dir=/elsewhere/run"], "volume"),
    (["dir=../run"], "volume")])  # fmt: skip
def test_names_and_folders_that_pods_cannot_have(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        kubernetes.render(made(*words))


def kubectl(folder: Path, code: int) -> None:
    """A stand-in that keeps what it was given."""
    script = folder / "kubectl"
    script.write_text(
        f'#!/bin/sh\ncat > "{folder}/given"\necho "$@" > "{folder}/words"\necho one line\necho no such thing >&2\nexit {code}\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)


def test_kubectl_gets_the_manifest_on_its_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kubectl(tmp_path, 0)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert kubernetes.launch(made(), 8) == 0
    assert (tmp_path / "given").read_text() == kubernetes.render(made())
    assert (tmp_path / "words").read_text() == "apply -f -\n"
    kubectl(tmp_path, 1)
    with pytest.raises(RunFailed, match="no such thing"):
        kubernetes.launch(made(), 8)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(UserError, match="kubectl is not on this machine"):
        kubernetes.launch(made(), 8)


# ---- what runs in a pod


def ends(*codes: int) -> list[End]:
    return [End(rank, "h", code, f"word {rank}") for rank, code in enumerate(codes)]


@pytest.mark.parametrize(("found", "code", "raised"), [
    (ends(0, 0), 0, None), (ends(75, 75), 0, StopRequested), (ends(75, 0), 0, StopRequested), (ends(2), 1, UserError),
    (ends(75, 1), 1, RunFailed), (ends(0), 1, RunFailed), (ends(), -9, RunFailed), (ends(0, 0), 1, None),
    (ends(0, 1), 1, RunFailed), (ends(75, 75), 1, StopRequested), (ends(75), 1, RunFailed)])  # fmt: skip
def test_the_exit_code_is_that_of_the_ranks(found: list[End], code: int, raised: type[Exception] | None) -> None:
    """A stop counts only if every rank of this machine has saved, success only if every one has finished."""
    if raised is None:
        return host.judge(found, 2, code)
    with pytest.raises(raised):
        host.judge(found, 2, code)


@pytest.mark.parametrize(("words", "code", "expected"), [([], 75, 75), (["--retryable"], 75, 203), (["--retryable"], 1, 129),
                                                         (["--retryable"], 2, 2), ([], 1, 1)])  # fmt: skip
def test_exit_codes_for_kubeflow(words: list[str], code: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    raised = {75: StopRequested, 1: RunFailed, 2: UserError}[code]

    def run(args: object) -> None:
        raise raised("why")

    monkeypatch.setattr(host, "run", run)
    assert host.main(words) == expected


def test_a_pod_gives_up_when_starts_come_to_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """For good: the JobSet ends with exit code 3. A start after which there is a new checkpoint begins the count anew."""
    cfg = made(f"dir={tmp_path / 'run'}", "launcher.max_restarts=1", "launcher.nodes=2")
    args = host.parser().parse_args(["--count", "--node", "0"])
    assert [host.claim(args, cfg, tmp_path).number for _ in range(2)] == [1, 2]
    with pytest.raises(host.GivenUp, match="2 starts in a row"):
        host.claim(args, cfg, tmp_path)
    newest = tmp_path / "run" / "checkpoints" / "step_00000005"
    newest.mkdir(parents=True)
    (newest / "manifest.json").write_text(json.dumps({"step": 5}))
    assert isinstance(host.claim(args, cfg, tmp_path), Start)
    others = host.parser().parse_args(["--count", "--node", "1"])
    assert [host.claim(others, cfg, tmp_path / str(n)).folder.is_relative_to(tmp_path / str(n)) for n in range(3)] == [True] * 3
    compose.save(cfg, tmp_path / "config.yaml")
    for _ in range(2):
        Start.claim(tmp_path / "run" / "jobs" / "kubernetes" / "starts", 5)
    assert host.main(["--config", str(tmp_path / "config.yaml"), "--count"]) == 3
    assert "giving up" in capfd.readouterr().err
