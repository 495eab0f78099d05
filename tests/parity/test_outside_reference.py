"""Training against an outside reference: transformers' models, torch's own AdamW and clipping, on the same weights and batches.

Every step compares the loss, the gradient norm, and the gradient of every parameter of theirs; the end, every weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from runs import config
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig

from megatron_scratch.checkpoint import store
from megatron_scratch.checkpoint.manifest import verify
from megatron_scratch.config import Config
from megatron_scratch.data.loader import open_data
from megatron_scratch.engine import Engine
from megatron_scratch.models.hf import from_hf, to_hf
from megatron_scratch.parallel import SINGLE, Topology
from megatron_scratch.parallel.layout import ZEROS, Layout, global_slice, local
from megatron_scratch.train import build
from megatron_scratch.train.batches import BatchPlan
from megatron_scratch.train.passes import to_device
from megatron_scratch.train.step import TrainStep
from megatron_scratch.util.env import Rank

STEPS, LR, BETAS, DECAY, CLIP = 10, 1e-3, (0.9, 0.95), 0.1, 1.0
# A twentieth of the median gradient (2e-3 before clipping), so AdamW still normalises; large against the rounding of a gradient.
# With the usual 1e-8 the key biases of GPT-2, whose gradient is nothing but rounding (1e-10; a softmax does not see them), end
# 3e-5 apart, and all else within 2e-7; with this one they end 4e-9 apart.
EPS = 1e-4
RELATIVE = 1e-6  # of losses and norms; found: 2e-7 and 3e-7, some roundings of 6e-8
GRADIENT = 4e-6  # of a parameter's largest gradient; found: 1.1e-6. Each is a sum over 256 tokens of products of a few layers
# If gradients differ by d at most, AdamW's updates lr m / (sqrt(v) + eps) differ by lr d (1 + C) / eps at most: m and sqrt(v) are
# means over the steps, so they differ by d at most, and |m| <= C sqrt(v) with C^2 = sum over steps of a^2 / b, the weights of the
# two means (Cauchy-Schwarz). C < 1.02 in 10 steps with these betas.
SLOPE = LR * 2.02 / EPS
VOCAB, SEQ = 257, 32  # bytes and the end of a document, padded to 384 here and not there
MODELS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, max_position_embeddings=SEQ, attn_implementation="eager", initializer_range=0.1),
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=SEQ, attn_implementation="eager",
                       initializer_range=0.1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
}  # fmt: skip
Arrays = dict[str, np.ndarray]
Parts = dict[str, tuple[tuple[int, ...], tuple[Any, ...], np.ndarray]]  # name -> global shape, which part, its values


@dataclass
class Trace:
    """Per step: loss, gradient norm before clipping, gradient before clipping by their names; and the weights at the end."""

    losses: list[float]
    norms: list[float]
    gradients: list[Arrays]
    weights: Arrays


def theirs(hf: PretrainedConfig, cfg: Config) -> tuple[dict[str, torch.Tensor], Trace]:
    """The state_dict at the start, and their training."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(hf, dtype=torch.float32)
    for name, p in model.named_parameters():  # biases and norms away from 0 and 1, or a mix-up would not show
        if p.ndim == 1:
            torch.nn.init.normal_(p, float(name.endswith("weight")), 0.2)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    named = dict(model.named_parameters())
    free = [p for name, p in named.items() if p.ndim == 1 or any(word in name for word in ("embed_tokens", "wte", "wpe"))]
    rest = [p for name, p in named.items() if all(p is not q for q in free)]
    groups = [{"params": free, "weight_decay": 0.0}, {"params": rest, "weight_decay": DECAY}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS)
    trace = Trace([], [], [], {})
    loader = build.loader(cfg, open_data(cfg.data, SEQ, cfg.seed).train, SINGLE)
    size = cfg.train.global_batch_size
    for step in range(STEPS):
        batches = [to_device(batch, SINGLE.device)[:2] for batch in loader.microbatches(step * size, size)]
        tokens, labels = (torch.cat(column) for column in zip(*batches, strict=True))
        loss = F.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        trace.gradients.append({name: p.grad.numpy().copy() for name, p in named.items()})
        trace.norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        trace.losses.append(loss.item())
        optimizer.step()
    trace.weights = {name: p.detach().numpy().copy() for name, p in named.items()}
    return start, trace


