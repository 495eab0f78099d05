"""Pipeline parallelism (GPipe, arXiv 1811.06965; Megatron-LM, arXiv 2104.04473) on torch.distributed.pipelining.

A rank holds some stages of the model. In a step, m microbatches pass through all stages forward and back, in the order of one of
torch's schedules, which also sends activations and their gradients. Around it, here:
 - shapes are given, so that nothing is inferred or sent around at the start; every microbatch has the same;
 - what wraps a stage (FSDP) is called like a plain function, and told by us when gradients are there: torch's own handling of DDP
   is wrong under schedules that split backward;
 - those schedules get weight gradients from `deferred`, not from torch's walk over the autograd graph;
 - a buffer for a received message is made when it is asked for and dropped when backward is through with it: torch makes one for
   each microbatch, and keeps them for ever.

Legend: m microbatches, B their sequences, S tokens of each, n tokens of this rank's part of one, D hidden.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, schedules

from megatron_scratch.config.pipeline import PipelineSchedule, owned_stages, owner
from megatron_scratch.parallel.topology import Topology
from megatron_scratch.util.errors import UserError

Tensors = Mapping[str, torch.Tensor]  # arguments of a stage besides the stream, for one microbatch or for all, one below the other


@dataclass(frozen=True)
class Plan:
    """How stages lie on ranks, and what travels between them."""

    schedule: PipelineSchedule
    virtual: int
    shape: tuple[int, int]  # (n, D) of a microbatch's stream
    dtype: torch.dtype

    def stages(self, topo: Topology) -> list[int]:
        """This rank's, in order."""
        return owned_stages(self.schedule, topo.size("pp"), self.virtual, topo.index("pp"))

    def count(self, topo: Topology) -> int:
        return topo.size("pp") * self.virtual


class _Call(nn.Module):
    """A stage as torch's runtime calls it. It hides what wraps the stage, which torch would handle by its own rules."""

    def __init__(self, call: Callable[..., torch.Tensor], last: bool) -> None:
        super().__init__()
        self.call, self.last, self.divisor = (call,), last, 1.0  # in a tuple: not a child

    def forward(self, *stream: torch.Tensor, **batch: Any) -> torch.Tensor:
        out = self.call[0](**batch, **({"x_ND": stream[0]} if stream else {}))
        return out / self.divisor if self.last else out


class _Stage(PipelineStage):
    """One stage of this rank, and whom to tell what has been done."""

    def __init__(self, plan: Plan, topo: Topology, call: _Call, number: int, gradients_are_there: Callable[[], None],
                 all_are_there: Callable[[], None]) -> None:  # fmt: skip
        stream = torch.empty(plan.shape, dtype=plan.dtype, device="meta", requires_grad=True)
        loss = torch.empty((), dtype=torch.promote_types(plan.dtype, torch.float32), device="meta", requires_grad=True)
        take = None if topo.deferred is None else topo.deferred.take
        super().__init__(
            call, number, plan.count(topo), topo.device, input_args=(stream,) if number else (),
            output_args=(loss if call.last else stream,), group=topo.group("pp"), dw_builder=take,
        )  # fmt: skip
        self.gradients_are_there, self.all_are_there = gradients_are_there, all_are_there

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        self._make_buffers(self.args_recv_info[fwd_chunk_id])
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        if not self.is_last:
            self._make_buffers(self.grad_recv_info[bwd_chunk_id])
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def _make_buffers(self, infos: tuple[Any, ...]) -> None:
        for info in infos:
            if not info.is_root_arg:
                info.buffer = torch.empty(info.tensor_meta.shape, dtype=info.tensor_meta.dtype, device=self.device)

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        for info in (*self.args_recv_info[bwd_chunk_id], *(() if self.is_last else self.grad_recv_info[bwd_chunk_id])):
            info.buffer = None
        if full_backward:
            self.gradients_are_there()

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        self.gradients_are_there()

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        self.all_are_there()


