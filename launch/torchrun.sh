#!/usr/bin/env bash
# Train on one or several machines without a scheduler. On every machine the same command, with its own number:
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 launch/torchrun.sh experiment=quickstart train.steps=1000
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=host0 launch/torchrun.sh experiment=quickstart train.steps=1000
# One machine needs no variables: launch/torchrun.sh experiment=quickstart
#
#   NNODES          machines                                                   1
#   NODE_RANK       number of this one, from 0; ranks are in this order        0
#   NPROC_PER_NODE  ranks here, as many on every machine                       its GPUs, or 1
#   MASTER_ADDR     name or address of machine 0, as the others reach it       127.0.0.1
#   MASTER_PORT     a free port of machine 0                                   29500
#   MAX_RESTARTS    how often ranks are started again after one has failed     0
#   RENDEZVOUS      static, or c10d: ranks in the order of the host names      static
#   PYTHON          the interpreter                                            python
#
# Where machines have several networks, name the one to use, or ranks wait for each other in vain:
#   export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0   # as `ip route get ADDRESS_OF_MACHINE_0` shows it
# Ctrl-C, SIGTERM or SIGUSR1 on any one machine: all ranks save and end with exit code 75. The same command goes on.
set -euo pipefail

: "${NNODES:=1}" "${NODE_RANK:=0}" "${MASTER_ADDR:=127.0.0.1}" "${MASTER_PORT:=29500}" "${MAX_RESTARTS:=0}"
: "${RENDEZVOUS:=static}" "${PYTHON:=python}"
if [ -z "${NPROC_PER_NODE:-}" ]; then
  NPROC_PER_NODE=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)
  [ "$NPROC_PER_NODE" -gt 0 ] || NPROC_PER_NODE=1
fi
if [ "$NNODES" -gt 1 ] && [ "$MASTER_ADDR" = 127.0.0.1 ]; then
  echo "error: MASTER_ADDR is not set; give the name of machine 0, as the others reach it" >&2
  exit 2
fi

exec "$PYTHON" -m megatron_scratch.launch.host \
  --nodes="$NNODES" --node="$NODE_RANK" --ranks="$NPROC_PER_NODE" --address="$MASTER_ADDR" --port="$MASTER_PORT" \
  --restarts="$MAX_RESTARTS" --rendezvous="$RENDEZVOUS" -- "$@"
