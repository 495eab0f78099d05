"""Models of every Hugging Face family, runs that hold them, and the two verbs without a command line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_scratch.checkpoint import manifest as manifests
from megatron_scratch.checkpoint import store
from megatron_scratch.config import compose
from megatron_scratch.config.model import ModelConfig, RopeConfig
from megatron_scratch.config.verbs import ExportArgs, ImportArgs
from megatron_scratch.data.tokenizer import ByteTokenizer, Tokenizer
from megatron_scratch.models import Decoder
from megatron_scratch.parallel import SINGLE, materialize
from megatron_scratch.train.hf.export import export, read
from megatron_scratch.train.hf.importing import import_hf

VOCAB = 300  # padded to 384: the padding must not travel
LLAMA = ModelConfig(vocab_size=VOCAB, num_layers=3, hidden_size=32, num_heads=4, num_kv_heads=2, ffn_size=80, max_seq_len=256,
                    norm_eps=1e-6)  # fmt: skip
GPT2 = replace(LLAMA, position="learned", norm="layernorm", norm_eps=1e-5, mlp="gelu_tanh", bias=True, num_kv_heads=None,
               tie_embeddings=True, ffn_size=128)  # fmt: skip
MODELS = {
    "gpt2": GPT2,
    "gpt2_untied": replace(GPT2, tie_embeddings=False, mlp="gelu"),
    "llama": LLAMA,
    "llama_separate": replace(LLAMA, fused_qkv=False),
    "llama_tied": replace(LLAMA, tie_embeddings=True),
    "llama_bias": replace(LLAMA, bias=True),
    "llama3_rope": replace(LLAMA, rope=RopeConfig(theta=5e5, scaling="llama3", factor=8.0, original_max_seq_len=64)),
    "llama_linear": replace(LLAMA, rope=RopeConfig(scaling="linear", factor=2.0)),
    "llama_yarn": replace(LLAMA, rope=RopeConfig(scaling="yarn", factor=4.0, original_max_seq_len=64)),
    "qwen3": replace(LLAMA, qk_norm=True, head_dim=16),
    "qwen3_tied": replace(LLAMA, qk_norm=True, head_dim=16, tie_embeddings=True),
}


def random_model(cfg: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights of a size that logits depend on each of them; norms and biases away from 1 and 0, or a mix-up would not show."""
    decoder, draw = Decoder(cfg, SINGLE), torch.Generator().manual_seed(seed)
    materialize(decoder, seed, torch.device("cpu"))
    for name, parameter in decoder.named_parameters():
        mean = float("norm" in name and name.endswith("weight"))
        torch.nn.init.normal_(parameter, mean, 0.2, generator=draw)
        if mean:
            parameter.data.clamp_(0.5, 2.0)  # where w - 1 + 1 is w
    return {name: p.detach() for name, p in decoder.named_parameters()}


def make_run(path: Path, model: ModelConfig, tokenizer: Tokenizer | None = None) -> dict[str, torch.Tensor]:
    """A run directory with a checkpoint of a random model at step 7."""
    state = random_model(model)
    store.save(path / "checkpoints", 7, {f"model.{name}": t for name, t in state.items()}, {"samples": 0}, SINGLE)
    cfg = compose.load([])
    cfg.model, cfg.dir = model, str(path)
    compose.save(cfg, path / "config.yaml")
    (tokenizer or ByteTokenizer()).save(path)
    return state


def do_export(run: Path, out: Path, **more: Any) -> list[str]:
    lines: list[str] = []
    args = ExportArgs(str(run), str(out), **more)
    args.check()
    export(args, lines.append)
    return lines


def do_import(src: Path, out: Path, **more: Any) -> list[str]:
    lines: list[str] = []
    import_hf(ImportArgs(str(src), str(out), **more), lines.append)
    return lines


def imported(run: Path) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / "step_00000000"
    saved = manifests.verify(folder).tensors
    assert {s.dtype for s in saved.values()} == {"float32"}
    return {name.removeprefix("model."): read(folder, s) for name, s in saved.items()}


def true_rows(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:VOCAB] if name in ("embed.weight", "head.weight") else tensor
