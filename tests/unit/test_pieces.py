"""A global tensor of which each rank holds boxes: the boxes of a flat range, and a tensor that computes nothing."""

from __future__ import annotations

import math
import random

import pytest
import torch

from megatron_scratch.parallel.pieces import Pieces, boxes

CPU = torch.device("cpu")


def test_boxes_are_the_range_in_order() -> None:
    rng = random.Random(0)
    for _ in range(500):
        shape = [rng.randint(1, 5) for _ in range(rng.randint(0, 4))]
        numbers = torch.arange(math.prod(shape)).view(shape)
        start, stop = sorted(rng.randint(0, numbers.numel()) for _ in range(2))
        cut = list(boxes(shape, start, stop))
        assert len(cut) <= max(1, 2 * len(shape) - 1)
        parts = [numbers[tuple(slice(o, o + s) for o, s in zip(*box, strict=True))].flatten() for box in cut]
        assert torch.cat(parts or [numbers.flatten()[:0]]).tolist() == list(range(start, stop))


def test_pieces_compute_nothing() -> None:
    pieces = Pieces.of_range((4, 5), (2, 5), (2, 0), 3, torch.arange(4.0), CPU)
    assert (pieces.shape, pieces.dtype) == ((4, 5), torch.float32)
    assert repr(pieces) == "Pieces([4, 5]: [1, 2] at [2, 3], [1, 2] at [3, 0])"
    assert pieces.full().tolist() == [[0.0] * 5, [0.0] * 5, [0.0, 0.0, 0.0, 0.0, 1.0], [2.0, 3.0, 0.0, 0.0, 0.0]]
    with pytest.raises(NotImplementedError, match="computes nothing"):
        pieces + 1
