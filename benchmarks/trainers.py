"""One trainer in one process, run step by step on request: the other half of `peers.py`, which starts it.

Every trainer runs its own loop for ever on the same token windows. The only thing that is added is torch's global hook after an
optimizer's step: it takes the time from one step's end to the next and waits there until more steps are asked for. So what is
measured is the whole of a trainer's own step, with its data path, loss, backward, clipping, optimizer and bookkeeping.

Protocol, one JSON object per line: after the first step a greeting is written; for each number read from stdin, that many
steps are run and their times are written. Whatever a trainer itself prints goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

SEQ, BATCH, VOCAB = 256, 16, 256
LAYERS, WIDTH, HEADS = 6, 384, 6
GATED = 1024  # width of a gated MLP with the parameters of a plain one of 4 x WIDTH: 8/3 x WIDTH
BATCHES = 64  # different batches; then from the start again
FOREVER = 10**9


@dataclass(frozen=True)
class Job:
    """What to run: precision is fp32 or bf16 (autocast)."""

    precision: str
    compile: bool
    threads: int
    text: Path | None
    source: Path | None  # nanoGPT's folder


class Gate:
    """Hook after an optimizer's step: times steps, and lets the loop go on only when more are asked for."""

    def __init__(self, out: TextIO) -> None:
        self.out, self.asked = out, 0
        self.steps: list[tuple[float, ...]] = []  # differences of `clocks`
        self.last = clocks()

    def __call__(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        now = clocks()
        if not self.asked:
            self._wait(greeting(optimizer))
        else:
            self.steps.append(tuple(b - a for a, b in zip(self.last, now, strict=True)))
            if len(self.steps) == self.asked:
                self._wait({"steps": self.steps, "rss_mb": peak_rss_mb()})
        self.last = clocks()

    def _wait(self, message: dict[str, Any]) -> None:
        """Say `message`, then sleep until a number of steps is asked for; the end of stdin ends the process."""
        print(json.dumps(message), file=self.out, flush=True)
        line = sys.stdin.readline()
        if not line:
            os._exit(0)
        self.asked, self.steps = int(line), []


def clocks() -> tuple[float, float, float]:
    """Seconds, CPU seconds of all threads, and seconds in which they were ready to run but had no core (Linux; elsewhere 0)."""
    waited = 0.0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError):  # the thread has just ended
            waited += int(path.read_text().split()[1]) / 1e9
    return time.perf_counter(), time.process_time(), waited


def greeting(optimizer: Any) -> dict[str, Any]:
    """What is being run, as the optimizer sees it."""
    import torch

    parameters = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    name = f"{type(optimizer).__name__}, fused={optimizer.defaults.get('fused')}"
    return {"parameters": parameters, "optimizer": name, "torch": torch.__version__}


def peak_rss_mb() -> float:
    """Most memory this process has had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def windows(text: Path | None) -> Any:
    """(BATCHES * BATCH, SEQ + 1) i64: windows of the text's bytes at random offsets, the same for every trainer."""
    import numpy as np

    rng = np.random.default_rng(0)
    if text is None:
        return rng.integers(0, VOCAB, (BATCHES * BATCH, SEQ + 1))
    data = np.frombuffer(text.read_bytes(), np.uint8)
    starts = rng.integers(0, len(data) - SEQ, BATCHES * BATCH)
    return data[starts[:, None] + np.arange(SEQ + 1)].astype(np.int64)


def batches(job: Job) -> Iterator[Any]:
    """Tensors (BATCH, SEQ + 1), for ever."""
    import torch

    rows = torch.from_numpy(windows(job.text)).view(BATCHES, BATCH, SEQ + 1)
    for i in count():
        yield rows[i % BATCHES]


def ours(job: Job) -> None:
    """This package: the config, model, engine, loader, step and loop of `megatron-scratch train experiment=bench_cpu`."""
    import numpy as np

    from megatron_scratch.config import check, compose
    from megatron_scratch.data import Sample
    from megatron_scratch.train import build
    from megatron_scratch.train.batches import BatchPlan
    from megatron_scratch.train.loop import train
    from megatron_scratch.train.passes import WholeModel
    from megatron_scratch.train.step import TrainStep
    from megatron_scratch.util.env import Rank

    class Windows:
        """The common windows, as the package's own `Loader` reads a dataset."""

        rows = windows(job.text)

        def __getitem__(self, k: int) -> Sample:
            return Sample(self.rows[k % len(self.rows)], np.zeros(SEQ + 1, bool), SEQ + 1)

        def locate(self, k: int) -> tuple[str, int]:
            return "windows", k

    words = ["experiment=bench_cpu", f"precision={job.precision}", f"train.compile={job.compile}", f"train.steps={FOREVER}"]
    cfg = compose.load([*words, f"train.threads={job.threads}"])
    check(cfg, world=1)
    with build.process_group(cfg, Rank(), None) as topo:
        _, engine = build.build_engine(cfg, topo)
        loader = build.loader(cfg, Windows(), topo)
        passes, plan = WholeModel(engine, topo), BatchPlan(cfg.train)
        step = TrainStep(passes, loader, plan, topo, build.learning_rate(cfg), None, lambda: False)
        train(0, FOREVER, step, [])


