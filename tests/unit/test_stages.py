"""Stages of a pipeline: balanced by cost or given by hand, laid out as the schedule wants them, refused where they cannot be."""

from __future__ import annotations

from itertools import combinations

import pytest
from refused import refused_in_one_line

from megatron_scratch.cli import main
from megatron_scratch.config import check, compose
from megatron_scratch.config.pipeline import balance, owned_stages, owner, schedule_of
from megatron_scratch.config.shrink import shrink, small_world, vet
from megatron_scratch.models.flops import layers_of_stages
from megatron_scratch.train.build import stage_layers


def best(layers: int, stages: int, before: float, after: float) -> float:
    """The least possible cost of the dearest stage, by trying every cut."""
    found = []
    for cuts in combinations(range(1, layers), stages - 1):
        sizes = [b - a for a, b in zip((0, *cuts), (*cuts, layers), strict=True)]
        costs = [float(size) for size in sizes]
        costs[0] += before
        costs[-1] += after
        found.append(max(costs))
    return min(found)


@pytest.mark.parametrize("after", [0.0, 0.7, 3.2])
@pytest.mark.parametrize(("layers", "stages"), [(2, 2), (7, 3), (9, 4), (8, 8), (10, 3)])
def test_no_cut_is_better(layers: int, stages: int, after: float) -> None:
    sizes = balance(layers, stages, 1.0, 0.3, after)
    assert sum(sizes) == layers and len(sizes) == stages and min(sizes) >= 1
    costs = [size + (0.3 if i == 0 else 0.0) + (after if i == stages - 1 else 0.0) for i, size in enumerate(sizes)]
    assert max(costs) == pytest.approx(best(layers, stages, 0.3, after))


def test_the_head_of_a_large_vocabulary_weighs_layers() -> None:
    small = compose.load(["model=llama3_2_1b", "model.vocab_size=1000"]).model
    large = compose.load(["model=llama3_2_1b"]).model
    assert layers_of_stages(small, 4096, 4) == (4, 4, 4, 4)
    assert layers_of_stages(large, 4096, 4)[-1] <= 2, "128,256 ids x 2048: 4 layers' worth"
    sizes = layers_of_stages(compose.load(["model=llama3_405b"]).model, 8192, 16)
    assert (sizes[0], sizes[-1], sum(sizes), max(sizes)) == (7, 7, 126, 8), "126 layers: the two ends have less to do, as published"


def test_stages_lie_in_a_loop_or_in_a_v() -> None:
    loop, v = (schedule_of(compose.load([f"parallel.schedule={name}"]).parallel) for name in ("interleaved_1f1b", "dualpipev"))
    assert [owned_stages(loop, 4, 2, rank) for rank in range(4)] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert [owned_stages(v, 4, 2, rank) for rank in range(4)] == [[0, 7], [1, 6], [2, 5], [3, 4]]
    assert [owner(v, 4, 2, stage) for stage in range(8)] == [0, 1, 2, 3, 3, 2, 1, 0]


def test_given_by_hand() -> None:
    cfg = compose.load(["model.num_layers=7", "model.vocab_size=64", "parallel.pp=2", "parallel.stages=[5,2]"])
    assert stage_layers(cfg) == [range(0, 5), range(5, 7)]


PP = ["parallel.pp=2", "train.micro_batch_size=1", "model.num_layers=4"]

