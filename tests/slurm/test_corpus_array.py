"""`data prepare corpus.engine=slurm` on the cluster: the bytes of the local engine, whatever happens to the elements of arrays."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cluster import Cluster, until

from megatron_scratch.util.files import sha256_file

TESTS = Path(__file__).resolve().parents[1]
COMMAND = (sys.executable, "-m", "megatron_scratch")
WHOLE = ["corpus.dedup=exact", "corpus.tokenizer=byte", "corpus.valid_fraction=0.1"]  # of `prepare`
SLURM = ["corpus.engine=slurm", "launcher=slurm", "launcher.env=[GATE]", "launcher.max_restarts=1", "launcher.time=10:00"]
PATCHED = """import sys
from megatron_scratch.launch import corpus_array
corpus_array.largest_array = lambda: 2
from megatron_scratch.cli import main
sys.exit(main(sys.argv[1:]))"""


def texts(folder: Path, files: int) -> Path:
    """Files of 0.7 MB: a task of reading each, with corpus.shard_mb=1. Each begins with a document that names its gate."""
    rng = random.Random(files)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 9))) for _ in range(3000)]
    folder.mkdir()
    for k in range(files):
        documents = [f"@{k} the first document of this file", *(" ".join(rng.choices(words, k=60)) for _ in range(1800))]
        documents += rng.sample(documents[1:], 5)
        (folder / f"{k}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return folder


def words(verb: str, source: Path, output: Path, *more: str) -> list[str]:
    """`clean` has three stages, enough for what happens to elements; `prepare` has all, and takes three times as long."""
    return ["data", verb, "plugins=[corpus_gate]", f"corpus.input={source}", f"corpus.output={output}", "corpus.shard_mb=1",
            "corpus.clean=[newlines,length,gate]", *more]  # fmt: skip


def content(folder: Path) -> dict[str, str]:
    """All files of an output but those that say how long it took."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in (".lock", "report.html")]
    return {str(p.relative_to(folder)): sha256_file(p) for p in files}


class Run:
    """A coordinator on the login node."""

    def __init__(self, cluster: Cluster, folder: Path, *command: str):
        self.gate, self.log = folder, folder / "said"
        env = {**os.environ, **cluster.settings, "GATE": str(folder), "PYTHONPATH": str(TESTS)}
        line = [str(TESTS / "slurm" / "cluster.sh"), "exec", *command]
        with open(self.log, "wb") as f:
            self.process = subprocess.Popen(line, env=env, stdout=f, stderr=subprocess.STDOUT, start_new_session=True)

    def said(self) -> str:
        return self.log.read_text()

    def held(self, *names: str) -> None:
        until(lambda: all((self.gate / name).exists() for name in names), 60, self.said)

    def arrays(self) -> list[int]:
        return [int(number) for number in re.findall(r"array job (\d+), ", self.said())]

    def ends(self, code: int, seconds: float = 150) -> str:
        try:
            assert self.process.wait(seconds) == code, self.said()
        except subprocess.TimeoutExpired:
            raise AssertionError(self.said()) from None
        return self.said()


@contextmanager
def running(cluster: Cluster, folder: Path, *command: str) -> Iterator[Run]:
    run = Run(cluster, folder, *command)
    try:
        yield run
    finally:
        if run.process.poll() is None:
            os.killpg(run.process.pid, signal.SIGKILL)
            run.process.wait()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return texts(tmp_path_factory.mktemp("source") / "in", 4)


def locally(verb: str, source: Path, folder: Path, *more: str) -> dict[str, str]:
    """The local engine's output, in one process."""
    env = {**os.environ, "GATE": str(folder), "PYTHONPATH": str(TESTS)}
    line = [*COMMAND, *words(verb, source, folder / "local", "corpus.workers=1", *more)]
    subprocess.run(line, env=env, check=True, capture_output=True)
    return content(folder / "local")