def nanogpt(job: Job) -> None:
    """nanoGPT: model.py's GPT (bias=False, dropout 0) and optimizer; the step of its train.py, with autocast on a CPU too."""
    import torch

    sys.path.insert(0, str(job.source))
    from model import GPT, GPTConfig  # type: ignore[import-not-found]

    shape = dict(n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH, block_size=SEQ, vocab_size=VOCAB)
    model = GPT(GPTConfig(**shape, bias=False, dropout=0.0))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
    run = torch.compile(model) if job.compile else model
    for rows in batches(job):
        with torch.amp.autocast("cpu", torch.bfloat16, enabled=job.precision == "bf16"):
            _, loss = run(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def litgpt(job: Job) -> None:
    """litgpt: all of `litgpt pretrain` but its command line, with a Llama-like config and a data module of the common windows.

    It always calls torch.compile; eager is torch's own switch that makes this do nothing.
    """
    if not job.compile:
        os.environ["TORCH_COMPILE_DISABLE"] = "1"
    from lightning import Fabric
    from litgpt import Config, pretrain
    from litgpt.args import EvalArgs, TrainArgs

    config = Config(
        name="bench", block_size=SEQ, vocab_size=VOCAB, padded_vocab_size=VOCAB, n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH,
        rotary_percentage=1.0, parallel_residual=False, bias=False, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP",
        intermediate_size=GATED,
    )  # fmt: skip
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed" if job.precision == "bf16" else "32-true")
    fabric.launch()
    steps = TrainArgs(
        save_interval=None, log_interval=FOREVER, global_batch_size=BATCH, micro_batch_size=BATCH, max_tokens=FOREVER * BATCH * SEQ,
        max_norm=1.0, min_lr=4e-5, lr_warmup_steps=2000, tie_embeddings=False,
    )  # fmt: skip
    pretrain.main(
        fabric=fabric, devices=1, seed=42, initial_checkpoint_dir=None, resume=False, config=config, data=lit_data(job),
        out_dir=Path(tempfile.mkdtemp()), tokenizer_dir=None, tokenizer=None, train=steps,
        eval=EvalArgs(interval=FOREVER, max_iters=1), optimizer="AdamW",
    )  # fmt: skip


def lit_data(job: Job) -> Any:
    """The common windows as a data module of litgpt."""
    from torch.utils.data import DataLoader, IterableDataset

    class Rows(IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            return batches(job)

    def loader() -> Any:
        return DataLoader(Rows(), batch_size=None)

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    return SimpleNamespace(connect=nothing, prepare_data=nothing, setup=nothing, train_dataloader=loader, val_dataloader=loader)


def hf_trainer(job: Job) -> None:
    """Hugging Face: `Trainer` with a Llama of this size; nothing is logged or saved."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=GATED, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        max_position_embeddings=SEQ, use_cache=False,
    )  # fmt: skip
    args = TrainingArguments(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=job.precision == "bf16", per_device_train_batch_size=BATCH,
        max_steps=FOREVER, max_grad_norm=1.0, torch_compile=job.compile, report_to=[], logging_strategy="no", save_strategy="no",
        disable_tqdm=True, train_sampling_strategy="sequential", dataloader_pin_memory=False,
    )  # fmt: skip
    rows = [{"input_ids": row[:-1], "labels": row[:-1]} for row in windows(job.text)]
    Trainer(model=LlamaForCausalLM(config), args=args, train_dataset=rows).train()


def olmo_core(job: Job) -> None:
    """OLMo-core: its Llama-like transformer and train module, in the order in which its trainer calls that. Metrics go nowhere."""
    import torch
    from olmo_core.config import DType
    from olmo_core.nn.transformer import TransformerConfig
    from olmo_core.optim import AdamWConfig
    from olmo_core.train.train_module import TransformerTrainModuleConfig

    def nowhere(*args: Any, **kwargs: Any) -> None:
        return None

    shape = TransformerConfig.llama_like(d_model=WIDTH, vocab_size=VOCAB, n_layers=LAYERS, n_heads=HEADS)
    module = TransformerTrainModuleConfig(
        rank_microbatch_size=BATCH * SEQ, max_sequence_length=SEQ, optim=AdamWConfig(), max_grad_norm=1.0,
        compile_model=job.compile, autocast_precision=DType.bfloat16 if job.precision == "bf16" else None,
    ).build(shape.build(init_device="cpu"), device=torch.device("cpu"))  # fmt: skip
    module._trainer = SimpleNamespace(record_metric=nowhere, record_ce_loss=nowhere)  # type: ignore[assignment]
    module.zero_grads()
    for rows in batches(job):
        module.train_batch({"input_ids": rows[:, :-1].contiguous(), "labels": rows[:, 1:].contiguous()})
        module.optim_step()
        module.zero_grads()


TRAINERS: dict[str, Callable[[Job], None]] = {
    "ours": ours, "nanogpt": nanogpt, "litgpt": litgpt, "hf_trainer": hf_trainer, "olmo_core": olmo_core,
}  # fmt: skip


def main() -> None:
    """Run one trainer until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trainer", choices=TRAINERS)
    parser.add_argument("precision", choices=("fp32", "bf16"))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--source", type=Path)
    args = parser.parse_args()
    gate = Gate(os.fdopen(os.dup(1), "w"))
    os.dup2(2, 1)  # what trainers print must not get between the lines of the protocol
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    register_optimizer_step_post_hook(gate)
    TRAINERS[args.trainer](Job(args.precision, args.compile, args.threads, args.text, args.source))


if __name__ == "__main__":
    main()
