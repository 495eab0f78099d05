"""Training from the command line: the same numbers on any number of ranks, what a run leaves behind, and what is refused."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from runs import TINY, config, rows, run

from megatron_scratch.cli import main
from megatron_scratch.data.writer import IndexedWriter


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, through the command line in this process."""
    path = tmp_path_factory.mktemp("runs") / "one"
    assert main(["train", *TINY, f"data.dir={corpus}", f"dir={path}", "train.steps=20", "train.eval_every=10"]) == 0
    return path


def test_what_a_run_leaves_behind(trained: Path) -> None:
    names = {p.name for p in trained.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "ledger.jsonl", "logs", "checkpoints", "loss.png"} <= names
    log = (trained / "logs" / "rank_00000.log").read_text()
    assert "step 20/20" in log and "validation loss" in log
    assert (trained / "tokenizer.json").is_file()
    assert (trained / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert (trained / "config.yaml").stat().st_mode & 0o007 == 0, "not for every user of a cluster"
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in lines if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 21)) and [r["step"] for r in lines if "val_loss" in r] == [10, 20]
    keys = {"step", "time", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "step_seconds", "data_seconds",
            "forward_backward_seconds", "optimizer_seconds", "checkpoint_seconds", "mfu", "mfu_full_attention",
            "memory_gib"}  # fmt: skip
    assert set(steps[0]) == keys
    for row in steps:
        parts = row["data_seconds"] + row["forward_backward_seconds"] + row["optimizer_seconds"]
        assert 0 < parts <= row["step_seconds"], "where a step's time goes; writing of rows is left"
    assert steps[-1]["tokens"] == 20 * 8 * 32 and 0 < steps[-1]["mfu"] < steps[-1]["mfu_full_attention"]
    assert steps[-1]["loss"] < steps[0]["loss"] - 1.0, "it learns"


def test_running_again_has_nothing_to_do(trained: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (trained / "metrics.jsonl").read_text()
    assert main(["train", *TINY, f"data.dir={corpus}", f"dir={trained}", "train.steps=20", "train.eval_every=10"]) == 0
    assert "train.steps" in capsys.readouterr().out
    assert (trained / "metrics.jsonl").read_text() == before


# (world, micro batch, further overrides): every way to cut a global batch of 8
LAYOUTS = [(1, 8), (1, 1), (2, 4), (2, 1), (4, 2)]


@pytest.mark.parametrize("extra", [[], ["data.mask_documents=true", "train.z_loss=1e-3"], ["model.dropout=0.1"]],
                         ids=["plain", "documents", "dropout"])  # fmt: skip
def test_same_numbers_however_the_batch_is_cut(extra: list[str], corpus: Path, tmp_path: Path) -> None:
    cut = [layout for layout in LAYOUTS if not extra or layout in ((1, 1), (2, 1), (4, 2))]
    if "model.dropout=0.1" in extra:  # masks are drawn per microbatch: the same for a given microbatch size
        cut = [(1, 2), (2, 2), (4, 2)]
    # SGD: its update is linear in the gradient, so rounding stays rounding. AdamW divides by sqrt(v): where a gradient is nearly 0
    # its first updates are +-lr by the last bit, and no tolerance can be derived.
    losses = []
    for world, micro in cut:
        path = tmp_path / f"{world}_{micro}"
        options = ["optim=sgd", "optim.lr=0.3", "train.steps=6", f"train.micro_batch_size={micro}"]
        assert run(config(corpus, path, *extra, *options, world=world), world) == [0] * world
        losses.append(rows(path))
    assert losses[0][6][0] < losses[0][1][0] - 0.1, "it moved"
    for other in losses[1:]:
        for step, (loss, norm) in losses[0].items():
            # Gradients are fp32 sums over 256 tokens, each good to about 3e-7; six steps add up, 1e-5 leaves a factor of 5.
            assert other[step][0] == pytest.approx(loss, rel=1e-5), step
            assert other[step][1] == pytest.approx(norm, rel=1e-5), step


def test_bf16_follows_fp32(corpus: Path, tmp_path: Path) -> None:
    for precision in ("fp32", "bf16"):
        assert run(config(corpus, tmp_path / precision, f"precision={precision}", "train.steps=10")) == [0]
    full, half = rows(tmp_path / "fp32"), rows(tmp_path / "bf16")
    assert full != half
    assert all(abs(full[s][0] - half[s][0]) < 0.03 for s in full), "bf16 has 8 bits: 0.4 % of a loss near 5, averaged over tokens"
    manifest = json.loads(next((tmp_path / "bf16" / "checkpoints").glob("*/manifest.json")).read_text())
    assert {t["dtype"] for t in manifest["tensors"].values()} == {"float32"}, "master weights and optimizer state"


@pytest.mark.parametrize("extra", ["optim=sgd", "optim=lion", "optim=muon", "schedule=wsd", "train.ramp.start=4",
                                   "model.norm_place=post", "train.z_loss=0.01"])  # fmt: skip
def test_options_train(extra: str, corpus: Path, tmp_path: Path) -> None:
    more = ["train.ramp.increment=4", "train.ramp.samples=16"] if "ramp" in extra else ["optim.lr=3e-3"] * ("optim" in extra)
    assert run(config(corpus, tmp_path, extra, *more, "train.steps=12")) == [0]
    losses = [loss for loss, _ in rows(tmp_path).values()]
    assert losses[-1] < losses[0]


def test_eval_and_generate(trained: Path, capsys: pytest.CaptureFixture[str], corpus: Path) -> None:
    assert main(["eval", str(trained)]) == 0
    line = capsys.readouterr().out
    assert "perplexity" in line and "bits per byte" in line
    assert main(["eval", str(trained), f"data={corpus}", "split=valid"]) == 0
    assert line == capsys.readouterr().out
    texts = []
    for _ in range(2):
        assert main(["generate", str(trained), "prompt=import o", "max_new_tokens=12", "temperature=0", "stop_at_eod=false"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].startswith("import o") and len(texts[0]) > 9
    assert (
        main(["generate", str(trained / "checkpoints" / "step_00000020"), "prompt=a", "max_new_tokens=5", "top_k=3", "top_p=0.9"])
        == 0
    )
    assert main(["eval", str(trained), "split=train"]) == 2
    for bad in (["max_new_tokens=1000"], ["temperature=-1"], ["top_p=2"], ["temprature=1"]):
        assert main(["generate", str(trained), *bad]) == 2


def test_data_inspect(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "inspect", str(corpus), "document=0"]) == 0 and main(["data", "inspect", str(corpus), "sample=3"]) == 0
    assert "tokens" in capsys.readouterr().out


def test_bench(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *TINY, "bench.steps=2", "bench.warmup=1"]) == 0
    out = capsys.readouterr().out
    assert "tokens/s" in out and "MFU" in out and "backward" in out
    assert main(["bench", *TINY, "launcher.processes=2"]) == 2
    assert main(["bench", *TINY, "train.profile.steps=[1,2]"]) == 2


