# docker build -f docker/cpu.Dockerfile -t megatron-scratch:cpu . && docker run --rm -it -v "$PWD/runs:/app/runs" megatron-scratch:cpu --help
FROM python:3.11-slim
WORKDIR /app
COPY . .
# Give --build-arg TORCH="torch --index-url URL" with the URL of torch's CPU builds to leave out gigabytes of CUDA libraries.
ARG TORCH=torch
RUN pip install --no-cache-dir -c constraints.txt ${TORCH} && pip install --no-cache-dir -c constraints.txt ".[hf,deepspeed]"
ENTRYPOINT ["megatron-scratch"]
CMD ["--help"]
