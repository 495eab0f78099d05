# docker build -f docker/gpu.Dockerfile --build-arg BASE=IMAGE -t megatron-scratch:gpu .
# docker run --rm --gpus all megatron-scratch:gpu bench model=llama3_2_1b precision=bf16 train.seq_len=4096 train.micro_batch_size=2
# BASE: NVIDIA's PyTorch image from NGC (nvidia/pytorch), which carries torch, apex and flash-attn built for its CUDA.
ARG BASE
FROM ${BASE}
WORKDIR /app
COPY . .
# --no-deps on ourselves: the image's torch stays as it is.
RUN pip install --no-cache-dir "hydra-core>=1.3.2,<1.4" "omegaconf>=2.3,<2.4" "sentencepiece>=0.2.1" "safetensors>=0.5" \
    "rich>=13" "matplotlib>=3.8" "tokenizers>=0.20" "deepspeed>=0.19.8,<0.20" && pip install --no-cache-dir --no-deps .
ENTRYPOINT ["megatron-scratch"]
CMD ["--help"]
