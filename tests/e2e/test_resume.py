"""Nothing is lost: a run that is killed anywhere goes on by itself, bitwise equal to a run that never was."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from runs import config, kill_after, ledger, rows, run, weights

STEPS, EVERY = 8, 3
LONG = ["train.steps=8", f"checkpoint.every={EVERY}", "model.dropout=0.1", "train.eval_every=4"]
OPTIMIZERS = ["adamw", "muon"]


@pytest.fixture(scope="module")
def uninterrupted(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], Path]:
    done = {}
    for world in (1, 2):
        for optim in OPTIMIZERS if world == 1 else OPTIMIZERS[:1]:
            path = tmp_path_factory.mktemp("whole") / f"{optim}{world}"
            assert run(config(corpus, path, *LONG, f"optim={optim}", world=world), world) == [0] * world
            done[world, optim] = path
    return done


def test_killed_with_another_optimizer(corpus: Path, tmp_path: Path, uninterrupted: dict[tuple[int, str], Path]) -> None:
    """Muon's state beside AdamW's; what else may happen to a run is tests/faults/test_kills.py's."""
    cfg = config(corpus, tmp_path / "r", *LONG, "optim=muon")
    assert run(cfg, 1, kill_after("megatron_scratch.engine.ddp:DDPEngine.update", 5)) == [-signal.SIGKILL]
    assert run(cfg) == [0]
    assert rows(tmp_path / "r") == rows(uninterrupted[1, "muon"]), "every step once, with the same loss and norm to the last bit"
    assert weights(tmp_path / "r", STEPS) == weights(uninterrupted[1, "muon"], STEPS)


@pytest.mark.parametrize("world", [1, 2])
def test_stopped_by_a_signal(world: int, corpus: Path, tmp_path: Path, uninterrupted: dict[tuple[int, str], Path]) -> None:
    """SIGTERM to one rank: all save at the same step and exit with 75; the next start goes on, bitwise."""
    cfg = config(corpus, tmp_path / "r", *LONG, world=world)

    def soon() -> None:
        import megatron_scratch.train.step as module

        whole, count = module.TrainStep.__call__, [0]

        def call(self: object, step: int) -> object:
            count[0] += 1
            if count[0] == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            return whole(self, step)  # type: ignore[arg-type]

        module.TrainStep.__call__ = call  # type: ignore[method-assign]

    assert run(cfg, world, soon) == [75] * world
    assert ledger(tmp_path / "r", "stop")[0]["step"] == 5
    assert run(cfg, world) == [0] * world
    assert rows(tmp_path / "r") == rows(uninterrupted[world, "adamw"])
    assert weights(tmp_path / "r", STEPS) == weights(uninterrupted[world, "adamw"], STEPS)


FOUR = {"ddp": [], "fsdp": [], "hsdp": ["engine.replicas=2"], "zero1": [], "zero2": [], "zero3": []}


@pytest.mark.parametrize("engine", [e if e in ("ddp", "fsdp") else pytest.param(e, marks=pytest.mark.full) for e in FOUR])
def test_four_ranks_add_up_in_the_same_order(engine: str, corpus: Path, tmp_path: Path) -> None:
    """a + b is b + a, but the order in which four numbers are added up shows: a first step must have that of a later one."""
    words = [*LONG, f"engine={engine}", *FOUR[engine]]
    assert run(config(corpus, tmp_path / "whole", *words, world=4), 4) == [0] * 4
    cfg = config(corpus, tmp_path / "r", *words, world=4)
    assert -signal.SIGKILL in run(cfg, 4, kill_after("megatron_scratch.train.step:TrainStep.gradients", 5))
    assert run(cfg, 4) == [0] * 4
    assert rows(tmp_path / "r") == rows(tmp_path / "whole")
    assert weights(tmp_path / "r", STEPS) == weights(tmp_path / "whole", STEPS)


def test_a_corrupt_checkpoint_is_passed_over(corpus: Path, tmp_path: Path, uninterrupted: dict[tuple[int, str], Path]) -> None:
    cfg = config(corpus, tmp_path / "r", *LONG, "checkpoint.keep_last=0")
    run(cfg, 1, kill_after("megatron_scratch.engine.ddp:DDPEngine.update", 8))
    damaged = next((tmp_path / "r" / "checkpoints" / "step_00000006").glob("*.safetensors"))
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    assert run(cfg) == [0]
    assert weights(tmp_path / "r", STEPS) == weights(uninterrupted[1, "adamw"], STEPS)
    assert (tmp_path / "r" / "checkpoints" / "step_00000006" / "manifest.json").is_file(), "its step was saved again"
    assert (tmp_path / "r" / "checkpoints" / "corrupt_step_00000006" / damaged.name).read_bytes() == content, "nothing is deleted"
    assert str(damaged) in ledger(tmp_path / "r", "corrupt_checkpoint")[0]["problem"]
    assert ledger(tmp_path / "r", "resume")[0]["step"] == 3


