"""Initial values do not depend on the layout, and belong to the parameter's name."""

from __future__ import annotations

import pytest
import torch
from ranks import run_ranks
from torch import nn

from megatron_scratch.parallel import SINGLE, Topology, local, materialize, shard_param
from megatron_scratch.parallel.layout import INIT_ROWS, ONES, init_rows, normal

SHAPE = (3 * INIT_ROWS + 10, 6)


@pytest.mark.parametrize("rows", [range(0, 5), range(60, 70), range(INIT_ROWS, 2 * INIT_ROWS), range(150, SHAPE[0])])
def test_any_slice_equals_the_whole(rows: range) -> None:
    whole = init_rows("a.weight", SHAPE, normal(0.5), 7, range(SHAPE[0]))
    assert torch.equal(init_rows("a.weight", SHAPE, normal(0.5), 7, rows), whole[rows.start : rows.stop])
    assert abs(whole.std().item() - 0.5) < 0.05


def test_name_and_seed_matter() -> None:
    a, b, c = (init_rows(n, SHAPE, normal(1.0), s, range(9)) for n, s in (("a", 1), ("b", 1), ("a", 2)))
    assert not torch.equal(a, b) and not torch.equal(a, c)


class Toy(nn.Module):
    def __init__(self, topo: Topology) -> None:
        super().__init__()
        self.up = shard_param((128, 6), topo, "tp", 0, normal(0.1))
        self.down = shard_param((6, 128), topo, "tp", 1, normal(0.1))
        self.norm = shard_param((6,), topo, init=ONES)


def _slices(topo: Topology) -> dict[str, list[list[float]]]:
    toy = Toy(topo)
    assert toy.up.device.type == "meta" and tuple(toy.up.shape) == (128, 6), "global shape, before there is memory"
    materialize(toy, 3, topo.device)
    return {name: local(p).tolist() for name, p in toy.named_parameters()}


def test_tensor_parallel_slices_are_slices_of_the_whole() -> None:
    whole = {n: torch.tensor(v) for n, v in _slices(SINGLE).items()}
    parts = [{n: torch.tensor(v) for n, v in rank.items()} for rank in run_ranks(2, _slices, degrees={"tp": 2})]
    assert torch.equal(torch.cat([p["up"] for p in parts], 0), whole["up"])
    assert torch.equal(torch.cat([p["down"] for p in parts], 1), whole["down"])
    assert all(torch.equal(p["norm"], whole["norm"]) for p in parts)