# world, overrides, words that the refusal must contain
REFUSED = [
    (1, ["parallel.pp=0"], ["parallel.pp=0", "at least 1"]),
    (1, ["parallel.schedule=gpipe"], ["parallel.schedule=gpipe has no effect with parallel.pp=1"]),
    (1, ["parallel.virtual_stages=2"], ["parallel.virtual_stages=2 has no effect with parallel.pp=1"]),
    (1, ["parallel.stages=[2]"], ["parallel.stages=[2] has no effect with parallel.pp=1"]),
    (3, PP, ["not divisible", "= 2"]),
    (2, [*PP, "parallel.schedule=1f1p"], ["parallel.schedule='1f1p'", "did you mean '1f1b'"]),
    (2, [*PP, "parallel.virtual_stages=0"], ["parallel.virtual_stages=0", "at least 1"]),
    (2, [*PP, "parallel.virtual_stages=2"], ["parallel.virtual_stages=2 with parallel.schedule=1f1b", "allowed: 1"]),
    (2, [*PP, "parallel.schedule=interleaved_1f1b", "parallel.virtual_stages=1"], ["virtual_stages=1", "allowed: 2 or more"]),
    (2, [*PP, "parallel.schedule=zbv_zero_bubble", "parallel.virtual_stages=3"], ["virtual_stages=3", "allowed: 2"]),
    (2, [*PP, "model.num_layers=1"], ["model.num_layers=1", "2 stages"]),
    (2, [*PP, "parallel.schedule=dualpipev", "model.num_layers=3"], ["model.num_layers=3", "virtual stages 2", "4 stages"]),
    (2, [*PP, "parallel.stages=[4]"], ["parallel.stages=[4]", "2 numbers", "model.num_layers=4"]),
    (2, [*PP, "parallel.stages=[4,0]"], ["parallel.stages=[4, 0]", "at least 1"]),
    (2, [*PP, "parallel.stages=[3,2]"], ["add up to model.num_layers=4"]),
    (2, [*PP, "train.micro_batch_size=16"], ["1 microbatches", "parallel.schedule=1f1b", "needs 2 at least"]),
    (2, [*PP, "parallel.schedule=dualpipev", "train.micro_batch_size=8"], ["2 microbatches", "needs 4 at least"]),
    (4, ["parallel.pp=4", "parallel.schedule=interleaved_1f1b", "train.micro_batch_size=1", "train.global_batch_size=9",
         "model.num_layers=8"], ["9 microbatches", "2 equal rounds", "[5, 6, 7, 8, 10, 12]"]),
    (2, [*PP, "train.ramp.start=1", "train.ramp.increment=3", "train.ramp.samples=9"], ["a batch of 1 makes 1", "2 at least"]),
    (2, [*PP, "parallel.schedule=zbv_zero_bubble", "train.compile=true"], ["train.compile=true", "zbv_zero_bubble", "for later"]),
    (4, [*PP, "parallel.schedule=zbv_zero_bubble", "parallel.overlap=true", "parallel.tp=2"], ["parallel.overlap=true", "later"]),
    (4, [*PP, "engine=zero2"], ["engine=zero2 with parallel.pp=2", "engine=ddp, fsdp or hsdp"]),
]  # fmt: skip


@pytest.mark.parametrize(("world", "overrides", "words"), REFUSED, ids=[" ".join(r[1]) for r in REFUSED])
def test_refused_in_one_line(world: int, overrides: list[str], words: list[str]) -> None:
    refused_in_one_line(world, overrides, words)


@pytest.mark.parametrize("verb", ["train", "parity"])
def test_exit_code_2_before_anything_starts(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, *PP, "parallel.stages=[3,2]"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1


PRESETS = ["model=llama3_405b parallel.pp=16 parallel.tp=8 train.global_batch_size=256 train.micro_batch_size=1",
           "model=gpt3_175b parallel.pp=8 parallel.schedule=interleaved_1f1b parallel.virtual_stages=3 train.global_batch_size=64 "
           "train.micro_batch_size=1",
           "model=llama3_8b parallel.pp=4 parallel.schedule=dualpipev train.global_batch_size=64 train.micro_batch_size=2",
           "model.num_layers=6 parallel.pp=2 parallel.stages=[4,2] train.micro_batch_size=1"]  # fmt: skip


@pytest.mark.parametrize("words", PRESETS)
def test_a_shrunk_pipeline_keeps_its_stages_and_passes_its_own_check(words: str) -> None:
    cfg = compose.load(words.split())
    world = small_world(cfg)
    vet(cfg, world)
    small = shrink(cfg, world)
    check(small, world)
    stages = stage_layers(small)
    assert len(stages) == len(cfg.parallel.stages or layers_of_stages(_sized(cfg.model), 256, len(stages)))
    assert small.model.num_layers <= len(stages) + 1 and max(len(s) for s in stages) == 2, "uneven: one stage has a layer more"


def _sized(model: object) -> object:
    model.vocab_size = model.vocab_size or 256
    return model
