"""Where DeepSpeed keeps what this rank owns: one reading of its two ZeRO optimizers, the only code here that knows their insides.

Both lay the parameters of an optimizer group end to end and give each data-parallel rank one flat fp32 partition per group, on
which torch's optimizer works. Stages 1 and 2 cut the group as a whole (a rank owns few parameters, most of them whole), stage 3
cuts every parameter (a rank owns a range of each). Written for DeepSpeed 0.19.8.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Part:
    """The range [start, start + numel) of a flattened parameter, at `place` in the flat partition of its `group`."""

    group: int
    start: int = 0
    place: int = 0
    numel: int = 0

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        return flat.detach().narrow(0, self.place, self.numel)


@contextmanager
def _overflowed(zero: Any, check: str) -> Iterator[None]:
    """While inside, DeepSpeed's `step` finds that gradients have overflowed: it drops them, resets what counts microbatches and
    updates nothing. Its loss scaler is a constant here. `check` is the method that looks."""

    def found(*args: Any, **kwargs: Any) -> None:
        zero.overflow = True

    setattr(zero, check, found)  # before the class's own
    try:
        yield
    finally:
        delattr(zero, check)


class Stage12:
    """Stages 1 and 2."""

    def __init__(self, zero: Any, named: Mapping[str, nn.Parameter]) -> None:
        self.zero, self.named = zero, named
        self.flats: list[torch.Tensor] = zero.single_partition_of_fp32_groups
        group_of = {id(p): i for i, group in enumerate(zero.bit16_groups) for p in group}
        self.parts = {name: self._part(p, group_of[id(p)]) for name, p in named.items()}

    @staticmethod
    def _part(parameter: Any, group: int) -> Part:
        link = parameter._hp_mapping
        if link is None:
            return Part(group)
        place, mine = link.hp_fragment_address, link.lp_fragment_address
        return Part(group, mine.start, place.start, place.numel)

    def gradients(self) -> dict[str, torch.Tensor]:
        """This rank's reduced gradients, flat; in place. Between the last microbatch and the step."""
        self.zero._wait_for_offload_copies()
        owned = [(name, p) for name, p in self.named.items() if self.parts[name].numel]
        return {name: p._hp_mapping.get_lp_grad_fragment(p._index_in_param_group).view(-1) for name, p in owned}

    @contextmanager
    def overflowed(self) -> Iterator[None]:
        """DeepSpeed's step inside drops the gradients."""
        checks, self.zero.check_grad_overflow = self.zero.check_grad_overflow, True
        with _overflowed(self.zero, "check_overflow"):
            yield
        self.zero.check_grad_overflow = checks
        # Where the optimizer is offloaded, DeepSpeed 0.19.8 keeps its fp32 sums of bf16 gradients, and adds the next step's on.
        self.zero.averaged_gradients.update(dict.fromkeys(self.zero.averaged_gradients))  # the dictionary has other holders

    def publish(self) -> None:
        """Bring the weights that compute up to date with the masters; collective."""
        self.zero.update_lp_params()


class Stage3:
    """Stage 3."""

    def __init__(self, zero: Any, named: Mapping[str, nn.Parameter]) -> None:
        self.zero, self.named = zero, named
        self.flats: list[torch.Tensor] = zero.fp32_partitioned_groups_flat
        self.parts = {name: self._part(p) for name, p in named.items()}

    def _part(self, parameter: Any) -> Part:
        group, place, padded = self.zero.grad_position[self.zero.get_param_id(parameter)]
        start = padded * torch.distributed.get_rank(self.zero.dp_process_group)
        return Part(group, start, place, max(0, min(padded, parameter.ds_numel - start)))  # the last rank's is padded

    def gradients(self) -> dict[str, torch.Tensor]:
        """This rank's reduced gradients, flat; in place. Between the last microbatch and the step."""
        grads = {n: self.zero._get_fp32_grad_state_partition(p, release_swap_buffers=True)[0] for n, p in self.named.items()}
        return {name: grad[: self.parts[name].numel] for name, grad in grads.items() if self.parts[name].numel}

    def overflowed(self) -> AbstractContextManager[None]:
        """DeepSpeed's step inside drops the gradients."""
        return _overflowed(self.zero, "_overflow_check_and_loss_scale_update")

    def publish(self) -> None:
        """Bring the weights that compute up to date with the masters; collective."""
        for group in range(len(self.flats)):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)
        if kept := self.zero.persistent_parameters:  # small ones, which every rank holds whole
            kept[0].partition(kept)
            kept[0].all_gather(kept)