def ours(topo: Topology, cfg: Config, folder: Path) -> tuple[list[float], list[float], list[Parts]]:
    """Our training from a checkpoint: losses, norms, and this rank's gradients of each step and weights at the end."""
    if topo.world > 1:
        topo = build.topology(cfg, Rank(topo.rank, topo.world, topo.rank, True), topo.device)
    manifest = verify(folder)
    _, engine = build.build_engine(cfg, topo)
    engine.load(store.shapes(manifest), lambda state: store.load(folder, manifest, state, topo))
    loader = build.loader(cfg, open_data(cfg.data, SEQ, cfg.seed).train, topo)
    passes, plan = build.build_passes(cfg, engine, topo), BatchPlan(cfg.train)
    step = TrainStep(passes, loader, plan, topo, build.learning_rate(cfg), None, lambda: False)
    losses, norms, states = [], [], []
    for i in range(STEPS):
        losses.append(step.gradients(i)[0].item())
        states.append(parts(engine, "grad."))
        norm = engine.norm()
        engine.update(build.learning_rate(cfg)(i), norm)
        norms.append(norm.item())
    return losses, norms, [*states, parts(engine, "model.")]


def parts(engine: Engine, kind: str) -> Parts:
    held = {name.removeprefix(kind): t for name, t in engine.state().items() if name.startswith(kind)}
    whole = {name: Layout(tuple(t.shape), None, (), ZEROS) for name, t in held.items()}  # what a plain tensor is; a DTensor knows
    return {name: (whole[name].shape, global_slice(t, whole[name]), local(t).numpy().copy()) for name, t in held.items()}


def assembled(ranks: list[tuple[list[float], list[float], list[Parts]]], cfg: Config) -> Trace:
    """The ranks' parts as one trace, in their names."""
    states = []
    for pieces in zip(*(parts for _, _, parts in ranks), strict=True):
        whole = {name: torch.full(shape, torch.nan) for name, (shape, _, _) in pieces[0].items()}
        for held in pieces:
            for name, (_, where, values) in held.items():
                whole[name][where] = torch.from_numpy(values)
        states.append({name: tensor.numpy() for name, tensor in to_hf(whole, cfg.model).items()})
    losses = [sum(each) for each in zip(*(losses for losses, _, _ in ranks), strict=True)]  # a rank has its part of the sum
    return Trace(losses, ranks[0][1], states[:-1], states[-1])


@pytest.mark.parametrize("layout", [["engine=ddp"], ["engine=fsdp", "parallel.tp=2"]], ids=["one process", "dp2 tp2 sp fsdp"])
@pytest.mark.parametrize("name", MODELS)
def test_ten_steps_are_those_of_transformers(name: str, layout: list[str], corpus: Path, tmp_path: Path) -> None:
    world = 1 if layout == ["engine=ddp"] else 4
    cfg = config(corpus, tmp_path, "schedule=constant", f"optim.lr={LR}", f"optim.betas={list(BETAS)}", f"optim.eps={EPS}",
                 f"optim.weight_decay={DECAY}", f"optim.clip_grad_norm={CLIP}", *layout, world=world)  # fmt: skip
    start, want = theirs(MODELS[name], cfg)
    cfg.model, state = from_hf(start, MODELS[name].to_dict())
    folder = store.save(tmp_path / "start", 0, {f"model.{n}": t for n, t in state.items()}, {}, SINGLE)
    got = assembled([ours(SINGLE, cfg, folder)] if world == 1 else run_ranks(world, ours, cfg, folder), cfg)
    assert got.losses == pytest.approx(want.losses, rel=RELATIVE)
    assert got.norms == pytest.approx(want.norms, rel=RELATIVE)
    assert min(want.norms) > CLIP, "every step is clipped"
    for key, weight in want.weights.items():
        differences = []
        for found, true in zip(got.gradients, want.gradients, strict=True):
            difference = np.abs(found[key] - true[key])
            assert difference.max() <= GRADIENT * np.abs(true[key]).max(), key
            differences.append(difference + 2 * RELATIVE * np.abs(true[key]))  # the second: of the clipping factors
        # And two roundings a step of the weight itself, on both sides.
        allowed = STEPS * (SLOPE * np.max(differences, axis=0) + 4 * 2**-24 * np.abs(weight))
        assert (np.abs(got.weights[key] - weight) <= allowed).all(), key