class Pipeline:
    """The stages of this rank, and the way of microbatches through all of them; every method is collective over pp.

    Args:
        calls: this rank's stages in order; each takes a microbatch's tensors by name, and the stream from the stage before as
            `x_ND` (not the first), and gives the stream, or the loss (the last).
        accumulate, reduce: called with a stage's place on this rank when the gradients of one, or of all, microbatches are there.
    """

    def __init__(self, plan: Plan, topo: Topology, calls: list[Callable[..., torch.Tensor]], accumulate: Callable[[int], None],
                 reduce: Callable[[int], None]) -> None:  # fmt: skip
        self.plan, self.topo, self.accumulate, self.reduce = plan, topo, accumulate, reduce
        self.numbers, last = plan.stages(topo), plan.count(topo) - 1
        self.calls = [_Call(call, number == last) for number, call in zip(self.numbers, calls, strict=True)]
        self.has_loss = last in self.numbers
        self.schedules: dict[int, Any] = {}  # by microbatches: a batch that grows has several
        logging.getLogger(schedules.__name__).setLevel(logging.CRITICAL)  # a line per action, before the error itself

    def gradients(self, batch: Tensors, labels: torch.Tensor, microbatches: int, divisor: float) -> torch.Tensor:
        """Forward and backward of all microbatches. The sum of their losses / divisor where the last stage is, else 0.

        Args:
            batch: tensors whose rows are cut into `microbatches` equal parts, the same on every pp rank.
        """
        if microbatches not in self.schedules:
            self.schedules[microbatches] = self._schedule(microbatches)
        for call in self.calls:
            call.divisor = divisor
        losses: list[torch.Tensor] = []
        try:
            self.schedules[microbatches].step(target=labels, losses=losses, return_outputs=False, **batch)
        except RuntimeError as error:
            _raise_users_own(error)
        return torch.stack([loss.detach() for loss in losses]).sum() if losses else torch.zeros((), device=self.topo.device)

    def _schedule(self, microbatches: int) -> Any:
        stages = [
            _Stage(self.plan, self.topo, call, number, lambda place=place: self.accumulate(place),
                   lambda place=place: self.reduce(place))
            for place, (number, call) in enumerate(zip(self.numbers, self.calls, strict=True))
        ]  # fmt: skip
        made = getattr(schedules, self.plan.schedule.torch_name)
        single = issubclass(made, schedules.PipelineScheduleSingle)
        return made(stages[0] if single else stages, microbatches, loss_fn=lambda loss, target: loss, scale_grads=False)

    @torch.no_grad()
    def forward(self, batch: Tensors, shape: tuple[int, int] | None = None) -> torch.Tensor:
        """One microbatch, forward only: the last stage's output where it is, else 0. Ranks go on to the next microbatch while later
        stages have this one. `shape`: of its stream, where it is not the plan's."""
        stream, sends = None, []
        for number in range(self.plan.count(self.topo)):
            if number not in self.numbers:
                continue
            if number > 0 and number - 1 not in self.numbers:
                stream = torch.empty(shape or self.plan.shape, dtype=self.plan.dtype, device=self.topo.device)
                dist.recv(stream, group=self.topo.group("pp"), group_src=self._owner(number - 1))
            out = self.calls[self.numbers.index(number)].call[0](**batch, **({} if stream is None else {"x_ND": stream}))
            stream = out
            if number + 1 < self.plan.count(self.topo) and number + 1 not in self.numbers:
                sends.append(dist.isend(out.contiguous(), group=self.topo.group("pp"), group_dst=self._owner(number + 1)))
        for send in sends:
            send.wait()
        return out if self.has_loss else torch.zeros((), device=self.topo.device)

    def _owner(self, stage: int) -> int:
        return owner(self.plan.schedule, self.topo.size("pp"), self.plan.virtual, stage)


def _raise_users_own(error: BaseException) -> NoReturn:
    """torch wraps what a stage raises; an error that is the user's to mend comes out as it was."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, UserError):
            raise inner
        inner = inner.__cause__
    raise error
