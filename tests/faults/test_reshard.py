"""Every layout's checkpoint goes on under every other: the same state to the last bit, the next sample, the same losses.

A layout is a row of data, and a pair of them a test: three steps under the one, load and save again under the other, three more.
By default a ring over all layouts, in which each is once a source and once a target; `--full` runs all ordered pairs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import TINY, config, ledger, rows, run

from megatron_scratch.checkpoint import store
from megatron_scratch.checkpoint.manifest import step_folder, tensor, verify
from megatron_scratch.data.loader import Loader
from megatron_scratch.engine import zero
from megatron_scratch.parallel import Topology
from megatron_scratch.train import session

STEPS, BATCH = 3, 8
RUN = ["model.num_layers=5", "model.dropout=0.1", "schedule=constant", "optim.lr=1e-3", f"train.global_batch_size={BATCH}",
       "train.micro_batch_size=1", "train.eval_batches=1", "checkpoint.keep_last=0"]  # fmt: skip
TOLERANCE = 1e-5  # of a loss of about 5 in fp32, over six steps: twenty roundings

# In the order of the ring: neighbours have as little in common as can be.
PLAIN: dict[str, tuple[int, str]] = {
    "one": (1, ""),
    "dp2 tp2 fsdp": (4, "parallel.tp=2 engine=fsdp"),
    "pp2": (2, "parallel.pp=2"),
    "zero3": (2, "engine=zero3 engine.persist=100"),
    "tp2": (2, "parallel.tp=2"),
    "zero1": (2, "engine=zero1"),
    "dp2 pp2": (4, "parallel.pp=2"),
    "fsdp4": (4, "engine=fsdp"),
    "zbv": (2, "parallel.pp=2 parallel.schedule=zbv_zero_bubble"),
    "hsdp 2x2": (4, "engine=hsdp engine.replicas=2"),
    "tp2 pp2": (4, "parallel.tp=2 parallel.pp=2"),
    "dp2": (2, ""),
    "zero2 tp2": (4, "engine=zero2 parallel.tp=2"),
}
TIED: dict[str, tuple[int, str]] = {
    "one": (1, ""),
    "tp2 pp2": (4, "parallel.tp=2 parallel.pp=2"),
    "zero3": (2, "engine=zero3 engine.persist=100"),
    "zbv": (2, "parallel.pp=2 parallel.schedule=zbv_zero_bubble"),
}
MODELS = {"plain": (PLAIN, "model.tie_embeddings=false"), "tied": (TIED, "model.tie_embeddings=true")}
Trained = Callable[[str, str], Path]


def pairs() -> list[Any]:
    out = []
    for model, (layouts, _) in MODELS.items():
        names = list(layouts)
        ring = set(zip(names, [*names[1:], names[0]], strict=True))
        for a, b in permutations(names, 2):
            marks = () if (a, b) in ring else (pytest.mark.full,)
            out.append(pytest.param(model, a, b, id=f"{model}: {a} -> {b}", marks=marks))
    return out


def go(corpus: Path, path: Path, model: str, layout: str, *more: str) -> Path:
    layouts, tie = MODELS[model]
    world, overrides = layouts[layout]
    cfg = config(corpus, path, *RUN, tie, *overrides.split(), *more, world=world)
    assert run(cfg, world) == [0] * world
    return path


@pytest.fixture(autouse=True)
def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forked ranks write down the samples that they are dealt, and save what they have loaded before they go on."""
    deal, resume = Loader.microbatches, session.resume
    here: list[Any] = []  # this rank's topology and run directory

    def resumed(cfg: Any, run_dir: Any, engine: Any, *rest: Any) -> int | None:
        step = resume(cfg, run_dir, engine, *rest)
        here[:] = [next(x for x in rest if isinstance(x, Topology)), run_dir.path]
        if step is not None:
            store.save(run_dir.path / "moved", step, engine.state(), {}, here[0])
        return step

    def dealt(self: Loader, first: int, size: int) -> list[Any]:
        batches, (topo, path) = list(deal(self, first, size)), here
        with open(path / f"samples_{topo.rank}", "a") as f:
            f.writelines(f"{json.dumps([self.dp_rank, batch.first_sample])}\n" for batch in batches)  # of one sample each
        return batches

    monkeypatch.setattr(session, "resume", resumed)
    monkeypatch.setattr(Loader, "microbatches", dealt)


@pytest.fixture(scope="module", autouse=True)
def deepspeed() -> None:
    """Imported once: the forked ranks inherit it."""
    zero.import_deepspeed("zero1", torch.device("cpu"))


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained")


@pytest.fixture
def trained(corpus: Path, roots: Path) -> Trained:
    """A run of three steps under a layout, made once; `one` goes on to the sixth, never moved: all are compared with it."""

    def at(model: str, layout: str) -> Path:
        path = roots / model / layout.replace(" ", "_")
        if not path.exists():
            steps = 2 * STEPS if layout == "one" else STEPS
            go(corpus, path, model, layout, f"train.steps={steps}", f"checkpoint.every={STEPS}")
        return path

    return at


def samples(run_dir: Path) -> list[int]:
    """The samples that a run was dealt, over its data-parallel ranks; model ranks of one index are dealt the same."""
    by_rank: dict[int, list[list[int]]] = {}
    for path in run_dir.glob("samples_*"):
        dealt = [json.loads(line) for line in path.read_text().splitlines()]
        by_rank.setdefault(dealt[0][0], []).append([k for _, k in dealt])
    assert all(mine == copies[0] for copies in by_rank.values() for mine in copies)
    return sorted(k for copies in by_rank.values() for k in copies[0])


def state(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (saved.dtype, saved.shape, tensor(folder, saved).tobytes()) for name, saved in verify(folder).tensors.items()}


@pytest.mark.parametrize(("model", "a", "b"), pairs())
def test_from_any_layout_to_any_other(model: str, a: str, b: str, corpus: Path, tmp_path: Path, trained: Trained) -> None:
    whole, source = trained(model, "one"), trained(model, a)
    start = step_folder(source / "checkpoints", STEPS)
    go(corpus, tmp_path, model, b, f"checkpoint.resume={start}", f"train.steps={2 * STEPS}")

    before, after = state(start), state(step_folder(tmp_path / "moved", STEPS))
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == [], "bitwise, optimizer state too"
    assert any(name.endswith("embed.weight.exp_avg") for name in before)

    first, then = rows(source), rows(tmp_path)
    losses = {step: loss for step, (loss, _) in [*list(first.items())[:STEPS], *then.items()]}
    assert losses == pytest.approx({step: loss for step, (loss, _) in rows(whole).items()}, abs=TOLERANCE)
    assert samples(source)[: STEPS * BATCH] + samples(tmp_path) == list(range(2 * STEPS * BATCH)), "each exactly once"
    assert "state bitwise; sums in another order: losses to 1e-05 (fp32): " in ledger(tmp_path, "resume")[0]["guarantee"]


def test_the_ring_takes_in_every_layout() -> None:
    ring = [param.values for param in pairs() if not param.marks]
    for model, (layouts, _) in MODELS.items():
        for end in (1, 2):
            assert sorted(p[end] for p in ring if p[0] == model) == sorted(layouts)
    assert "optim.lr=1e-2" in TINY, "which RUN overrides: AdamW turns roundings of small gradients into steps of the size of lr"
