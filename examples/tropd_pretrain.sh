#!/usr/bin/env bash
# Train from one YAML file; further arguments are overrides (rollout.temperature=0.9) or --dry-run.
#   bash examples/tropd_pretrain.sh configs/quickstart-cpu.yaml [key=value ...]         starts torchrun itself
#   torchrun --nproc-per-node 8 --no-python examples/tropd_pretrain.sh CONFIG [...]      is started by torchrun
# The same command again resumes the run in its run.dir.
set -euo pipefail

if [[ $# -lt 1 ]]; then
  echo "usage: bash examples/tropd_pretrain.sh CONFIG.yaml [key=value ...] [--dry-run]" >&2
  exit 2
fi

PYTHON="${PYTHON:-python}"                      # interpreter of the environment that holds tropd_mcore
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}" # Megatron's order of communication and compute

if [[ -n "${LOCAL_RANK:-}" ]]; then             # already one rank of a torchrun job
  exec "$PYTHON" -m tropd_mcore.train "$@"
fi

NNODES="${NNODES:-1}"                           # machines in the job
NODE_RANK="${NODE_RANK:-0}"                     # this machine's number
MASTER_ADDR="${MASTER_ADDR:-127.0.0.1}"         # first machine
MASTER_PORT="${MASTER_PORT:-0}"                 # 0: a free port (one machine only)
NPROC_PER_NODE="${NPROC_PER_NODE:-}"            # ranks on this machine; default: what the configuration needs
if [[ -z "$NPROC_PER_NODE" ]]; then
  NPROC_PER_NODE="$("$PYTHON" -m tropd_mcore.cli.main config "$@" --ranks-per-node "$NNODES")"
fi

if [[ "$NNODES" == 1 ]]; then
  rendezvous=(--standalone)
else
  rendezvous=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
fi
exec "$PYTHON" -m tropd_mcore.train.launch "${rendezvous[@]}" --nproc-per-node "$NPROC_PER_NODE" \
  -m tropd_mcore.train "$@"
