"""Arguments of verbs that work on a finished run instead of composing one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from megatron_scratch.util.errors import UserError, choice

HF_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}  # theirs -> our precision


@dataclass
class InspectArgs:
    """`data inspect DIR`: a prepared folder or a Megatron prefix."""

    data: str = ""
    document: Optional[int] = None  # show this document
    sample: Optional[int] = None  # show this training sample, and where each piece of it comes from
    seq_len: int = 256  # of the sample
    seed: int = 1234  # of the sample
    order: str = "documents"  # of the sample: data.order
    megatron_samples: Optional[int] = None  # of the sample, with order=megatron: data.megatron_samples
    megatron_split: Optional[str] = None  # of the sample, with order=megatron: data.megatron_split

    def check(self) -> None:
        if not self.data:
            raise UserError("give the dataset: `megatron-scratch data inspect DIR [document=N] [sample=K]`")
        if self.document is not None and self.sample is not None:
            raise UserError(f"document={self.document} and sample={self.sample} are two questions; ask one")
        names = ("seq_len", "seed", "order", "megatron_samples", "megatron_split")
        given = [name for name in names if getattr(self, name) != getattr(InspectArgs, name)]
        if given and self.sample is None:
            raise UserError(f"{given[0]}={getattr(self, given[0])} is of a sample, and no sample=K is given; give one")
        if given and given[-1].startswith("megatron") and self.order != "megatron":
            raise UserError(f"{given[-1]}={getattr(self, given[-1])} is read with order=megatron only, got order={self.order}")
        if self.seq_len < 1:
            raise UserError(f"seq_len={self.seq_len} must be at least 1")


@dataclass
class VerifyArgs:
    """`data verify DIR`: a folder that a data verb wrote, or a Megatron prefix."""

    data: str = ""

    def check(self) -> None:
        if not self.data:
            raise UserError("give the dataset: `megatron-scratch data verify DIR`")


@dataclass
class EvalArgs:
    """`eval RUN`: a run directory or one of its checkpoints; its loss on a dataset, or with `tasks` what lm-eval says of it."""

    run: str = ""
    data: Optional[str] = None  # a dataset folder or prefix; None: the run's own validation set
    split: str = "valid"  # of a dataset folder: valid | train
    batches: Optional[int] = None  # micro-batches; None: all of it
    micro_batch_size: int = 16
    precision: Optional[str] = None  # None: the run's
    tasks: Optional[list[str]] = None  # of lm-evaluation-harness, or patterns of their names
    include: Optional[str] = None  # a folder with tasks of your own
    fewshot: Optional[int] = None  # examples before each question; None: the task's own number
    limit: Optional[int] = None  # documents of each task; None: all
    out: Optional[str] = None  # of the results as JSON; None: beside the checkpoints

    def check(self) -> None:
        """Refuse settings that mean nothing."""
        if not self.run:
            raise UserError("give the run: `megatron-scratch eval RUN [data=DIR]` or `... eval RUN tasks=[hellaswag]`")
        if self.micro_batch_size < 1:
            raise UserError(f"micro_batch_size={self.micro_batch_size} must be at least 1")
        loss, harness = ("data", "split", "batches"), ("include", "fewshot", "limit", "out")
        unused, why = (harness, "without tasks=[NAME,...]") if self.tasks is None else (loss, "with tasks=[...]")
        for key in unused:
            if getattr(self, key) != getattr(EvalArgs, key):
                raise UserError(f"{key}={getattr(self, key)} has no effect {why}; leave it out")
        if self.tasks is not None and not all(self.tasks or [""]):
            raise UserError(f"tasks={self.tasks} has no names in it; give tasks=[NAME,...]")
        for key, least in (("fewshot", 0), ("limit", 1)):
            if (given := getattr(self, key)) is not None and given < least:
                raise UserError(f"{key}={given} must be at least {least}, or null")
        if self.include is not None and not Path(self.include).is_dir():
            raise UserError(f"include={self.include} is no folder; give one with tasks as YAML files")


@dataclass
class GenerateArgs:
    """`generate RUN`: sampling from a trained model."""

    run: str = ""
    prompt: str = ""  # empty: start of a document
    max_new_tokens: int = 200
    temperature: float = 1.0  # 0: greedy
    top_k: Optional[int] = None  # keep the k likeliest
    top_p: Optional[float] = None  # keep the likeliest that together reach p
    seed: int = 0
    stop_at_eod: bool = True

    def check(self) -> None:
        """Refuse settings that mean nothing."""
        if not self.run:
            raise UserError("give the run: `megatron-scratch generate RUN [prompt=TEXT]`")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if self.temperature < 0:
            raise UserError(f"temperature={self.temperature} must be 0 (greedy) or more")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise UserError("temperature=0 takes the likeliest token, so top_k and top_p have no effect; leave them out")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k={self.top_k} must be at least 1, or null")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} must be in (0, 1], or null")


@dataclass
class CkptLsArgs:
    """`ckpt ls RUN`: a run, a folder of checkpoints, or a URL."""

    run: str = ""
    verify: bool = False  # read every file
    json: bool = False  # a line of JSON for each instead of a table

    def check(self) -> None:
        _given(self.run, "ls RUN")


@dataclass
class CkptInspectArgs:
    """`ckpt inspect RUN`: a checkpoint, the newest of a run, or a URL of either."""

    run: str = ""
    tensor: Optional[str] = None  # show this one: its chunks, and statistics of its numbers

    def check(self) -> None:
        _given(self.run, "inspect RUN [tensor=NAME]")


@dataclass
class CkptVerifyArgs:
    """`ckpt verify RUN`: one checkpoint, all of a run, or a URL of either."""

    run: str = ""

    def check(self) -> None:
        _given(self.run, "verify RUN")


@dataclass
class CkptDiffArgs:
    """`ckpt diff A B`: two checkpoints, or the newest of two runs."""

    a: str = ""
    b: str = ""
    tolerance: float = 0.0  # relative to the largest number of a tensor; 0: bitwise

    def check(self) -> None:
        _given(self.a and self.b, "diff A B")
        if not 0 <= self.tolerance < float("inf"):
            raise UserError(f"tolerance={self.tolerance} must be 0 (bitwise) or more")


def _given(where: str, usage: str) -> None:
    if not where:
        raise UserError(f"give the checkpoint: `megatron-scratch ckpt {usage}`")


@dataclass
class ExportArgs:
    """`ckpt export-hf RUN OUT`: a checkpoint as a folder for transformers."""

    run: str = ""
    out: str = ""
    step: Optional[int] = None  # None: the newest valid one
    dtype: str = "float32"  # of the weights: float32 | bfloat16 | float16
    shard_gb: float = 5.0  # 10^9 bytes of weights in a file, at most
    tokenizer: bool = True

    def check(self) -> None:
        """Refuse settings that mean nothing."""
        if not self.run or not self.out:
            raise UserError("give the run and the new folder: `megatron-scratch ckpt export-hf RUN OUT [dtype=bfloat16]`")
        choice("dtype", self.dtype, HF_DTYPES)
        if not 0 < self.shard_gb < float("inf"):
            raise UserError(f"shard_gb={self.shard_gb} must be above 0")


@dataclass
class ImportArgs:
    """`ckpt import-hf SRC OUT`: a folder of transformers as a run directory."""

    src: str = ""
    out: str = ""
    dtype: str = "float32"  # that the run computes in; its master weights are fp32 in any case
    fused_qkv: bool = True  # false: q, k and v apart, as a tp beyond the number of key/value heads needs them

    def check(self) -> None:
        """Refuse settings that mean nothing."""
        if not self.src or not self.out:
            raise UserError("give the model's folder and the new run directory: `megatron-scratch ckpt import-hf SRC OUT`")
        choice("dtype", self.dtype, HF_DTYPES)
