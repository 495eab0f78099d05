#!/usr/bin/env bash
# Train on one or several machines without a scheduler. On every machine:
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 launch/torchrun.sh experiment=quickstart train.steps=1000
# One machine needs no variables: launch/torchrun.sh experiment=quickstart
set -euo pipefail
: "${NNODES:=1}" "${NODE_RANK:=0}" "${MASTER_ADDR:=127.0.0.1}" "${MASTER_PORT:=29500}"
: "${NPROC_PER_NODE:=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)}"
[ "$NPROC_PER_NODE" -gt 0 ] || NPROC_PER_NODE=1

# Without this, restarted gloo ranks read the addresses of the ranks that died (torch 2.13, pytorch issue 135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

exec python -m torch.distributed.run \
  --nnodes="$NNODES" --node-rank="$NODE_RANK" --nproc-per-node="$NPROC_PER_NODE" \
  --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" \
  -m megatron_scratch train "$@"
