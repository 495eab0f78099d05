"""The typed config: sections as dataclasses, composed by Hydra, checked before anything starts."""

from megatron_scratch.config.corpus import CorpusConfig
from megatron_scratch.config.data import DataConfig
from megatron_scratch.config.model import ModelConfig, RopeConfig
from megatron_scratch.config.schema import Config, check
from megatron_scratch.config.train import TrainConfig

__all__ = ["Config", "CorpusConfig", "DataConfig", "ModelConfig", "RopeConfig", "TrainConfig", "check"]
