"""Every part that ships with the package, on one screen: kind, name, where it lives. Listing them imports none of them."""

from megatron_scratch.config.cleaners import (
    C4Settings,
    FineWebSettings,
    GopherQualitySettings,
    GopherRepetitionSettings,
    LanguageSettings,
    LengthSettings,
    PIISettings,
    UnicodeSettings,
)
from megatron_scratch.config.engine import DDPConfig, FSDPConfig, HSDPConfig, Zero1Config, Zero2Config, Zero3Config
from megatron_scratch.config.launcher import KubernetesConfig, LauncherConfig, SlurmConfig
from megatron_scratch.config.logging import TensorboardConfig, WandbConfig
from megatron_scratch.config.optim import (
    AdamWConfig,
    DecayConfig,
    FloorConfig,
    LionConfig,
    MuonConfig,
    ScheduleConfig,
    SGDConfig,
    WSDConfig,
)
from megatron_scratch.registry import register

_P = "megatron_scratch"
_PARTS = {
    "position": {"learned": "models.positions:Learned", "sinusoidal": "models.positions:Sinusoidal",
                 "rope": "models.positions:Rope", "none": "models.positions:NoPosition"},
    "rope_scaling": {"none": "models.positions:unscaled", "linear": "models.positions:linear_scaled",
                     "llama3": "models.positions:llama3_scaled", "yarn": "models.positions:yarn_scaled"},
    "norm": {"rmsnorm": "models.norms:RMSNorm", "layernorm": "models.norms:LayerNorm"},
    "mlp": {"gelu": "models.mlp:GELU", "gelu_tanh": "models.mlp:GELUTanh", "silu": "models.mlp:SiLU",
            "relu2": "models.mlp:ReLU2", "swiglu": "models.mlp:SwiGLU", "geglu": "models.mlp:GEGLU"},
    "block": {"pre": "models.decoder:PreNormBlock", "post": "models.decoder:PostNormBlock"},
    "hf": {"gpt2": "models.hf:GPT2", "llama": "models.hf:LLAMA", "qwen3": "models.hf:QWEN3"},
    "attention": {"auto": "models.attend:auto", "reference": "models.attend:reference", "sdpa": "models.attend:sdpa",
                  "matmul": "models.attend_matmul:matmul", "flex": "models.attend_flex:flex",
                  "flash_attn": "models.attend_flash:flash_attn"},
    "precision": {"fp32": "train.build:fp32", "bf16": "train.build:bf16", "fp16": "train.build:fp16", "fp8": "train.build:bf16",
                  "fp64": "train.build:fp64"},
    "pipeline": {"gpipe": "config.pipeline:GPIPE", "1f1b": "config.pipeline:ONE_F_ONE_B",
                 "interleaved_1f1b": "config.pipeline:INTERLEAVED",
                 "interleaved_zero_bubble": "config.pipeline:INTERLEAVED_ZERO_BUBBLE", "zbv_zero_bubble": "config.pipeline:ZBV",
                 "dualpipev": "config.pipeline:DUALPIPEV"},
    "encoder": {"gigatoken": "corpus.write.encoders:Gigatoken", "tiktoken": "corpus.write.encoders:Tiktoken",
                "native": "corpus.write.encoders:Native"},
    "corpus_engine": {"local": "corpus.engines.local:Local", "slurm": "launch.corpus_array:SlurmArray",
                      "ray": "corpus.engines.ray:Ray"},
    "sample_order": {"documents": "data.orders:DocumentOrder", "contiguous": "data.orders:ContiguousOrder",
                     "megatron": "data.megatron_order:MegatronOrder"},
    "tokenizer_trainer": {"bpe": "corpus.train_tokenizer:bpe",
                          "sentencepiece_bpe": "corpus.train_tokenizer:sentencepiece_bpe",
                          "sentencepiece_unigram": "corpus.train_tokenizer:sentencepiece_unigram",
                          "sentencepiece_char": "corpus.train_tokenizer:sentencepiece_char",
                          "byte": "corpus.train_tokenizer:byte"},
}  # fmt: skip

_ENGINES = {"ddp": ("ddp:DDPEngine", DDPConfig), "fsdp": ("fsdp:FSDPEngine", FSDPConfig), "hsdp": ("fsdp:FSDPEngine", HSDPConfig),
            "zero1": ("zero:ZeroEngine", Zero1Config), "zero2": ("zero:ZeroEngine", Zero2Config),
            "zero3": ("zero:ZeroEngine", Zero3Config)}  # fmt: skip
_LAUNCHERS = {"local": ("local:launch", LauncherConfig), "slurm": ("slurm:launch", SlurmConfig),
              "kubernetes": ("kubernetes:launch", KubernetesConfig)}  # fmt: skip
_SINKS = {"wandb": ("wandb:Wandb", WandbConfig), "tensorboard": ("tensorboard:Tensorboard", TensorboardConfig)}
_CLEANERS = {"newlines": ("basic:Newlines", None), "unicode": ("basic:Unicode", UnicodeSettings),
             "whitespace": ("basic:Whitespace", None), "length": ("basic:Length", LengthSettings),
             "gopher_quality": ("gopher:GopherQuality", GopherQualitySettings),
             "gopher_repetition": ("gopher:GopherRepetition", GopherRepetitionSettings), "c4": ("c4:C4", C4Settings),
             "fineweb": ("fineweb:FineWeb", FineWebSettings), "language": ("language:Language", LanguageSettings),
             "pii": ("pii:PII", PIISettings)}  # fmt: skip
_OPTIMIZERS = {"adamw": AdamWConfig, "sgd": SGDConfig, "lion": LionConfig, "muon": MuonConfig}
_SCHEDULES = {"constant": ScheduleConfig, "linear": DecayConfig, "cosine": DecayConfig,
              "inverse_sqrt": FloorConfig, "wsd": WSDConfig}  # fmt: skip


def register_all() -> None:
    """Fill the registry. `registry` calls this once, at the first look-up."""
    for kind, table in _PARTS.items():
        for name, target in table.items():
            register(kind, name, f"{_P}.{target}")
    for name, (target, config) in _CLEANERS.items():
        register("cleaner", name, f"{_P}.corpus.clean.{target}", config)
    for name, (target, config) in _ENGINES.items():
        register("engine", name, f"{_P}.engine.{target}", config)
    for name, (target, config) in _LAUNCHERS.items():
        register("launcher", name, f"{_P}.launch.{target}", config)
    for name, (target, config) in _SINKS.items():
        register("logging", name, f"{_P}.logs.{target}", config)
    for name, config in _OPTIMIZERS.items():
        register("optim", name, f"{_P}.optim.optimizers:{name}", config)
    for name, config in _SCHEDULES.items():
        register("schedule", name, f"{_P}.optim.schedules:{name}", config)