def test_another_number_of_ranks_goes_on_at_the_same_sample(
    corpus: Path, tmp_path: Path, uninterrupted: dict[tuple[int, str], Path]
) -> None:
    """Stop on two ranks, go on with one and with four: fp32 sums in another order, nothing else (dropout is by sample)."""
    for world in (1, 4):
        path = tmp_path / str(world)
        two = config(corpus, path, *LONG, "train.steps=3", "schedule.steps=8", world=2)
        assert run(two, 2) == [0, 0]
        assert run(config(corpus, path, *LONG, "schedule.steps=8", world=world), world) == [0] * world
        whole = rows(uninterrupted[1, "adamw"])
        for step, (loss, norm) in rows(path).items():
            assert loss == pytest.approx(whole[step][0], abs=2e-5) and norm == pytest.approx(whole[step][1], rel=1e-3), step


@pytest.mark.parametrize(("change", "words"), [("seed=7", "seed is 7"), ("model.ffn_size=96", "model.ffn_size is 96"),
                                               ("train.seq_len=16", "seq_len is 16"), ("optim=lion", "optim is 'lion'"),
                                               ("data.order=contiguous", "contiguous"),
                                               ("checkpoint.resume=never", "never")])  # fmt: skip
def test_another_run_is_refused(change: str, words: str, corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(config(corpus, tmp_path / "r", "train.steps=2")) == [0]
    before = sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "r" / "checkpoints").rglob("step_*/*"))
    assert run(config(corpus, tmp_path / "r", "train.steps=4", change)) == [2]
    assert words in capfd.readouterr().err
    assert before == sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "r" / "checkpoints").rglob("step_*/*"))


def test_from_another_runs_checkpoint(corpus: Path, tmp_path: Path) -> None:
    assert run(config(corpus, tmp_path / "a", "train.steps=2")) == [0]
    assert run(config(corpus, tmp_path / "b", "train.steps=4", f"checkpoint.resume={tmp_path / 'a'}")) == [0]
    assert sorted(rows(tmp_path / "b")) == [3, 4]
    assert run(config(corpus, tmp_path / "b", "train.steps=5", f"checkpoint.resume={tmp_path / 'a'}")) == [0]
    assert ledger(tmp_path / "b", "resume")[-1]["step"] == 4, "its own checkpoints come first"


def test_a_changed_batch_size_loses_no_sample(corpus: Path, tmp_path: Path) -> None:
    assert run(config(corpus, tmp_path / "r", "train.steps=3")) == [0]
    assert run(config(corpus, tmp_path / "r", "train.steps=5", "train.global_batch_size=4")) == [0]
    assert ledger(tmp_path / "r", "resume")[0]["samples"] == 24
    manifest = (tmp_path / "r" / "checkpoints" / "step_00000005" / "manifest.json").read_text()
    assert '"samples": 32' in manifest


def _disk_full() -> None:
    """From the second checkpoint on, this rank cannot write."""
    from megatron_scratch.checkpoint import store

    whole, calls = store.write_file, [0]

    def write(*args: object) -> object:
        calls[0] += 1
        if calls[0] > 1:
            raise OSError(28, "No space left on device")
        return whole(*args)  # type: ignore[arg-type]

    store.write_file = write  # type: ignore[assignment]


@pytest.mark.parametrize("world", [1, 2])
def test_a_full_disk_is_a_failure_in_one_line_and_costs_nothing(
    world: int, corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], uninterrupted: dict[tuple[int, str], Path]
) -> None:
    cfg = config(corpus, tmp_path / "r", *LONG, world=world)
    assert run(cfg, world, _disk_full) == [1] * world
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("failed")]
    assert len(lines) == world and all("the checkpoint of step 6" in line and "No space left" in line for line in lines)
    assert run(cfg, world) == [0] * world
    assert weights(tmp_path / "r", STEPS) == weights(uninterrupted[world, "adamw"], STEPS)


@pytest.mark.parametrize("world", [1, 2])
def test_a_corrupt_checkpoint_named_by_hand(world: int, corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """All ranks hear of what one of them has found, and end at once."""
    assert run(config(corpus, tmp_path / "a", "train.steps=2")) == [0]
    folder = tmp_path / "a" / "checkpoints" / "step_00000002"
    damaged = next(folder.glob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    cfg = config(corpus, tmp_path / "b", "train.steps=4", f"checkpoint.resume={folder}", world=world)
    assert run(cfg, world) == [1] * world
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("failed")]
    assert len(lines) == world and all(str(damaged) in line for line in lines)
