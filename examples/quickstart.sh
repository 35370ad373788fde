#!/usr/bin/env bash
# From a bare clone to a distilled student and its report, on two CPU cores, also on a machine with GPUs:
#   bash examples/quickstart.sh [key=value ...]
# Run it again to resume. Nothing that exists is installed or made again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

SIZE="${QUICKSTART_SIZE:-full}"                 # full, or tiny: a smaller task for a quick look
case "$SIZE" in
  full) MODELS=models/arithmetic RUN=runs/quickstart MAKE=() STUDENT=misled CONFIG=configs/wrong-prior-cpu.yaml ;;
  tiny)
    MODELS=models/arithmetic-tiny RUN=runs/quickstart-tiny MAKE=(--tiny) STUDENT=student
    CONFIG=configs/quickstart-cpu.yaml
    ;;
  *) echo "error: QUICKSTART_SIZE is '$SIZE', expected full or tiny" >&2; exit 2 ;;
esac
RUN="${QUICKSTART_RUN:-$RUN}"                   # run directory
CONFIG="${QUICKSTART_CONFIG:-$CONFIG}"          # what to train
STUDENT="${QUICKSTART_STUDENT:-$STUDENT}"       # misled (a wrong prior; not in the tiny size) or student (forgets carries)
# VENV: folder of the environment on a CPU (.venv); on a GPU see TRAINER_VENV and SERVER_VENV of setup_env.sh
# 1: make the environment; 0: use that of PYTHON (the default if `tropd recipes` copied this file)
SETUP="${SETUP:-$([[ -f examples/setup_env.sh ]] && echo 1 || echo 0)}"

# platform.kind of the command line, else of the configuration
KIND="$(sed -nE '/^platform:/,/^[^ #]/s/^(platform: *\{| ) *kind: *([a-z]*).*/\2/p' "$CONFIG")"
for setting in "$@"; do
  [[ "$setting" != platform.kind=* ]] || KIND="${setting#*=}"
done
GPUS="$(nvidia-smi -L 2>/dev/null || compgen -G "/dev/nvidia[0-9]*" || true)"
SERVER=()                                       # settings that name the server's environment
if [[ "$KIND" == cuda || ("$KIND" != cpu && -n "$GPUS") ]]; then
  echo "platform: GPU"
  export PLATFORM=gpu                           # for setup_env.sh
  [[ "$SETUP" != 1 ]] || SERVER=("rollout.server.python=${SERVER_VENV:-.venv-server}/bin/python")
  FOLDER="${TRAINER_VENV:-.venv-trainer}"
else
  echo "platform: CPU${GPUS:+; the GPUs of this machine are hidden}"
  export PLATFORM=cpu CUDA_VISIBLE_DEVICES=     # trainer and SGLang's CPU engine refuse a GPU that they see
  FOLDER="${VENV:-.venv}"
fi
case "$FOLDER" in
  /*) ;;
  *) FOLDER="$PWD/$FOLDER" ;;
esac
[[ "$PLATFORM" == gpu ]] || export VENV="$FOLDER"
INTERPRETER="$FOLDER/bin/python"
[[ "$SETUP" == 1 ]] || INTERPRETER="${PYTHON:-python}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # threads of each rank and of the rollout server
TROPD=("$INTERPRETER" -m tropd_mcore.cli.main)

SETTINGS=(
  "run.dir=$RUN" "student.path=$MODELS/$STUDENT" "teacher.path=$MODELS/teacher"
  "data.prompts=$MODELS/train.jsonl" "data.teacher_responses=$MODELS/teacher_responses.jsonl" "${SERVER[@]}" "$@"
)

child=                                          # process (and process group) of the running step
asked=                                          # exit code for a signal that was received
# A signal to this script is passed on to the step. Ctrl-C goes to its whole process group, as from a terminal.
trap 'asked=130; [[ -z "$child" ]] || kill -INT -- "-$child" 2>/dev/null || true' INT
trap 'asked=143; [[ -z "$child" ]] || kill -TERM "$child" 2>/dev/null || true' TERM HUP

# step WHAT COMMAND...: print WHAT and run COMMAND in its own process group. If it fails, exit with its exit code.
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
    kill -0 "$child" 2>/dev/null || break       # else a signal ended the wait, and the command still runs
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

[[ "$SETUP" != 1 ]] || step "environment ($FOLDER)" bash examples/setup_env.sh

step "models: a tokenizer, prompts, a teacher and weaker students ($MODELS)" \
  "$INTERPRETER" -m examples.make_models "$MODELS" "${MAKE[@]}"

step "teacher responses, which the student begins to learn from" \
  "${TROPD[@]}" prefixes "$CONFIG" "${SETTINGS[@]}" --max-new-tokens 48

step "accuracy before: the student as it was made" \
  "${TROPD[@]}" eval "$CONFIG" "${SETTINGS[@]}" --model "$MODELS/$STUDENT" --prompts "$MODELS/heldout.jsonl" \
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
  metrics.jsonl            one line per step
  config.resolved.yaml     every setting and where it came from
  checkpoints/ rollouts/   what a resumed run continues from
END

step "result" "$INTERPRETER" -m examples.quickstart_table "$RUN" "$MODELS"