# ---- refused: one line, exit code 2, nothing damaged


def refused(argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert all(word in err for word in words), err


@pytest.mark.parametrize(("file", "keep"), [("train.bin", 0.5), ("train.bin", 0.0), ("train.idx", 0.5), ("train.idx", 0.0),
                                            ("valid.bin", 0.9),
                                            ("manifest.json", 0.5), ("tokenizer.json", 0.0)])  # fmt: skip
def test_truncated_files(file: str, keep: float, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(corpus, tmp_path / "data")
    content = (tmp_path / "data" / file).read_bytes()
    (tmp_path / "data" / file).write_bytes(content[: int(len(content) * keep)])
    refused(["train", *TINY, f"data.dir={tmp_path / 'data'}", f"dir={tmp_path / 'r'}"], [file], capsys)
    assert not (tmp_path / "r").exists()


def test_vocabulary_too_small(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(["train", *TINY, f"data.dir={corpus}", f"dir={tmp_path / 'r'}", "model.vocab_size=100"], ["100", "257"], capsys)
    with IndexedWriter(tmp_path / "bare", "uint16") as writer:
        writer.add_document(list(range(400)))
    argv = ["train", *TINY, f"data.train={tmp_path / 'bare'}", f"dir={tmp_path / 'r'}", "train.steps=2"]
    refused(argv, ["model.vocab_size"], capsys)
    refused([*argv, "model.vocab_size=300"], ["vocab_size", "300", "bare"], capsys)


def test_existing_megatron_files_train(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "my_text_document", "int32") as writer:
        for i in range(20):
            writer.add_document([(i * 7 + j) % 50 for j in range(40)])
    argv = ["train", *TINY, f"data.train={tmp_path / 'my_text_document'}", f"dir={tmp_path / 'r'}", "train.steps=2"]
    assert main([*argv, "model.vocab_size=50"]) == 0


def test_another_tokenizer(corpus: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(corpus, tmp_path / "data")
    assert main(["data", "prepare", "corpus.input=stdlib", f"corpus.output={tmp_path / 'other'}", "corpus.vocab_size=400",
                 "corpus.max_bytes=100000"]) == 0  # fmt: skip
    other = tmp_path / "other" / "tokenizer.model"
    refused(["train", *TINY, f"data.dir={tmp_path / 'data'}", f"data.tokenizer={other}", f"dir={tmp_path / 'r'}"],
            ["tokenizer", "not the dataset's"], capsys)  # fmt: skip
    refused(["eval", str(trained), f"data={tmp_path / 'other'}"], ["tokenizer", "not the run's"], capsys)


@pytest.mark.parametrize("argv", [["corpus.input=no/such/file"], ["corpus.input=EMPTY"]])
def test_missing_or_empty_corpus(argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").write_text("")
    argv = [word.replace("EMPTY", str(tmp_path / "empty.txt")) for word in argv]
    refused(["data", "prepare", *argv, f"corpus.output={tmp_path / 'out'}"], ["corpus"], capsys)
    refused(["train", f"data.dir={tmp_path / 'out'}", f"dir={tmp_path / 'r'}"], ["data prepare"], capsys)


def test_unwritable_run_directory(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    refused(
        ["train", *TINY, f"data.dir={corpus}", f"dir={tmp_path / 'file' / 'run'}"],
        ["cannot be written", str(tmp_path / "file")],
        capsys,
    )


def test_run_directory_in_use(corpus: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_scratch.train.rundir import RunDir

    before = sorted((p, p.stat().st_mtime_ns) for p in trained.rglob("*") if p.name != ".lock")
    with RunDir(trained).locked():
        refused(
            ["train", *TINY, f"data.dir={corpus}", f"dir={trained}", "train.steps=30"], ["in use", f"process {os.getpid()}"], capsys
        )
    assert before == sorted((p, p.stat().st_mtime_ns) for p in trained.rglob("*") if p.name != ".lock")


def test_divergence_is_a_failure_with_the_old_checkpoints_whole(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    overrides = ["optim=sgd", "optim.lr=1e30", "optim.clip_grad_norm=0", "train.steps=30", "checkpoint.every=1"]
    assert run(config(corpus, tmp_path, *overrides)) == [1]
    assert "not finite" in capfd.readouterr().err
    for folder in (tmp_path / "checkpoints").glob("step_*"):
        assert folder.name.startswith("step_")


# ---- real processes, as a user starts them


def command(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **env})  # fmt: skip


def test_two_processes_and_torchrun(corpus: Path, tmp_path: Path) -> None:
    """The launcher's two processes, and torchrun's, give the one-process run."""
    options = [*TINY, f"data.dir={corpus}", "train.steps=4"]
    assert main(["train", *options, f"dir={tmp_path / 'one'}"]) == 0
    ours = command("-m", "megatron_scratch", "train", *options, f"dir={tmp_path / 'two'}", "launcher.processes=2")
    assert ours.returncode == 0, ours.stderr
    assert "finished 4 steps" in ours.stdout
    theirs = command("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "megatron_scratch", "train",
                     *options, f"dir={tmp_path / 'run'}")  # fmt: skip
    assert theirs.returncode == 0, theirs.stderr
    one, two, three = (rows(tmp_path / name) for name in ("one", "two", "run"))
    assert two == three
    assert all(one[s][0] == pytest.approx(two[s][0], abs=1e-5) for s in one)
    assert "start after step 0 of 4" in (tmp_path / "two" / "logs" / "rank_00001.log").read_text()
    failed = command("-m", "megatron_scratch", "train", *options, f"dir={tmp_path / 'two'}", "launcher.processes=2", "seed=9")
    assert failed.returncode == 2 and "seed is 9" in failed.stderr


def test_the_launcher_passes_signals_on_and_leaves_no_orphans(corpus: Path, tmp_path: Path) -> None:
    """SIGTERM to the launcher: the ranks save and it exits with 75. SIGKILL: the ranks save and end by themselves."""
    argv = [sys.executable, "-m", "megatron_scratch", "train", *TINY, f"data.dir={corpus}", f"dir={tmp_path}", "train.steps=100000",
            "launcher.processes=2"]  # fmt: skip
    for number, code in ((signal.SIGTERM, 75), (signal.SIGKILL, -signal.SIGKILL)):
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env) as launcher:
            assert launcher.stdout is not None
            next(line for line in launcher.stdout if line.startswith("step"))
            launcher.send_signal(number)
            rest = launcher.stdout.read()  # until the last rank has closed it
            assert launcher.wait(60) == code
        assert "stopped: stopped by SIGTERM" in rest
        with open(tmp_path / ".lock") as f:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody holds the run directory any more
    stops = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    saved = [r["step"] for r in stops if r["event"] == "stop"]
    assert len(saved) == 2 and 0 < saved[0] < saved[1]
