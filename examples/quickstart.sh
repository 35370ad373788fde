#!/usr/bin/env bash
# From a bare clone to a distilled student and its report, on two CPU cores:
#   bash examples/quickstart.sh [key=value ...]
# Run again, it installs and makes nothing that is there, and goes on with the run where it stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

SIZE="${QUICKSTART_SIZE:-full}"                 # full, or tiny: a smaller task for a quick look
CONFIG="${QUICKSTART_CONFIG:-configs/quickstart-cpu.yaml}" # what to train
VENV="${VENV:-.venv}"                           # folder of the environment; relative to the repository, or absolute
# 1: make the environment; 0: use that of PYTHON, as where `tropd recipes` has copied this file to
SETUP="${SETUP:-$([[ -f examples/setup_env.sh ]] && echo 1 || echo 0)}"

case "$VENV" in
  /*) ;;
  *) VENV="$PWD/$VENV" ;;
esac
export VENV
INTERPRETER="$VENV/bin/python"
[[ "$SETUP" == 1 ]] || INTERPRETER="${PYTHON:-python}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # threads of each rank and of the rollout server
TROPD=("$INTERPRETER" -m tropd_mcore.cli.main)

case "$SIZE" in
  full) MODELS=models/arithmetic RUN=runs/quickstart MAKE=() ;;
  tiny) MODELS=models/arithmetic-tiny RUN=runs/quickstart-tiny MAKE=(--tiny) ;;
  *) echo "error: QUICKSTART_SIZE is '$SIZE', expected full or tiny" >&2; exit 2 ;;
esac
RUN="${QUICKSTART_RUN:-$RUN}"                   # run directory
SETTINGS=(
  "run.dir=$RUN" "student.path=$MODELS/student" "teacher.path=$MODELS/teacher"
  "data.prompts=$MODELS/train.jsonl" "data.teacher_responses=$MODELS/teacher_responses.jsonl" "$@"
)

child=                                          # process, and process group, of the step that runs
asked=                                          # exit code of a signal that came
# A signal to this script goes to the step: to its whole group where it is Ctrl-C, as from a terminal.
trap 'asked=130; [[ -z "$child" ]] || kill -INT -- "-$child" 2>/dev/null || true' INT
trap 'asked=143; [[ -z "$child" ]] || kill -TERM "$child" 2>/dev/null || true' TERM HUP

# step WHAT COMMAND...: say what, run it in a process group of its own, and end with its exit code where it fails
step() {
  local what="$1" status=0
  shift
  [[ -z "$asked" ]] || exit "$asked"
  printf '\n== %s\n' "$what"
  set -m
  "$@" &
  child=$!
  set +m
  while :; do
    status=0
    wait "$child" || status=$?
    kill -0 "$child" 2>/dev/null || break       # else a signal ended the wait, and the command is still at it
  done
  child=
  ((status)) || status="${asked:-0}"
  if ((status)); then
    case "$status" in
      130 | 143) echo "quickstart: stopped in the step '$what'; the same command goes on" >&2 ;;
      *) echo "error: quickstart: the step '$what' failed (exit code $status, its message is above)" >&2 ;;
    esac
    exit "$status"
  fi
}

[[ "$SETUP" != 1 ]] || step "environment ($VENV)" bash examples/setup_env.sh

step "models: a tokenizer, prompts, a teacher and a weaker student ($MODELS)" \
  "$INTERPRETER" -m examples.make_models "$MODELS" "${MAKE[@]}"

step "teacher responses, the prefixes that guide the student" \
  "${TROPD[@]}" prefixes "$CONFIG" "${SETTINGS[@]}" --max-new-tokens 48

step "accuracy before: the student as it was made" \
  "${TROPD[@]}" eval "$CONFIG" "${SETTINGS[@]}" --model "$MODELS/student" --prompts "$MODELS/heldout.jsonl" \
  --out "$RUN/evaluation_before.json"

step "training ($CONFIG)" "${TROPD[@]}" train "$CONFIG" "${SETTINGS[@]}"

step "accuracy after: the exported student" \
  "${TROPD[@]}" eval "$CONFIG" "${SETTINGS[@]}" --prompts "$MODELS/heldout.jsonl" \
  --out "$RUN/evaluation_after.json" --compare-with "$RUN/evaluation_before.json"

step "report" "${TROPD[@]}" report "$RUN"

cat <<END

Everything is in $RUN:
  export/                  the trained student, a Hugging Face folder
  report.html              curves and coloured rollouts
  metrics.jsonl            one line a step
  config.resolved.yaml     every setting and where it came from
  checkpoints/ rollouts/   what a resumed run continues from
END
