"""Presets: each composes, names the command that runs it, and has the published number of parameters, true vocabulary counted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config

from megatron_scratch.config.compose import load
from megatron_scratch.config.model import ModelConfig, check_model
from megatron_scratch.models import Decoder, count_parameters
from megatron_scratch.models.hf import hf_config
from megatron_scratch.parallel import SINGLE

FOLDER = Path(__file__).parents[2] / "configs" / "model"
PUBLISHED = {
    "gpt2_124m": 124_439_808, "gpt2_355m": 354_823_168, "gpt2_774m": 774_030_080, "gpt2_1558m": 1_557_611_200,
    "gpt3_175b": 174_604_259_328, "llama2_7b": 6_738_415_616, "llama3_8b": 8_030_261_248, "llama3_70b": 70_553_706_496,
    "llama3_405b": 405_853_388_800, "llama3_2_1b": 1_235_814_400, "qwen3_0_6b": 596_049_920, "qwen3_1_7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096, "qwen3_8b": 8_190_735_360, "qwen3_14b": 14_768_307_200, "qwen3_32b": 32_762_123_264,
}  # fmt: skip
TRANSFORMERS = {"gpt2": GPT2Config, "llama": LlamaConfig, "qwen3": Qwen3Config}


def preset(name: str) -> ModelConfig:
    return load([f"model={name}"]).model


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda p: p.stem)
def test_preset_is_sound(path: Path) -> None:
    assert path.read_text().splitlines()[0] == f"# megatron-scratch train model={path.stem}"
    cfg = preset(path.stem)
    check_model(cfg)
    assert (cfg.vocab_size is None) == (path.stem.endswith("tiny") or path.stem == "scratch")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name: str) -> None:
    assert count_parameters(preset(name)).total == PUBLISHED[name]


@pytest.mark.parametrize("name", ["gpt2_124m", "llama3_2_1b", "qwen3_0_6b", "gpt2_1558m", "llama3_405b", "qwen3_8b"])
def test_transformers_counts_the_same(name: str) -> None:
    written = hf_config(preset(name))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(TRANSFORMERS[written["model_type"]](**written))
    assert model.num_parameters() == PUBLISHED[name]


@pytest.mark.parametrize("name", ["gpt2_124m", "llama3_405b", "qwen3_0_6b"])
def test_the_built_model_has_them_too(name: str) -> None:
    cfg = preset(name)
    padding = (cfg.padded_vocab - cfg.vocab_size) * cfg.hidden_size * (1 if cfg.tie_embeddings else 2)
    assert sum(p.numel() for p in Decoder(cfg, SINGLE).parameters()) - padding == PUBLISHED[name]