@pytest.fixture(scope="module")
def oracle(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return locally("clean", source, tmp_path_factory.mktemp("oracle"))


def test_elements_that_are_killed_cancelled_and_lost_with_their_node(cluster: Cluster, source: Path, oracle: dict[str, str],
                                                                     tmp_path: Path) -> None:  # fmt: skip
    """Four elements are held: one process is killed, one element cancelled, one loses its node. The first two are submitted again
    by us, the third is requeued by Slurm."""
    for k in range(3):
        (tmp_path / f"hold{k}").touch()
    with running(cluster, tmp_path, *COMMAND, *words("clean", source, tmp_path / "out", *SLURM)) as run:
        run.held("held0", "held1", "held2")
        (array,) = run.arrays()
        os.kill(int((tmp_path / "held0").read_text()), signal.SIGKILL)
        cluster.login("scancel", f"{array}_1")
        node = cluster.login("squeue", "-h", "-r", "-j", f"{array}_2", "-o", "%N").strip()
        cluster.sh("crash", node)
        for k in range(3):
            (tmp_path / f"held{k}").unlink()
        try:
            said = run.ends(0)
        finally:
            cluster.sh("boot", node)
    assert content(tmp_path / "out") == oracle
    first = [line for line in said.splitlines() if line.startswith("read: ")]
    assert re.search(r"2 tasks are unfinished; task 0 ", "\n".join(first)) and "2 tasks in 2 elements" in said, said


def element_processes(array: int) -> dict[int, int]:
    """Element -> pid of the process that works for it."""
    found = {}
    for path in Path("/proc").iterdir():
        try:
            environment = dict(w.split("=", 1) for w in (path / "environ").read_bytes().decode().split("\0") if "=" in w)
            line = (path / "cmdline").read_bytes()
        except OSError:
            continue
        if environment.get("SLURM_ARRAY_JOB_ID") == str(array) and b"corpus.work" in line:
            found[int(environment["SLURM_ARRAY_TASK_ID"])] = int(path.name)
    return found


def test_all_stages_and_more_tasks_than_an_array_may_have(cluster: Cluster, source: Path, tmp_path: Path) -> None:
    """Four tasks in two elements, one at a time; every file is the local engine's."""
    oracle = locally("prepare", source, tmp_path, *WHOLE)
    line = words("prepare", source, tmp_path / "out", *WHOLE, *SLURM, "corpus.workers=1")
    with running(cluster, tmp_path, sys.executable, "-c", PATCHED, *line) as run:
        said = run.ends(0)
    assert "4 tasks in 2 elements" in said and content(tmp_path / "out") == oracle and {"train.bin", "manifest.json"} <= set(oracle)


def test_bad_input_is_said_and_not_tried_again(cluster: Cluster, tmp_path: Path) -> None:
    source = texts(tmp_path / "in", 2)
    with open(source / "1.jsonl", "a") as f:
        f.write("{oops\n")
    with running(cluster, tmp_path, *COMMAND, *words("clean", source, tmp_path / "out", *SLURM, "corpus.on_bad=stop")) as run:
        said = run.ends(2)
    assert said.strip().splitlines()[-1].startswith(f"error: {source}/1.jsonl:1807: not JSON") and len(run.arrays()) == 1


def test_a_task_that_fails_is_named_and_goes_on_later(
    cluster: Cluster, source: Path, oracle: dict[str, str], tmp_path: Path
) -> None:
    """Submitted twice, then given up with the end of its log; once the cause is gone the same command goes on where it stopped."""
    line = [*COMMAND, *words("clean", source, tmp_path / "out", *SLURM)]
    (tmp_path / "fail2").touch()
    with running(cluster, tmp_path, *line) as run:
        said = run.ends(1)
    assert "failed: read: task 2 is unfinished after 2 arrays" in said and "RuntimeError: made to fail" in said
    assert len(run.arrays()) == 2 and "array job" in said
    (tmp_path / "fail2").unlink()
    with running(cluster, tmp_path, *line) as run:
        assert "1 tasks in 1 elements" in run.ends(0)
    assert content(tmp_path / "out") == oracle


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_coordinator_that_ends_early(number: signal.Signals, cluster: Cluster, source: Path, oracle: dict[str, str],
                                       tmp_path: Path) -> None:  # fmt: skip
    """Its array is cancelled, by itself or (after SIGKILL) by the next one, which goes on."""
    line = [*COMMAND, *words("clean", source, tmp_path / "out", *SLURM)]
    (tmp_path / "hold1").touch()
    with running(cluster, tmp_path, *line) as run:
        run.held("held1")
        (array,) = run.arrays()
        os.killpg(run.process.pid, number)
        run.process.wait(30)
    if number != signal.SIGKILL:
        until(lambda: not element_processes(array), 30, run.said)
        return
    assert element_processes(array)
    with running(cluster, tmp_path, *line) as run:
        said = run.ends(0)
    assert f"cancelling array job {array}" in said and not element_processes(array) and content(tmp_path / "out") == oracle


def test_no_variable_but_those_named_goes_with_an_array(cluster: Cluster, source: Path, tmp_path: Path) -> None:
    canary = "canary-of-the-shell-77ab"
    (tmp_path / "hold0").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", canary)
        run = running(cluster, tmp_path, *COMMAND, *words("clean", source, tmp_path / "out", *SLURM))
        with run as coordinator:
            coordinator.held("held0")
            environment = Path(f"/proc/{(tmp_path / 'held0').read_text()}/environ").read_bytes()
            assert canary.encode() not in environment and b"GATE=" in environment
            found = [p for p in (tmp_path / "out").rglob("*") if p.is_file() and canary.encode() in p.read_bytes()]
            assert not found
            os.killpg(coordinator.process.pid, signal.SIGINT)
            coordinator.process.wait(30)


@pytest.mark.parametrize(("more", "message"), [
    (["launcher.partition=nowhere"], "nvalid partition"),
    (["launcher.nodes=4"], "is for the ranks of `train`"),
    (["launcher=local"], "needs launcher=slurm"),
])  # fmt: skip
def test_what_is_refused(more: list[str], message: str, cluster: Cluster, source: Path, tmp_path: Path) -> None:
    with running(
        cluster, tmp_path, *COMMAND, *words("clean", source, tmp_path / "out", "corpus.engine=slurm", "launcher=slurm", *more)
    ) as run:
        said = run.ends(2)
    assert message in said.strip().splitlines()[-1] and "Traceback" not in said


def test_a_node_without_python_is_left_out(cluster: Cluster, source: Path, oracle: dict[str, str], tmp_path: Path) -> None:
    """It takes all that is submitted, and fails it at once: the second array goes elsewhere, and so do those of later stages."""
    with cluster.broken(1), running(cluster, tmp_path, *COMMAND, *words("clean", source, tmp_path / "out", *SLURM)) as run:
        said = run.ends(0)
    assert f"does not start on {cluster.node(1)}" in said and said.count("are unfinished") == 1
    assert content(tmp_path / "out") == oracle
