#!/usr/bin/env bash
# An SGLang server that scores for teacher.kind=sglang; set teacher.server.url to what it prints.
#   bash examples/teacher_server.sh MODEL_FOLDER [further sglang.launch_server arguments]
# Give the dtype of the run's teacher.dtype (SGLang takes that of the folder otherwise): --dtype bfloat16
# On a CPU: --device cpu --attention-backend torch_native --sampling-backend pytorch --sleep-on-idle
set -euo pipefail

if [[ $# -lt 1 ]]; then
  echo "usage: bash examples/teacher_server.sh MODEL_FOLDER [sglang arguments]" >&2
  exit 2
fi
MODEL="$1"
shift
PYTHON="${PYTHON:-python}"                      # interpreter of the environment that holds sglang
HOST="${HOST:-127.0.0.1}"                       # address to serve on; set one that the trainers reach
PORT="${PORT:-30000}"                           # port to serve on
if [[ " $* " == *" --device cpu "* ]]; then
  export SGLANG_USE_CPU_ENGINE=1                # SGLang's own switch; without it, it looks for GPU packages
fi
echo "teacher.server.url=http://$HOST:$PORT"
exec "$PYTHON" -m tropd_mcore.serving.sglang_launch --model-path "$MODEL" --host "$HOST" --port "$PORT" "$@"
