#!/usr/bin/env bash
# All checks of the project; they use no GPU.
#   bash tests/run.sh          everything
#   bash tests/run.sh fast     lint, types, layers and the tests that need no server and no training run
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

TIER="${1:-full}"                               # fast or full
SETUP="${SETUP:-1}"                             # 0: use the environment as it is
VENV="${VENV:-.venv}"                           # folder of the environment
WORKERS="${WORKERS:-2}"                         # processes of the tests without servers
export CUDA_VISIBLE_DEVICES=                    # the CPU platform refuses machines with a visible GPU
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # several ranks share the cores

if [[ "$TIER" != fast && "$TIER" != full ]]; then
  echo "usage: bash tests/run.sh [fast|full]" >&2
  exit 2
fi

step() {                                        # step NAME COMMAND...: run it and say how long it took
  local name="$1" start=$SECONDS
  shift
  echo "== $name"
  "$@"
  echo "== $name: $((SECONDS - start)) s"
}

if [[ "$SETUP" == 1 ]]; then
  PLATFORM=cpu step setup bash examples/setup_env.sh
fi
case "$VENV" in
  /*) bin="$VENV/bin" ;;
  *) bin="$PWD/$VENV/bin" ;;
esac
step "ruff check" "$bin/ruff" check .
step "ruff format" "$bin/ruff" format --check .
step "mypy" "$bin/mypy"
step "layers" "$bin/lint-imports" --no-cache
step "fast tests" "$bin/python" -m pytest -n "$WORKERS" --dist loadfile --ignore tests/gpu -m "not slow and not sglang and not e2e"
if [[ "$TIER" == full ]]; then
  step "slow tests" "$bin/python" -m pytest -n "$WORKERS" --dist loadfile --ignore tests/gpu -m "slow and not sglang and not e2e"
  step "server tests" "$bin/python" -m pytest --ignore tests/gpu -m "sglang or e2e"
fi
echo "== all: $SECONDS s"
