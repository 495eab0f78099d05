"""What two checkpoints differ in: tensors, number by number, whatever layouts wrote them, and the facts. No torch; in pieces."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_scratch.checkpoint.boxes import as_float64, common_boxes, read_box
from megatron_scratch.checkpoint.inspect import WRITING
from megatron_scratch.checkpoint.manifest import CorruptCheckpoint, Saved
from megatron_scratch.checkpoint.place import Place, checkpoints, open_place, reached, read_manifest
from megatron_scratch.util.errors import RunFailed

SHOWN = 10  # tensors of a kind that are named


@dataclass
class Difference:
    """Of one tensor. `largest`: the largest magnitude in either, which the relative difference is of."""

    count: int = 0
    unequal: int = 0
    absolute: float = 0.0
    largest: float = 0.0

    @property
    def relative(self) -> float:
        if not self.absolute:
            return 0.0
        return self.absolute / self.largest if self.largest else math.inf

    def within(self, tolerance: float) -> bool:
        """Bitwise equal, or, given a tolerance, closer than that."""
        return self.unequal == 0 or (tolerance > 0 and self.relative <= tolerance)


@dataclass
class Group:
    """`model`, `optim`: all tensors under the first word of their names."""

    tensors: int = 0
    numbers: int = 0
    differ: dict[str, Difference] = field(default_factory=dict)

    def __str__(self) -> str:
        head = f"{self.tensors} tensors in both, {self.numbers:,} numbers: "
        if not self.differ:
            return head + "bitwise equal"
        worst = max(self.differ, key=lambda name: self.differ[name].relative)
        return head + f"{len(self.differ)} differ, at most by {self.differ[worst].relative:.2e} of the largest number ({worst})"


def diff(a: str, b: str, tolerance: float = 0.0) -> tuple[list[str], bool]:
    """Compare two checkpoints (of a run: its newest). Returns lines, and whether they are equal.

    Args:
        tolerance: largest difference in a tensor, relative to the largest magnitude in it, and in the facts. 0: bitwise.
    """
    try:
        with reached(a, b):
            return _diff(*(checkpoints(open_place(word))[-1] for word in (a, b)), tolerance)
    except CorruptCheckpoint as error:
        raise RunFailed(f"{error}; `ckpt verify` names all that is damaged") from error


def _diff(a: Place, b: Place, tolerance: float) -> tuple[list[str], bool]:
    left, right = read_manifest(a), read_manifest(b)
    lines = [f"A  {a}", f"B  {b}"]
    other = []
    for word, names in (("A", left.tensors.keys() - right.tensors.keys()), ("B", right.tensors.keys() - left.tensors.keys())):
        other += [f"only in {word}  {name}" for name in sorted(names)]
    groups: dict[str, Group] = {}
    for name in sorted(left.tensors.keys() & right.tensors.keys()):
        mine, theirs = left.tensors[name], right.tensors[name]
        if (mine.shape, mine.dtype) != (theirs.shape, theirs.dtype):
            other.append(f"differs    {name}: {mine.dtype} {list(mine.shape)} | {theirs.dtype} {list(theirs.shape)}")
            continue
        group, found = groups.setdefault(name.partition(".")[0], Group()), compare(a, mine, b, theirs)
        group.tensors, group.numbers = group.tensors + 1, group.numbers + found.count
        if found.unequal:
            group.differ[name] = found
    differ = {name: found for group in groups.values() for name, found in group.differ.items()}
    facts, written = list(_facts(left.extra | {"step": left.step}, right.extra | {"step": right.step}, tolerance))
    worst = sorted(differ, key=lambda name: -differ[name].relative)
    lines += _some(other) + _some([_told(name, differ[name]) for name in worst])
    lines += [f"fact       {line}" for line in facts] + [f"written    {line}" for line in written]
    lines += [f"{name:<10} {group}" for name, group in groups.items()]
    bitwise = not other and not facts and not differ
    equal = not other and not facts and all(found.within(tolerance) for found in differ.values())
    lines.append("equal: every number and fact" if bitwise else f"equal within tolerance={tolerance:g}" if equal else
                 f"different (tolerance={tolerance:g})")  # fmt: skip
    return lines, equal


def compare(a: Place, mine: Saved, b: Place, theirs: Saved) -> Difference:
    """Number by number; the two may be cut into other chunks, but are of one shape and dtype. -0 and 0 are unequal, as bits are."""
    found = Difference(math.prod(mine.shape))
    for chunk, other, box in common_boxes(mine, theirs):
        x, y = read_box(a, mine.dtype, chunk, box), read_box(b, theirs.dtype, other, box)
        bits = np.dtype(f"u{x.dtype.itemsize}")
        unequal = np.ascontiguousarray(x).view(bits) != np.ascontiguousarray(y).view(bits)
        found.unequal += int(unequal.sum())
        left, right = as_float64(x, mine.dtype), as_float64(y, theirs.dtype)
        found.largest = max(found.largest, _largest(left), _largest(right))
        if unequal.any():
            with np.errstate(invalid="ignore"):
                apart = np.abs(left - right)[unequal]
            # Two infinities of one sign are equal bits; any other pair with something not finite is as far apart as can be.
            found.absolute = max(found.absolute, float(np.where(np.isfinite(apart), apart, np.inf).max()))
    return found


def _largest(values: np.ndarray) -> float:
    finite = np.abs(values[np.isfinite(values)])
    return float(finite.max()) if finite.size else 0.0


def _told(name: str, found: Difference) -> str:
    return (f"differs    {name}: {found.unequal:,} of {found.count:,} numbers, at most by {found.absolute:.2e}, "
            f"{found.relative:.2e} of the largest")  # fmt: skip


def _some(lines: list[str]) -> list[str]:
    return lines[:SHOWN] + ([f"... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else [])


def _facts(left: Mapping[str, Any], right: Mapping[str, Any], tolerance: float) -> Iterator[list[str]]:
    """Facts that differ: of what the checkpoints are, and of how they came to be."""
    a, b = flat(left), flat(right)
    differ = {key: (a.get(key, "-"), b.get(key, "-")) for key in sorted({*a, *b})
              if key not in a or key not in b or not _close(a[key], b[key], tolerance)}  # fmt: skip
    for how in (False, True):
        yield [f"{key}: {x} | {y}" for key, (x, y) in differ.items()
               if (key.partition(".")[0] in WRITING) == how]  # fmt: skip


def _close(x: Any, y: Any, tolerance: float) -> bool:
    if isinstance(x, float) and isinstance(y, float):
        return x == y or math.isclose(x, y, rel_tol=tolerance)
    return bool(x == y) and type(x) is type(y)


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested JSON as {"a.b": leaf}."""
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else None
    if items is None or not value:
        return {prefix: value}
    return {key: leaf for name, item in items for key, leaf in flat(item, f"{prefix}.{name}" if prefix else str(name)).items()}
