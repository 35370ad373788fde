#!/usr/bin/env bash
# The checks of the project; they use no GPU.
#   bash tests/run.sh                  what .ci/run runs: lint, types, layers and all tests that are not slow
#   bash tests/run.sh fast             the same without the tests of servers and training runs
#   bash tests/run.sh slow [FILE...]   the slow tests, of all files or of some; writes tests/slow_tier.json
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

TIER="${1:-all}"                                # all, fast or slow
FILES=("${@:2}")                                # files of tests, for slow
SETUP="${SETUP:-1}"                             # 0: use the environment as it is
VENV="${VENV:-.venv}"                           # folder of the environment
WORKERS="${WORKERS:-2}"                         # tests that run at the same time
export CUDA_VISIBLE_DEVICES=                    # the CPU platform refuses machines with a visible GPU
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # several ranks share the cores

if [[ ! "$TIER" =~ ^(all|fast|slow)$ || ( "$TIER" != slow && ${#FILES[@]} -gt 0 ) ]]; then
  echo "usage: bash tests/run.sh [fast|slow [FILE...]]" >&2
  exit 2
fi

step() {                                        # step NAME COMMAND...: run it and say how long it took
  local name="$1" start=$SECONDS status=0
  shift
  echo "== $name"
  "$@" || status=$?
  echo "== $name: $((SECONDS - start)) s"
  return $status
}

tests() {                                       # tests NAME MARKS [ARGUMENT...]
  step "$1" "$bin/python" -m pytest -n "$WORKERS" --dist loadfile --ignore tests/gpu -m "$2" "${@:3}"
}

if [[ "$SETUP" == 1 ]]; then
  PLATFORM=cpu step setup bash examples/setup_env.sh
fi
case "$VENV" in
  /*) bin="$VENV/bin" ;;
  *) bin="$PWD/$VENV/bin" ;;
esac
if [[ "$TIER" == slow ]]; then
  report=build/slow_tests.xml failed=0
  tests "slow tests" slow --junitxml "$report" ${FILES[@]+"${FILES[@]}"} || failed=$?
  "$bin/python" -m tests.slow_tier "$report"    # also records what failed
  exit $failed
fi
step "ruff check" "$bin/ruff" check .
step "ruff format" "$bin/ruff" format --check .
step "mypy" "$bin/mypy"
step "layers" "$bin/lint-imports" --no-cache
tests "fast tests" "not slow and not sglang and not e2e"
if [[ "$TIER" == all ]]; then
  tests "server tests" "not slow and (sglang or e2e)"
fi
echo "== all: $SECONDS s"
