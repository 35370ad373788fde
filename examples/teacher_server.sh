#!/usr/bin/env bash
# Start an SGLang server that scores for teacher.kind=sglang. Set teacher.server.url to the URL that it prints.
#   bash examples/teacher_server.sh MODEL_FOLDER [more sglang.launch_server arguments]
# Pass the value of teacher.dtype, for example --dtype bfloat16. Otherwise SGLang uses the dtype of the folder.
# On a GPU its logits stay in float32 (--enable-fp32-lm-head): rounded ones change each ratio by several percent.
# On a CPU: --device cpu --attention-backend torch_native --sampling-backend pytorch --sleep-on-idle
# Everyone who can send it requests can replace its weights. With a key, it rejects requests without the key:
#   export TROPD_SERVER_KEY="$(openssl rand -hex 32)"      # the same value here and for the launcher of the run
#   ... and set teacher.server.api_key_env=TROPD_SERVER_KEY in the run
set -euo pipefail

if [[ $# -lt 1 ]]; then
  echo "usage: bash examples/teacher_server.sh MODEL_FOLDER [sglang arguments]" >&2
  exit 2
fi
MODEL="$1"
shift
PYTHON="${PYTHON:-python}"                      # interpreter that has sglang, on a GPU machine .venv-server/bin/python
HOST="${HOST:-127.0.0.1}"                       # address to serve on; it must be reachable for the trainers
PORT="${PORT:-30000}"                           # port to serve on
TROPD_SERVER_KEY="${TROPD_SERVER_KEY:-}"        # API key that requests must carry; empty = no key
if [[ " $* " == *" --device cpu "* ]]; then
  export SGLANG_USE_CPU_ENGINE=1                # SGLang's own switch; without it, it looks for GPU packages
else
  set -- --enable-fp32-lm-head "$@"
fi
# the server sends itself a request when it starts, which must not go through a proxy
direct="${no_proxy:+$no_proxy,}${NO_PROXY:+$NO_PROXY,}127.0.0.1,localhost,::1,$HOST"
export no_proxy="$direct" NO_PROXY="$direct"
SHOWN="$HOST"
[[ "$HOST" != 0.0.0.0 && "$HOST" != :: ]] || SHOWN="$(hostname -f)"   # these two mean every address of this machine
echo "teacher.server.url=http://$SHOWN:$PORT"
if [[ -n "$TROPD_SERVER_KEY" ]]; then
  export TROPD_SERVER_KEY
  echo "teacher.server.api_key_env=TROPD_SERVER_KEY"
else
  echo "no key: every user who reaches $HOST:$PORT can replace the weights; set TROPD_SERVER_KEY" >&2
fi
# by its path, because an environment that has only SGLang cannot import this project
LAUNCH=(-P "$(dirname "${BASH_SOURCE[0]}")/../tropd_mcore/serving/sglang_launch.py")
[[ -f "${LAUNCH[1]}" ]] || LAUNCH=(-m tropd_mcore.serving.sglang_launch)
exec "$PYTHON" "${LAUNCH[@]}" --model-path "$MODEL" --host "$HOST" --port "$PORT" "$@"
