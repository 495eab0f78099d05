"""The launcher section: what a shell, sbatch or YAML could misread is refused, and so is what could have no effect."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_scratch.config import compose
from megatron_scratch.config.launcher import SlurmConfig, check_launcher, seconds
from megatron_scratch.util.errors import UserError

HOSTILE = ["a;touch CANARY", "$(touch CANARY)", "`touch CANARY`", "a b", "a\n#SBATCH --wrap=touch", "--wrap=x y", "a'b", 'a"b',
           "a\\b", "a%j", "", "é", "a\x00b", "x" * 5000]  # fmt: skip
FIELDS = ["partition", "account", "qos", "constraint", "reservation", "exclude", "time", "mem_per_node", "setup", "secrets_file",
          "python", "image"]  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", [word for word in HOSTILE if word])
def test_what_a_shell_could_misread_is_refused(field: str, value: str) -> None:
    cfg = SlurmConfig(**{field: value}, **({"container": "pyxis"} if field == "image" else {}))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=f"launcher.{field}") as error:
        check_launcher(cfg)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("cfg", [SlurmConfig(sbatch={"comment": word}) for word in HOSTILE if word and "%" not in word]
                         + [SlurmConfig(sbatch={word: "x"}) for word in HOSTILE] + [SlurmConfig(mounts=[word]) for word in HOSTILE]
                         + [SlurmConfig(env=[word]) for word in HOSTILE])  # fmt: skip
def test_lists_and_tables_too(cfg: SlurmConfig) -> None:
    with pytest.raises(UserError):
        check_launcher(cfg)


@pytest.mark.parametrize(
    "flag", ["wrap", "export", "output", "job-name", "dependency", "array", "exclusive", "time", "nodes", "signal"]
)
def test_what_the_script_sets_itself_is_not_set_twice(flag: str) -> None:
    with pytest.raises(UserError, match="the script sets it"):
        check_launcher(SlurmConfig(sbatch={flag: "x"}))


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "my_credentials"])
def test_a_secret_is_not_carried_in_a_script(name: str) -> None:
    with pytest.raises(UserError, match="secrets_file"):
        check_launcher(SlurmConfig(env=[name]))


NO_EFFECT = [
    (dict(spare_nodes=1, preflight=False), "launcher.preflight=true"),
    (dict(agent_restarts=1, mode="srun"), "launcher.mode=torchrun"),
    (dict(container="pyxis"), "give both"), (dict(image="a"), "give both"), (dict(mounts=["/a:/b"]), "launcher.container"),
    (dict(processes=2), "launcher.nodes"), (dict(time="5:00", signal_seconds=300), "launcher.signal_seconds"),
    (dict(mode="mpi"), "srun"),
    (dict(cpus_per_gpu=4, gpus=False), "launcher.gpus=true"),
    (dict(nodes=0), "at least 1"), (dict(chain=0), "at least 1"), (dict(max_restarts=-1), "at least 0"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "said"), NO_EFFECT, ids=[str(fields) for fields, _ in NO_EFFECT])
def test_an_option_that_cannot_take_effect_is_refused(fields: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_launcher(SlurmConfig(**fields))


def test_what_clusters_write_is_taken() -> None:
    check_launcher(SlurmConfig(time="1-12", partition="gpu,gpu-long", account="proj.a", constraint="h100&(rack1|rack2)", qos="high",
                               exclude="node[03-05],gpu7", mem_per_node="0", sbatch={"comment": "try:2", "nice": "100"},
                               container="pyxis", image="nvcr.io#nvidia/pytorch:26.01-py3", mounts=["/data:/data:ro"],
                               env=["NCCL_IB_HCA"], setup="/home/me/modules.sh", spare_nodes=1, signal_seconds=600))  # fmt: skip


@pytest.mark.parametrize(
    ("time", "s"), [("90", 5400), ("1:30", 90), ("1:00:00", 3600), ("2-3", 183600), ("2-3:04", 183840), ("2-03:04:05", 183845)]
)
def test_time(time: str, s: int) -> None:
    assert seconds(time) == s


def test_a_launcher_has_its_own_keys(tmp_path: Path) -> None:
    cfg = compose.load(["launcher=slurm", "launcher.nodes=2", "+launcher.sbatch.comment=x"])
    assert cfg.launcher == SlurmConfig(nodes=2, sbatch={"comment": "x"})
    compose.save(cfg, tmp_path / "config.yaml")
    assert compose.load_file(tmp_path / "config.yaml").launcher == cfg.launcher
    with pytest.raises(UserError, match="launcher.nodes"):
        compose.load(["launcher.nodes=2"])


def test_options_of_sbatch_are_keys_of_the_users_own() -> None:
    both = ["launcher.sbatch.nice=100", "launcher.sbatch={begin: 'now+3', gpu-freq: high}"]
    assert [compose.load(["launcher=slurm", word]).launcher.sbatch for word in both] == [
        {"nice": "100"}, {"begin": "now+3", "gpu-freq": "high"}]  # fmt: skip
    with pytest.raises(UserError, match="launcher.sbatsch"):
        compose.load(["launcher=slurm", "launcher.sbatsch.nice=100"])


def test_what_hydra_would_read_as_a_list_is_told_how_to_be_written() -> None:
    with pytest.raises(UserError, match="quotes"):
        compose.load(["launcher=slurm", "launcher.exclude=node[1-3]"])
    assert compose.load(["launcher=slurm", "launcher.exclude='node[1-3]'"]).launcher.exclude == "node[1-3]"
